"""Put the records of a run together and render them: what is red first, then what is slow, then everything."""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from bench.contest import BASELINES, VARIANTS
from bench.gpu.machine import MODES
from bench.gpu.state import State
from bench.gpu.state import write as write_text
from bench.report import table, title

PREDICTIONS = pathlib.Path(__file__).resolve().parents[1] / "predictions.json"
Result = dict[str, Any]
Record = dict[str, Any]
MATMUL = {"bf16": "mm_bf16", "fp16": "mm_fp16", "fp32": "mm_fp32"}


def is_red(record: Record) -> bool:
    """Return whether a step failed, its check did, or a test of it."""
    result = record.get("result") or {}
    if record["status"] == "failed" or result.get("failures") or result.get("errors"):
        return True
    return not result.get("check", {"ok": True})["ok"]


def collect(state: State, tests: list[str], steps: list[str]) -> Result:
    """Return everything that is recorded so far, and the names of what is not."""
    records = {name: state.get(name) for name in ("build", *tests, *steps)}
    done = [r for r in records.values() if r is not None]
    began = datetime.datetime.fromtimestamp(state.began(), datetime.timezone.utc)

    def results(kind: str) -> list[Record]:
        return [r["result"] for r in done if r["kind"] == kind and r["status"] == "done"]

    facts = next(iter(results("facts")), {})
    return {
        "schema": 1,
        "kind": "gpu",
        "provenance": {
            "date": began.isoformat(timespec="seconds"),
            "seconds": round(sum(r["seconds"] for r in done), 1),
            "fingerprint": state.fingerprint,
            **facts,
        },
        "build": next(iter(results("build")), None),
        "tests": [{"name": r["name"], "seconds": r["seconds"], **r["result"]} for r in done if r["kind"] == "tests"],
        "ceilings": next(iter(results("ceilings")), {}),
        "cases": [r["result"] for r in done if r["kind"] == "case" and r["status"] == "done"],
        "windows": results("windows"),
        "gather": [row for r in results("gather") for row in r["rows"]],
        "atomics": [row for r in results("atomics") for row in r["rows"]],
        "failed": [{"name": r["name"], "error": r["error"]} for r in done if r["status"] == "failed"],
        "skipped": [{"name": r["name"], "error": r["error"]} for r in done if r["status"] == "skipped"],
        "left": [name for name, r in records.items() if r is None],
    }


def predictions() -> dict[str, Any]:
    """Return the cases of bench/predictions.json, or none where there is no such file."""
    try:
        return json.loads(PREDICTIONS.read_text())["cases"]
    except (OSError, ValueError, KeyError):
        return {}


def predicted(record: Record, known: dict[str, Any], device: str) -> dict[str, Any] | None:
    """Return what was predicted for a case on this device (an H200's figures for those without their own)."""
    parts = (record["op"], record["level"], f"T{record['T']}", record["dtype"], record["direction"], record["variant"])
    key = "/".join(part for part in parts if part)
    machines = known.get(key, {}).get("machines", {})
    own = [m for name, m in machines.items() if name in device.lower()]
    return (own or list(machines.values())[:1] or [None])[0]


def roof(record: Record, result: Result) -> tuple[float, str] | None:
    """Return the least time of a case in seconds by the measured roofs, and which one sets it."""
    ceilings = result["ceilings"]
    terms: list[tuple[float, str]] = []

    def term(amount: float | None, rate: float | None, name: str) -> None:
        if amount and rate:
            terms.append((amount / rate, name))

    flops = record.get("flops")
    if record["op"] in ("cross_frame_attention", "slr_attention", "correspondence_search"):
        term(flops, ceilings.get(MATMUL[record["dtype"]]), "matmul")
    if record["op"] == "cross_frame_attention" and flops:
        passes = {"fwd": 1.0, "bwd": 2.5, "step": 3.5}[record["direction"]]
        exponentials = flops / passes / (4 * record["D"]) * (2 if record["direction"] == "step" else 1)
        term(exponentials, ceilings.get("exp2"), "exp")
    term(record.get("memory_traffic_bytes"), ceilings.get("hbm_copy"), "HBM")
    size = (4 if record["dtype"] == "fp32" else 2) * record["D"]
    rows = [r for r in result["gather"] if r["pattern"] == "smooth"]
    if rows:
        nearest = min(rows, key=lambda r: abs(r["row_bytes"] - size))["row_bytes"]
        rate = max(r["rate"] for r in rows if r["row_bytes"] == nearest)
        term(record.get("gathered_bytes"), rate, "gather")
    return max(terms) if terms else None


