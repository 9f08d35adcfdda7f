"""Prints as JSON what this Python and machine have for `bench.gpu`; imports nothing that could be missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from typing import Any

NEEDED = ("torch", "numpy", "pytest", "pytest_timeout")
OLDEST_TRITON = (3, 6)


def look(dry: bool) -> dict[str, Any]:
    """Return versions, the device's name, and what is missing, each with what to do."""
    missing = [f"Python package {name}" for name in NEEDED if importlib.util.find_spec(name) is None]
    found: dict[str, Any] = {"python": sys.version.split()[0], "device": "cpu", "torch": "", "triton": ""}
    if importlib.util.find_spec("triton") is not None:
        found["triton"] = importlib.metadata.version("triton")
        if tuple(int(part) for part in found["triton"].split(".")[:2]) < OLDEST_TRITON:
            missing.append(f"triton 3.6 or later, not {found['triton']}")
    elif not dry:
        missing.append("Python package triton, 3.6 or later")
    if importlib.util.find_spec("torch") is not None:
        import torch

        found["torch"] = torch.__version__
        if torch.cuda.is_available():
            found["device"] = torch.cuda.get_device_name()
            if torch.version.hip is not None:
                missing.append("an NVIDIA GPU: torch is built for AMD's")
            elif torch.cuda.get_device_capability() < (8, 0):
                missing.append(f"a GPU of compute capability 8.0 or later: {found['device']} is older")
        elif not dry:
            built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
            missing.append(f"an NVIDIA GPU that torch can use: torch {torch.__version__}, built {built}, finds none")
    return found | {"missing": missing}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(look("--dry" in sys.argv[1:])) + "\n")
