"""Peak memory of a call, from the kernel's own high-water mark of this process, or from torch's allocator on a GPU."""

from __future__ import annotations

import ctypes
import gc
import pathlib
from collections.abc import Callable

import torch

_CLEAR = pathlib.Path("/proc/self/clear_refs")
_STATUS = pathlib.Path("/proc/self/status")


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in {_STATUS}")


def peak_extra(call: Callable[[], object]) -> int | None:
    """Return by how many bytes a call raises resident memory at its peak, its result included.

    Freed memory goes back to the system first, so that reuse hides nothing. The counters of the kernel are exact
    to some hundred kilobytes. None where the system has no such counter.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # resets VmHWM to VmRSS
        before = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
    except (OSError, AttributeError, RuntimeError):
        return None
    del result
    return max(0, peak - before)


def peak_extra_cuda(call: Callable[[], object], device: torch.device) -> int:
    """Return by how many bytes a call raises what torch's allocator gave out on a GPU at its peak."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return max(0, peak - before)
