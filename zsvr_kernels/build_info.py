"""What this installation is made of."""

from __future__ import annotations

import platform
from typing import Any

import torch

from zsvr_kernels import _native, _triton
from zsvr_kernels.version import __version__


class BuildInfo(dict[str, Any]):
    """A dict of facts whose text form is a table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.items())

    __repr__ = __str__


def build_info() -> BuildInfo:
    """Return versions, native features, the CPU's instruction set in use, threads and CUDA archs.

    Its text form is a table; ``python -m zsvr_kernels`` prints it.
    """
    info = BuildInfo(
        zsvr_kernels=__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        machine=platform.machine(),
    )
    if _native.is_available():
        native = _native.module()
        compiler = native.compiler.splitlines()[0]  # GCC gives its bare version, Clang its name too
        info["native"] = f"yes ({'GCC ' if compiler[:1].isdigit() else ''}{compiler})"
        info["cpu_capability"] = native.isa()
        info["cpu_capabilities_compiled"] = native.compiled_isas()
    else:
        info["native"] = f"no: {_native.why_missing}"
        info["cpu_capability"] = "none"
        info["cpu_capabilities_compiled"] = ""
    pool = "torch's pool" if _native.parallel_for() else "none: torch < 2.10"
    info["threads"] = f"{_native.threads()} ({pool})"
    info["cuda_archs"] = "none: no CUDA C++ kernels in this version"
    info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    info["triton"] = _triton.why_missing or str(_triton.version)
    return info
