"""Cross-frame attention; README.md beside this file has the mathematics and the limits."""

from zsvr_kernels.ops.cross_frame_attention.api import cross_frame_attention
from zsvr_kernels.ops.cross_frame_attention.reference import cross_frame_attention_reference

__all__ = ["cross_frame_attention", "cross_frame_attention_reference"]
