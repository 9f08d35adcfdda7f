"""Where a measurement comes from: machine, versions, commit."""

from __future__ import annotations

import os
import pathlib
import platform
import re
import subprocess
from typing import Any

import numpy
import torch

import zsvr_kernels as zk


def device_name() -> str:
    """Return the processor's model name and the number of cores this process may use."""
    model = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = found.group(1) if found else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def slug(name: str) -> str:
    """Return a folder name for a device."""
    plain = re.sub(r"\((r|tm)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _git(root: pathlib.Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def collect(root: pathlib.Path) -> dict[str, Any]:
    """Return device, versions, commit and whether the checkout differs from it (None outside a checkout).

    ZSVR_COMMIT names the commit where there is no repository to ask.
    """
    status = _git(root, "status", "--porcelain", "--", ".", ":!bench/results")
    device = device_name()
    info = zk.build_info()
    return {
        "device": device,
        "device_slug": slug(device),
        "commit": os.environ.get("ZSVR_COMMIT") or _git(root, "rev-parse", "HEAD") or "unknown",
        "dirty": None if status is None else bool(status),
        "versions": {
            "zsvr_kernels": zk.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "kernel": platform.release(),
            "native": info["native"],
        },
        "cpu_capability": info["cpu_capability"],
    }
