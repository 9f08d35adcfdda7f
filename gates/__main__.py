"""Compile every launch of the Triton kernels without a GPU, check what it became, and predict how long it takes.

``python -m gates [--full | --predict] [--select TEXT] [--target sm_90 ...] [--versions 3.9 3.6] [--jobs N] [--out D]``

Exit status 1 if a kernel fails a gate; each failure says what was got and what is allowed.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import torch

from gates import cases, checks, describe, pool, predictions, report
from gates.describe import ROOT
from zsvr_kernels._triton import SHARED_MEMORY

Row = dict[str, Any]
VERSIONS = ("3.9", "3.6")
# What is compiled in every committed configuration, elsewhere one launch of every kernel is.
DEEP = ("sm_90", "3.6")
CHOICE = f"one launch of every kernel, and every configuration for {DEEP[0]} with Triton {DEEP[1]}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def provenance(exact: dict[str, str]) -> Row:
    """Return commit, whether the checkout differs from it (None outside a checkout), and versions."""
    status = _git("status", "--porcelain", "--", ".", ":!bench/predictions.json", ":!gates/results")
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": None if status is None else bool(status),
        "triton": exact,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def rows(targets: list[str], select: str) -> list[Row]:
    """Return what there is to compile, one row per description and target, with the cases that lead to it."""
    found: dict[tuple[str, str], Row] = {}
    for target in targets:
        for case in cases.gated():
            for launch in cases.launches(case, target):
                description = describe.describe(launch, target)
                if select not in f"{case.key} {description['kernel']}":
                    continue
                name = describe.key(description)
                new = {"key": name, "target": target, "description": description, "cases": []}
                row = found.setdefault((target, name), new | {"due": cases.due(launch)})
                if case.key not in row["cases"]:
                    row["cases"].append(case.key)
    return list(found.values())


def chosen(found: list[Row], version: str) -> list[Row]:
    """Return a choice that fits CI: the first row of every kernel on a target, or of every configuration if `DEEP`."""
    kept: dict[tuple[str, str], Row] = {}
    for row in found:
        description = row["description"]
        is_deep = (row["target"], version) == DEEP
        identity = describe.configuration(description) if is_deep else description["kernel"]
        kept.setdefault((row["target"], identity), row)
    return list(kept.values())


def compiled(wanted: list[tuple[str, Row]], jobs: int) -> tuple[list[Row], dict[str, str]]:
    """Compile rows, each with a version; return them with what was found, and the versions' exact releases."""
    todo = [(row, pool.Job(version, row["target"], row["key"], row["description"])) for version, row in wanted]
    started, count = time.monotonic(), 0

    def done(job: pool.Job, result: pool.Result) -> None:
        nonlocal count
        count += 1
        if sys.stderr.isatty():
            print(f"\r{count}/{len(todo)} compiles, {time.monotonic() - started:.0f} s ", end="", file=sys.stderr)

    results, exact = pool.compile_all([job for _, job in todo], jobs, done=done)
    out = []
    for row, job in todo:
        found = results[job]
        failures = checks.failures(row["target"], found, row["due"])
        out.append(row | {"triton": exact[job.version], "found": found, "failures": failures})
    print(f"{len(todo)} compiles in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return out, exact


def write(found: list[Row], facts: Row, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(report.as_json(found, facts))
    (folder / "kernels.md").write_text(report.render(found, facts))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m gates", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every launch on every target; else a choice that fits CI")
    parser.add_argument("--select", default="", help="only launches whose case and kernel contain this text")
    parser.add_argument("--target", nargs="+", choices=tuple(SHARED_MEMORY), default=list(SHARED_MEMORY))
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), help="releases of Triton, as 3.6")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=pathlib.Path, default=pool.BUILD / "gates", help="folder for the table")
    parser.add_argument("--predict", action="store_true", help="write bench/predictions.json instead")
    options = parser.parse_args(arguments)
    if options.predict:
        path = ROOT / "bench" / "predictions.json"
        path.write_text(predictions.render(options.select, options.jobs, provenance))
        print(f"written: {path}")
        return 0
    planned = rows(options.target, options.select)
    if not planned:
        raise SystemExit(f"no launch matches {options.select!r}")
    wanted = [(v, row) for v in options.versions for row in (planned if options.full else chosen(planned, v))]
    found, exact = compiled(wanted, options.jobs)
    write(found, provenance(exact) | {"choice": "all launches" if options.full else CHOICE}, options.out)
    wrong = report.failures(found)
    print("\n".join([*wrong, f"{len(found)} compiles, {len(wrong)} failures; written: {options.out}/kernels.md"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
