"""zsvr_kernels: fast, exact, differentiable temporal attention over video tokens.

Cross-frame attention, trajectory attention and the chaining of optical flow into trajectories, forward and
backward, with a plain PyTorch reference for every operator. Importing needs torch alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (before the native module: one OpenMP runtime)

from zsvr_kernels.backends import explain
from zsvr_kernels.build_info import build_info
from zsvr_kernels.combination import slr_attention
from zsvr_kernels.correction import LinkHistory, correct_links
from zsvr_kernels.frames import (
    absolute,
    all_frames,
    anchors,
    first_and_previous,
    index_list,
    neighbors,
    previous,
    relative,
)
from zsvr_kernels.links import Links
from zsvr_kernels.merging import merge_attention
from zsvr_kernels.ops.chain_links import chain_links
from zsvr_kernels.ops.correspondence_search import correspondence_search, link_score
from zsvr_kernels.ops.cross_frame_attention import cross_frame_attention
from zsvr_kernels.ops.trajectory_attention import trajectory_attention
from zsvr_kernels.options import CorrectionOptions, SLROptions
from zsvr_kernels.trajectories import Trajectories
from zsvr_kernels.version import __version__

if TYPE_CHECKING:
    from zsvr_kernels.context import VideoContext
    from zsvr_kernels.patching import PatchReport, patched
    from zsvr_kernels.slr import SLRAttention

__all__ = [
    "CorrectionOptions",
    "LinkHistory",
    "Links",
    "PatchReport",
    "SLRAttention",
    "SLROptions",
    "Trajectories",
    "VideoContext",
    "__version__",
    "absolute",
    "all_frames",
    "anchors",
    "build_info",
    "chain_links",
    "correct_links",
    "correspondence_search",
    "cross_frame_attention",
    "explain",
    "first_and_previous",
    "index_list",
    "link_score",
    "merge_attention",
    "neighbors",
    "patched",
    "previous",
    "relative",
    "slr_attention",
    "trajectory_attention",
]

# Where names live that are imported when first used: their modules load torch's compiler, which takes a second.
_LATER = {"PatchReport": "patching", "SLRAttention": "slr", "VideoContext": "context", "patched": "patching"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
