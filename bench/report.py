"""Render a result file as Markdown: what is red or slower first, then targets, ceilings and every case.

``python -m bench.report FILE.json`` prints the report, ``--readme FILE.json`` the README's compact table.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
from collections.abc import Iterator
from typing import Any

from bench import shapes, targets
from bench.contest import BASELINES, VARIANTS

WORSE = 1.10  # slower than the previous result by this factor counts as a regression
Result = dict[str, Any]
Record = dict[str, Any]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, or a dash where there are no rows."""
    if not rows:
        return "none\n"
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def records(result: Result) -> Iterator[tuple[str, Record, dict[str, float | None]]]:
    """Yield allocator mode, record and ceilings of every case."""
    for run in result["runs"]:
        for record in run["cases"]:
            yield run["allocator"], record, run["probes"]


def red(result: Result) -> list[tuple[str, Record]]:
    """Return allocator mode and record of every case whose correctness check failed."""
    return [(allocator, record) for allocator, record, _ in records(result) if not record["check"]["ok"]]


def title(record: Record) -> str:
    return f"{record['op']} {record['name']}"


def _key(allocator: str, record: Record) -> tuple[str, str]:
    return allocator, title(record)


def peers(record: Record) -> dict[str, float]:
    """Return the median ratio to every peer and baseline (not to variants of ours)."""
    entries = record["contestants"].items()
    return {name: entry["ratio"]["p50"] for name, entry in entries if name not in VARIANTS}


def regressions(result: Result, before: Result | None) -> list[list[str]]:
    """Return rows for every case that a peer beats or that the previous result had faster, the worst first."""
    earlier = {}
    if before is not None:
        for allocator, record, _ in records(before):
            if record["check"]["ok"]:
                earlier[_key(allocator, record)] = record["contestants"]["ours"]["p50"]
    found: list[tuple[float, list[str]]] = []
    for allocator, record, _ in records(result):
        if not record["check"]["ok"]:
            continue
        for peer, ratio in peers(record).items():
            if ratio < 1 and peer not in BASELINES:  # targets say what a baseline is to be held to
                found.append((ratio, [title(record), allocator, f"{peer} is faster", f"{ratio:.2f}"]))
        now, then = record["contestants"]["ours"]["p50"], earlier.get(_key(allocator, record))
        if then is not None and now > WORSE * then:
            what = f"was {then * 1e3:.2f} ms, is {now * 1e3:.2f} ms"
            found.append((then / now, [title(record), allocator, what, f"{then / now:.2f}"]))
    return [row for _, row in sorted(found, key=lambda item: item[0])]


def roofline(record: Record, ceilings: dict[str, float | None]) -> tuple[float, str] | None:
    """Return the least time of a forward pass in seconds and what sets it; None without a model or ceilings.

    Arithmetic at the widest unit for the dtype; loads of all gathered values through the first-level cache
    (trajectory attention); inputs and outputs once from memory.
    """
    if record["direction"] != "fwd" or not record.get("flops"):
        return None
    units: tuple[str, ...] = ("fma_fp32",)
    if record["dtype"] == "bf16":
        tiles = {"tile_bf16", "dot_bf16"}
        wide = {"cross_frame_attention": tiles, "slr_attention": tiles, "correspondence_search": {"dot_bf16"}}
        units = (*sorted(wide.get(record["op"], ())), "fma_fp32")
    unit = max(units, key=lambda name: ceilings.get(name) or 0.0)
    terms = [("flops", unit), ("gathered_bytes", "read_l1"), ("memory_traffic_bytes", "read_dram")]
    times = [
        (record[amount] / ceilings[rate], rate) for amount, rate in terms if record.get(amount) and ceilings.get(rate)
    ]
    return max(times) if times else None


