"""The native module, if it was built, and the thread pool it borrows from torch."""

from __future__ import annotations

import ctypes
import functools
import pathlib
from types import ModuleType
from typing import Any

import torch  # first: its OpenMP runtime must be the one the process uses

_C: ModuleType | None
try:
    from zsvr_kernels import _C  # type: ignore[attr-defined,no-redef]

    why_missing = ""
except ImportError as error:
    _C = None
    note = pathlib.Path(__file__).with_name("_native_build.txt")  # setup.py's reason
    reason = note.read_text().strip() if note.exists() else str(error)
    why_missing = f"the native module is not installed ({reason}); reinstall with a C++20 compiler"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def is_available() -> bool:
    return _C is not None


def module() -> Any:
    """Return the native module, or raise RuntimeError saying why there is none."""
    if _C is None:
        raise RuntimeError(why_missing)
    return _C


@functools.cache
def parallel_for() -> int:
    """Return the address of torch's parallel_for (0: none; kernels then run on the calling thread)."""
    library = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).torch_parallel_for, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def threads() -> int:
    """Return how many workers a launch may use: torch's setting, or 1 without torch's pool."""
    return torch.get_num_threads() if parallel_for() else 1


def tokens(x: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """Return the native view of a tensor ``[B, T, P, H, D]``: address and element strides."""
    return x.data_ptr(), x.stride()[:4]


def workspace(size: int) -> torch.Tensor:
    """Allocate scratch for one launch (64-byte aligned, as torch's CPU allocator gives)."""
    return torch.empty(max(size, 1), dtype=torch.uint8, device="cpu")