def _wrong(result: Result) -> list[list[str]]:
    rows = [["test", *pair] for t in result["tests"] for pair in t["failed"]]
    rows += [["result", title(r), r["check"]["message"]] for r in result["cases"] if not r["check"]["ok"]]
    rows += [["step", f["name"], f["error"]] for f in result["failed"]]
    return [[_cell(x) for x in row] for row in rows]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:400]


def is_result_red(result: Result) -> bool:
    return bool(_wrong(result))


def _beaten(result: Result) -> list[list[str]]:
    found = []
    for record in result["cases"]:
        for name, entry in record["contestants"].items():
            if name != "ours_sdpa" and (name in VARIANTS or name in BASELINES):
                continue  # but torch's own kernels on our windows may be the better choice of "auto"
            ratios = {mode: entry[mode]["ratio"]["p50"] for mode in MODES}
            if min(ratios.values()) < 1:
                text = ", ".join(f"{mode} {ratio:.2f}" for mode, ratio in ratios.items())
                found.append((min(ratios.values()), [title(record), name, text]))
    return [row for _, row in sorted(found, key=lambda item: item[0])]


def _microseconds(entry: Record) -> str:
    return " / ".join(f"{entry[p] * 1e6:.1f}" for p in ("p20", "p50", "p80"))


def _case_rows(result: Result, op: str) -> Iterator[list[str]]:
    known, device = predictions(), result["provenance"].get("device", "")
    for record in result["cases"]:
        if record["op"] != op or not record["check"]["ok"]:
            continue
        ours = record["contestants"]["ours"]
        cold = ours["cold"]["p50"]
        least, before = roof(record, result), predicted(record, known, device)
        ratios = ", ".join(
            f"{name} {entry['cold']['ratio']['p50']:.2f} ({entry['warm']['ratio']['p50']:.2f})"
            for name, entry in record["contestants"].items()
            if name != "ours"
        )
        memory = ", ".join(
            f"{name} {size / 2**20:.1f}"
            for name, size in record["peak_extra_bytes"].items()
            if size is not None and (name == "ours" or name not in VARIANTS)
        )
        clocks = record.get("clocks", {})
        yield [
            record["name"] + (" (compiled peers)" if record["group"] == "compiled" else ""),
            _microseconds(ours["cold"]), f"{ours['warm']['p50'] * 1e6:.1f}", f"{ours['eager']['p50'] * 1e6:.1f}",
            f"{least[0] / cold:.0%} of {least[1]}" if least else "",
            f"{before['us']:.1f}..{before['serial_us']:.1f} ({before['bound']}): {cold * 1e6 / before['us']:.2f}x"
            if before else "",
            ratios, memory,
            " ".join(clocks.get(name, "") for name in ("clocks.sm", "throttle_reasons")).strip(),
        ]  # fmt: skip


def _window_rows(result: Result) -> Iterator[list[str]]:
    for entry in result["windows"]:
        for name, record in entry["kernels"].items():
            what = f"{entry['level']} {entry['dtype']} T={entry['T']}"
            if "error" in record:
                yield [what, name, _cell(record["error"]), "", "", ""]
                continue
            compared = record["compared"]
            equal = ", ".join(f"{n} {'equal' if c['equal'] else format(c['difference'], '.1e')}"
                              for n, c in compared.items())  # fmt: skip
            times = [f"{record[d]['views'] * 1e6:.1f} / {record[d]['copies'] * 1e6:.1f}" for d in ("fwd", "step")]
            yield [what, name, equal, str(sum(c["nan"] for c in compared.values())), *times]


def _ceiling_rows(result: Result) -> Iterator[list[str]]:
    for name, value in result["ceilings"].items():
        unit = "us" if name.endswith("_seconds") else "GB/s" if name.startswith("hbm") else "G/s"
        yield [name, f"{value * 1e6:.2f}" if unit == "us" else f"{value / 1e9:.0f}", unit]


def summary(result: Result) -> str:
    """Return in a few lines how the run stands."""
    wrong = _wrong(result)
    tests = sum(t["tests"] for t in result["tests"])
    lines = [
        f"RED: {len(wrong)} failures" if wrong else "green",
        f"{tests} tests, {len(result['cases'])} cases, {len(result['left'])} steps left"
        + (": run the same command again" if result["left"] else ""),
    ]
    return "\n".join(lines)