def _rate(record: Record) -> str:
    seconds = record["contestants"]["ours"]["p50"]
    if record.get("gathered_bytes"):
        return f"{record['gathered_bytes'] / seconds / 1e9:.0f} GB/s"
    return f"{record['flops'] / seconds / 1e9:.0f} GFLOP/s" if record.get("flops") else ""


def _share(record: Record, ceilings: dict[str, float | None]) -> str:
    least = roofline(record, ceilings)
    if least is None:
        if (record["op"], record["dtype"]) == ("cross_frame_attention", "bf16") and ceilings.get("dot_bf16"):
            rate = record["flops"] / record["contestants"]["ours"]["p50"]
            return f"{rate / (ceilings['dot_bf16'] or 1):.0%} of dot_bf16"
        if "of_fma_peak" in record:
            return f"{record['of_fma_peak']['p50']:.0%} of fma_fp32"
        return ""
    return f"{least[0] / record['contestants']['ours']['p50']:.0%} of {least[1]}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:.1f}"


def _case_rows(result: Result, op: str) -> Iterator[list[str]]:
    for allocator, record, ceilings in records(result):
        if record["op"] != op or not record["check"]["ok"]:
            continue
        ours = record["contestants"]["ours"]
        times = " / ".join(f"{ours[p] * 1e3:.2f}" for p in ("p20", "p50", "p80"))
        ratios = ", ".join(
            f"{name} {entry['ratio']['p50']:.2f}" for name, entry in record["contestants"].items() if name != "ours"
        )
        extra = record.get("peak_extra_bytes", {})
        theirs = ", ".join(f"{n} {_megabytes(b)}" for n, b in extra.items() if n not in VARIANTS)
        yield [
            record["name"], allocator, times, _rate(record), _share(record, ceilings), ratios,
            f"{_megabytes(extra.get('ours'))} (out {_megabytes(record['output_bytes'])}); {theirs}",
        ]  # fmt: skip


def _ceilings(result: Result) -> str:
    names = list(result["runs"][0]["probes"])
    rows = []
    for run in result["runs"]:
        values = [run["probes"].get(name) for name in names]
        rows.append([run["allocator"], str(run["threads"]), *("" if v is None else f"{v / 1e9:.0f}" for v in values)])
    return table(["allocator", "threads", *names], rows)


def _targets(result: Result) -> str:
    rows = []
    for line in sorted(targets.lines(result), key=lambda line: line.met):
        sense = "<=" if line.upper else ">="
        verdict = "reached" if line.met else "SHORT"
        rows.append([line.what, line.case, f"{sense} {line.bound:g}", f"{line.reached:.2f}", verdict, line.note])
    return table(["target", "case", "bound", "measured", "", "note"], rows)


def render(result: Result, before: Result | None = None) -> str:
    """Return the whole report."""
    facts = result["provenance"]
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    dirty = {True: " with uncommitted changes", False: "", None: ""}[facts["dirty"]]
    parts = [
        f"# Benchmark on {facts['device']}\n",
        f"{facts['date']}, commit {facts['commit'][:10]}{dirty}, suite {facts['suite']} in {facts['seconds']:.0f} s, "
        f"instruction set {facts['cpu_capability']}. {versions}.\n",
        "Times are medians of interleaved rounds; a ratio is the contestant's time over ours, median over rounds. "
        "Allocator R keeps freed memory, D is the default. Results are checked against float64 before timing.\n",
    ]
    failed = red(result)
    if failed:
        rows = [[title(record), allocator, record["check"]["message"]] for allocator, record in failed]
        parts += ["## Wrong results: no speed is reported\n", table(["case", "allocator", "check"], rows)]
    against = "" if before is None else f" (previous: {before['provenance']['commit'][:10]})"
    parts += [
        f"## Regressions{against}\n",
        table(["case", "allocator", "what", "ratio"], regressions(result, before)),
        "## Targets\n",
        _targets(result),
        "## Ceilings, GFLOP/s and GB/s\n",
        _ceilings(result),
    ]
    for op in shapes.FULL:
        header = ["case", "allocator", "ms p20 / p50 / p80", "rate", "roofline", "ratios", "peak extra MB"]
        parts += [f"## {op}\n", table(header, list(_case_rows(result, op)))]
    missing = [
        [title(record), allocator, name, why]
        for allocator, record, _ in records(result)
        for name, why in record.get("left_out", {}).items()
    ]
    parts += ["## Peers left out\n", table(["case", "allocator", "peer", "reason"], missing)]
    return "\n".join(parts)


