"""Trajectory attention; README.md beside this file has the mathematics and the limits."""

from zsvr_kernels.ops.trajectory_attention.api import trajectory_attention
from zsvr_kernels.ops.trajectory_attention.reference import trajectory_attention_reference

__all__ = ["trajectory_attention", "trajectory_attention_reference"]
