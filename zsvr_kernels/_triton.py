"""Triton at arm's length: imported when first asked for, never with the package; one description of a launch.

A `Launch` is made from metadata alone, so the same description runs on a GPU, is interpreted on the CPU
(``TRITON_INTERPRET=1``, set before this package is imported) and is compiled offline by ``make gates``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

OLDEST = (3, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What configuration tables are keyed by, and a block's shared memory in bytes.
SHARED_MEMORY = {
    "sm_80": 166912,
    "sm_86": 101376,  # and other chips with less shared memory than sm_80
    "sm_90": 232448,
    "sm_100": 232448,
    "gfx942": 65536,
}


def _version() -> str | None:
    """Return the release of Triton that an import would find, None if there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # From a distribution of another name, as torch's for AMD GPUs: only the module itself can say.
        return getattr(importlib.import_module("triton"), "__version__", None)


version = _version()


def _why_missing() -> str:
    if version is None:
        return "triton is not installed (pip install 'triton>=3.6')"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is installed; it takes 3.6 and later"
    return ""


# Constants of the process, so that torch.compile may trace through what reads them.
why_missing = _why_missing()
is_interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _target(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    if torch.version.hip is not None:
        return "gfx942"
    if major == 10:
        return "sm_100"
    return {(9, 0): "sm_90", (8, 0): "sm_80"}.get((major, minor), "sm_86")


def target(device: torch.device) -> str:
    """Return the key of configuration tables for a device: one of `SHARED_MEMORY`, or ``"cpu"`` when interpreted."""
    if device.type != "cuda":
        return "cpu"
    return _target(torch.cuda.current_device() if device.index is None else device.index)


def refusal(device: str, dtype: torch.dtype) -> str | None:
    """Return why Triton kernels cannot take tensors of this device type and dtype, or None if they can."""
    if why_missing:
        return why_missing
    if device == "cpu" and not is_interpreted:
        return "tensors are on cpu; it takes CUDA tensors, and CPU tensors only under TRITON_INTERPRET=1"
    if device == "cuda" and is_interpreted:
        return "TRITON_INTERPRET=1 is set, under which kernels take CPU tensors"
    if device not in ("cpu", "cuda"):
        return f"tensors are on {device}; it takes CUDA tensors"
    if dtype not in DTYPES:
        return f"dtype {dtype}; it takes float32, bfloat16 and float16"
    if device == "cpu" and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly; it takes float32 and float16 there"
    if device == "cuda" and torch.cuda.is_available():
        if torch.version.hip is not None:
            return "kernels are compiled for AMD GPUs but were never run on one"
        if torch.cuda.get_device_capability() < (8, 0):
            return "it takes GPUs of compute capability 8.0 and later"
    return None


def check_runs(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless Triton kernels may follow these tensors' addresses; the first one decides the dtype."""
    first = next(iter(tensors.values()))
    if (reason := refusal(first.device.type, first.dtype)) is not None:
        raise ValueError(f"{op}: backend 'triton' cannot run this call: {reason}")
    for name, x in tensors.items():
        if x.numel() and not x.data_ptr():
            raise ValueError(f"{name} must have memory, got a storage of {x.untyped_storage().nbytes()} bytes")


def input_precision(dtype: torch.dtype) -> str:
    """Return how float32 operands enter a matrix product: exactly, or as TF32 where the user opted in.

    The choice is torch's own: `torch.set_float32_matmul_precision` other than ``"highest"``.
    """
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: number of programs, up to three axes; only the first may pass 65535.
        arguments: every parameter of the kernel by name, constants included. Tensors are passed as pointers.
        options: ``num_warps``, ``num_stages`` and what else the compiler takes. Contraction of a*b+c is allowed unless
            ``enable_fp_fusion`` is False.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Launch on the current stream of the tensors' device; nothing is launched for an empty grid."""
        if 0 in self.grid:
            return
        # Contraction of a*b+c is said here: Triton's own default for it depends on the environment.
        options = {"enable_fp_fusion": True, **self.options}
        call = functools.partial(self.kernel[self.grid], **self.arguments, **options)
        device = next(x.device for x in self.arguments.values() if isinstance(x, Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            call()
        else:
            with torch.cuda.device(device):
                call()


def run(launches: list[Launch]) -> None:
    """Run launches in order."""
    for launch in launches:
        launch.run()