def render(result: Result) -> str:
    """Return the whole report."""
    facts = result["provenance"]
    wrong = _wrong(result)
    versions = ", ".join(f"{name} {value}" for name, value in facts.get("versions", {}).items())
    dirty = " with uncommitted changes" if facts.get("dirty") else ""
    parts = [f"# GPU report on {facts.get('device', 'an unknown device')}\n"]
    if wrong:
        parts += [f"**RED: {len(wrong)} failures.**\n", table(["what", "where", "said"], wrong)]
    else:
        parts += ["Green: no test failed and no result was wrong.\n" if result["tests"] else "No test has run.\n"]
    tests = [[t["name"], *(str(t[n]) for n in ("tests", "failures", "errors", "skipped")), f"{t['seconds']:.0f}",
              _cell("; ".join(t["skips"]))] for t in result["tests"]]  # fmt: skip
    build = result["build"] or {"outcome": "not tried yet", "said": ""}
    parts += [
        f"{facts['date']}, commit {facts.get('commit', 'unknown')[:10]}{dirty}, {facts['seconds']:.0f} s of steps. "
        f"{versions}. Native module: {_cell(build['outcome'] + ' ' + build['said'])}.\n",
        "cold: one CUDA-graph replay after the second-level cache was overwritten; warm: replays back to back; eager: "
        "calls from Python. A ratio is the contestant's time over ours, cold (warm), median over interleaved rounds. "
        "Every case was checked against float64 before it was timed.\n",
        "## Where a peer is faster\n", table(["case", "peer", "ratio"], _beaten(result)),
        "## Roofs\n", table(["roof", "measured", "unit"], list(_ceiling_rows(result))),
    ]  # fmt: skip
    header = ["case", "cold us p20 / p50 / p80", "warm", "eager", "roof", "predicted us: measured over it", "ratios",
              "peak extra MB", "MHz, throttle"]  # fmt: skip
    for op in dict.fromkeys(record["op"] for record in result["cases"]):
        parts += [f"## {op}\n", table(header, list(_case_rows(result, op)))]
    kernels = ["case", "kernel", "views against copies", "NaN", "fwd us views / copies", "step us"]
    parts += ["## SDPA on overlapping views\n", table(kernels, list(_window_rows(result)))]
    gathers = [[str(r["row_bytes"]), r["pattern"], str(r["megabytes"]), str(r["flight"]), f"{r['rate'] / 1e9:.0f}"]
               for r in result["gather"]]  # fmt: skip
    parts += ["## Gathered rows\n", table(["bytes", "pattern", "MB", "tiles in flight", "GB/s"], gathers)]
    atomics = [[str(r["collisions"]), f"{r['atomics'] / 1e9:.0f}", f"{r['csr'] / 1e9:.0f}"] for r in result["atomics"]]
    parts += ["## float32 atomics against CSR\n", table(["samples per row", "atomics GB/s", "CSR GB/s"], atomics)]
    missing = [[title(r), name, _cell(why)] for r in result["cases"] for name, why in r.get("left_out", {}).items()]
    missing += [[title(r), name, f"no graph: {_cell(why)}"] for r in result["cases"]
                for name, why in r.get("not_graphed", {}).items()]  # fmt: skip
    parts += ["## Peers left out, contestants without a graph\n", table(["case", "contestant", "reason"], missing)]
    parts += ["## Tests\n", table(["file", "tests", "failures", "errors", "skipped", "s", "skips"], tests)]
    left = [[name, "not yet"] for name in result["left"]] + [[s["name"], _cell(s["error"])] for s in result["skipped"]]
    parts += ["## Steps not done\n", table(["step", "why"], left)]
    return "\n".join(parts)


def write(state: State, out: pathlib.Path, tests: list[str], steps: list[str]) -> Result:
    """Write report.json and report.md, and both again where bench/results/ keeps them; return the result."""
    result = collect(state, tests, steps)
    facts = result["provenance"]
    texts = {".json": json.dumps(result, indent=1) + "\n", ".md": render(result)}
    name = f"{facts['date'][:10]}-{facts.get('commit', 'unknown')[:10]}-gpu"
    for suffix, text in texts.items():
        write_text(out / f"report{suffix}", text)
        if "device_slug" in facts:
            write_text(out / "results" / facts["device_slug"] / f"{name}{suffix}", text)
    return result