def _layer_row(record: Record) -> list[str]:
    Hg, Wg = record["grid"]
    ratios = [
        f"{record['contestants'][name]['ratio']['p50']:.2f}x" if name in record["contestants"] else ""
        for name in ("spatial_layer", "eager_slr")
    ]
    extra = [record.get("peak_extra_bytes", {}).get(name) for name in ("ours", "spatial_layer", "eager_slr")]
    return [
        f"{record['level']}: {Hg}x{Wg}, H={record['H']}, D={record['D']}, T={record['T']}",
        record["variant"], record["direction"], record["dtype"], f"{record['contestants']['ours']['p50'] * 1e3:.1f}",
        *ratios, " / ".join(_megabytes(size) or "-" for size in extra),
    ]  # fmt: skip


def readme(result: Result) -> str:
    """Return two compact tables, operators and whole layer: retained allocator, most threads, medians and ratios."""
    most = max(run["threads"] for run in result["runs"])
    modes = {run["allocator"] for run in result["runs"]}
    mode = targets.ALLOCATOR if targets.ALLOCATOR in modes else min(modes)
    rows, layers = [], []
    for allocator, record, ceilings in records(result):
        if allocator != mode or record["threads"] != most or not record["check"]["ok"]:
            continue
        if record["op"] == "slr_attention":
            layers.append(_layer_row(record))
            continue
        ratios = ", ".join(f"{name} {ratio:.1f}x" for name, ratio in peers(record).items())
        Hg, Wg = record["grid"]
        shape = f"T={record['T']}, {Hg}x{Wg}, H={record['H']}, D={record['D']}"
        milliseconds = f"{record['contestants']['ours']['p50'] * 1e3:.2f}"
        what = f"`{record['op']}` {record['direction']}"
        rows.append([what, shape, record["dtype"], milliseconds, _share(record, ceilings), ratios])
    facts = result["provenance"]
    caption = f"\n{facts['device']}, {most} threads, allocator {mode}, torch {facts['versions']['torch']}, "
    caption += f"commit {facts['commit'][:10]}; ratio = the peer's time over ours.\n"
    text = ""
    if rows:
        text += table(["operator", "shape", "dtype", "ms", "roofline", "against"], rows) + caption
    if layers:
        header = ["layer", "frames", "direction", "dtype", "ms", "spatial layer", "eager SLR", "peak extra MB"]
        caption += "Peak extra MB: ours / spatial layer / eager SLR.\n"
        text += "\n" * bool(rows) + table(header, layers) + caption
    return text


def previous(path: pathlib.Path) -> Result | None:
    """Return the latest committed full result beside ``path`` other than itself, or None."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--", "*.json"], cwd=path.parent, capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    results = [json.loads((path.parent / n).read_text()) for n in listed if n != path.name]
    own = json.loads(path.read_text())["provenance"]["date"] if path.exists() else None
    earlier = [r for r in results if own is None or r["provenance"]["date"] < own]
    full = [r for r in earlier if r["provenance"]["suite"] == "full" and not r["provenance"]["select"]]
    return max(full, key=lambda r: r["provenance"]["date"], default=None)


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--readme", action="store_true", help="print the README's compact table only")
    options = parser.parse_args()
    result = json.loads(options.file.read_text())
    print(readme(result) if options.readme else render(result, previous(options.file)))


if __name__ == "__main__":
    main()
