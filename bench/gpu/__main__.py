"""Test and measure on an NVIDIA GPU, in as many runs as it takes: ``make gpu OUT=dir``.

``python -m bench.gpu [--out DIR] [--budget SECONDS] [--retry] [--dry]``

It uses the Python that runs it, needs no network, stops in time and goes on where it was cut: every finished step is a
file in DIR/state. Results are DIR/report.md, DIR/report.json, and the same under DIR/results/<device>/ as
bench/results/ wants them. Exit status: 0, or 1 if a test or check is red, or 2 if something is missing.
``--dry`` tries the same code on a CPU with tiny shapes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

from bench.gpu import processes
from bench.gpu.state import Deadline, State, source_hash

ROOT = processes.ROOT
TEST_SHARE = 0.45  # of the time left when tests begin
PROBE_SECONDS = 120.0


def probe(dry: bool) -> dict[str, Any]:
    """Return what `bench.gpu.probe` finds; it has a process of its own, so that this one never touches the GPU."""
    command = [sys.executable, "-m", "bench.gpu.probe", *(["--dry"] if dry else [])]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"missing": [f"a torch that finds its GPU within {PROBE_SECONDS:.0f} s"]}
    if done.returncode:
        said = done.stderr.strip().splitlines()
        return {"missing": [f"a torch that can be imported: {said[-1] if said else 'it failed'}"]}
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "gpu", help="default: build/gpu")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no step begins (540)")
    parser.add_argument("--retry", action="store_true", help="run failed steps and red tests again")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, to try the code out")
    options = parser.parse_args(arguments)
    deadline = Deadline(time.time() + options.budget)
    found = probe(options.dry)
    if found["missing"]:
        print("make gpu cannot run; missing:\n" + "\n".join(f"  - {what}" for what in found["missing"]))
        return 2

    from bench.gpu import plan, report

    out = options.out.resolve()
    kind = "dry" if options.dry else found["device"]
    fingerprint = f"{source_hash(ROOT)} {kind} torch {found['torch']} triton {found['triton']}"
    state = State(out / "state", fingerprint)
    state.began()
    listed = plan.steps(options.dry)
    files = plan.DRY_TESTS if options.dry else processes.test_files(plan.TESTS)
    names = [step.name for step in listed]
    if options.retry:
        for name in (*names, *(f"tests {f}" for f in files)):
            record = state.get(name)
            if record is not None and report.is_red(record):
                state.forget(name)

    def write() -> dict[str, Any]:
        return report.write(state, out, [f"tests {f}" for f in files], names)

    said = ""
    try:
        print(f"{kind}: torch {found['torch']}, triton {found['triton'] or 'none'}, into {out}", flush=True)
        tests_end = Deadline(min(deadline.stop, time.time() + TEST_SHARE * max(deadline.left(), 0.0)))
        with processes.building(state, out / "logs", tests_end, options.dry):
            processes.run_tests(state, files, out, tests_end)
        command = [sys.executable, "-m", "bench.gpu.worker", f"--state={state.folder}", f"--stop={deadline.stop}",
                   f"--fingerprint={fingerprint}", *(["--dry"] if options.dry else [])]  # fmt: skip
        limits = {step.name: step.limit for step in listed}
        said = processes.run_workers(state, limits, out / "logs", deadline, command, write)
    finally:
        result = write()
    print(report.summary(result))
    if said:
        print(said)
    return 1 if report.is_result_red(result) or said else 0


if __name__ == "__main__":
    raise SystemExit(main())
