"""The process that touches the GPU: it runs one step after another and may be killed at any time."""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
import traceback
from typing import Any

BROKEN = 3  # exit status: this process cannot go on, another can
ROOT = pathlib.Path(__file__).resolve().parents[2]


def facts(machine: Any) -> dict[str, Any]:
    """Return where the measurements come from."""
    import importlib.metadata

    import torch

    from bench import provenance

    found = provenance.collect(ROOT)
    found["host"] = found["device"]
    found["device"], found["device_slug"] = machine.name, provenance.slug(machine.name)
    for package in ("triton", "flash-attn"):
        try:
            found["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found["versions"][package] = "none"
    if machine.device.type == "cuda":
        properties = torch.cuda.get_device_properties(machine.device)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "clocks": machine.clocks(),
        }
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def perform(step: Any, machine: Any, small: bool) -> dict[str, Any]:
    """Run a step and return what it found."""
    from bench.gpu import ceilings, race, windows

    if step.kind == "facts":
        return facts(machine)
    if step.kind == "ceilings":
        return ceilings.measure(machine, small)
    if step.kind == "case":
        return race.run(step.case, machine, step.group)
    if step.kind == "windows":
        return windows.measure(machine, *step.arguments)
    if step.kind == "gather":
        return ceilings.gather(machine, *step.arguments, small)
    return ceilings.atomics(machine, small)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu.worker")
    parser.add_argument("--state", type=pathlib.Path, required=True)
    parser.add_argument("--fingerprint", required=True)
    parser.add_argument("--stop", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args(arguments)

    from bench.gpu import plan
    from bench.gpu.machine import Cuda, Host
    from bench.gpu.state import Deadline, State

    machine = Host() if options.dry else Cuda()
    state, deadline = State(options.state, options.fingerprint), Deadline(options.stop)
    for listed in plan.steps(options.dry):
        if state.get(listed.name) is not None or deadline.left() < listed.seconds:
            continue
        step = plan.on(listed, machine.device.type, machine.backend)
        start = time.monotonic()

        def keep(status: str, step: Any = step, start: float = start, **fields: Any) -> None:
            state.keep(step.name, step.kind, status, time.monotonic() - start, **fields)

        if step.kind in ("gather", "atomics") and not machine.has_triton:
            keep("skipped", error="Triton needs a GPU, or TRITON_INTERPRET=1")
            continue
        state.enter(step.name)
        said = ""
        try:
            result = perform(step, machine, options.dry)
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}"[:1000]
        try:
            machine.tidy()
        except RuntimeError as error:  # an illegal access stays with a process until its end
            keep("failed", error=f"{said} The device no longer answers: {error}"[:2000])
            state.leave()
            return BROKEN
        if said:
            keep("failed", error=said)
        else:
            keep("done", result=result)
        state.leave()
        if machine.is_spent:
            return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
