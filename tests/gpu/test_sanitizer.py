"""Every kernel under compute-sanitizer, where the machine has it."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("sanitized.py")
SECONDS = 100.0  # under a tool; more would take the time of everything else


def run(*before: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    # Without torch's cache every tensor is an allocation of its own, so that one byte too far is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*before, sys.executable, str(SCRIPT)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def test_the_script_runs_by_itself(device):
    done = run()
    assert done.returncode == 0 and "ran every kernel" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool, cuda):
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    # What CUDA's functions return is PyTorch's to judge: it asks for what a driver may not have.
    options = ("--report-api-errors=no",) if tool == "memcheck" else ()
    try:
        done = run(found, f"--tool={tool}", "--error-exitcode=9", "--print-limit=5", *options, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} takes longer than {SECONDS:.0f} s")
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0 and "ran every kernel" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
