"""zsvr: zero-shot video restoration with a pre-trained image diffusion model, on zsvr_kernels."""

import importlib
from typing import TYPE_CHECKING, Any

from zsvr_kernels.version import __version__

if TYPE_CHECKING:
    from zsvr.pipeline import Restored, restore
    from zsvr.restoration import Sampling
    from zsvr.temporal.settings import Temporal

__all__ = ["Restored", "Sampling", "Temporal", "__version__", "restore"]

# Imported when first used.
_LATER = {"Restored": "pipeline", "Sampling": "restoration", "Temporal": "temporal.settings", "restore": "pipeline"}
_MODULES = ("degrading", "flow", "hosts", "metrics", "noise", "operators", "priors", "runs", "samplers", "schedule",
            "temporal", "video")  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
