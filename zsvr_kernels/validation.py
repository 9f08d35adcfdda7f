"""Checks of arguments, in one place: what was got, what was expected, what to do.

Every check reads metadata only (shape, stride, dtype, device), so it costs microseconds and traces under
torch.compile. Values (frame indices) are checked by the backends, next to where they are used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Sizes(NamedTuple):
    """Sizes of an attention call; ``Tk`` key frames, ``P`` token sites."""

    B: int
    T: int
    Tk: int
    P: int
    H: int
    D: int


def check_tensor(name: str, x: object, rank: int, layout: str) -> None:
    """Raise unless ``x`` is a strided tensor of the given rank; ``layout`` names its axes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}, got {type(x).__name__}")
    if x.dim() != rank:
        raise ValueError(f"{name} must have {rank} axes {layout}, got shape {tuple(x.shape)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")


def check_dtype(name: str, x: Tensor, *allowed: torch.dtype) -> None:
    if x.dtype not in allowed:
        expected = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{name} must be {expected}, got {str(x.dtype).removeprefix('torch.')}")


def check_shape(name: str, x: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(f"{name} must have shape {expected} ({why}), got {tuple(x.shape)}")


def check_device(name: str, x: Tensor, reference: Tensor) -> None:
    if x.device != reference.device:
        raise ValueError(f"{name} is on {x.device}, but q is on {reference.device}: move one of them")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> Sizes:
    """Check ``q [B, T, P, H, D]`` against ``k, v [B, Tk, P, H, D]``; return the sizes.

    Raises:
        TypeError: not tensors, or dtypes that differ or are not float32, bfloat16, float16, float64.
        ValueError: ranks, shapes or devices that do not fit, an empty axis, or a last axis that is not dense.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, 5, "[B, T, P, H, D]")
        check_dtype(name, x, *FLOATS)
        if x.stride(4) != 1 and x.shape[4] != 1:
            raise ValueError(
                f"{name}'s last axis must be dense (stride 1), got strides {tuple(x.stride())}: "
                "call .contiguous() or lay heads out as [..., H, D]"
            )
    B, T, P, H, D = q.shape
    Tk = k.shape[1]
    if min(T, Tk, P, H, D) < 1:
        raise ValueError(f"T, P, H and D must be at least 1, got q {tuple(q.shape)}, k {tuple(k.shape)}")
    for name, x in (("k", k), ("v", v)):
        check_shape(name, x, (B, Tk, P, H, D), "B, P, H, D of q and one frame count for k and v")
        check_device(name, x, q)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, but q is {q.dtype}: cast them to one dtype")
    return Sizes(B, T, Tk, P, H, D)


def check_frames(frames: Tensor, q: Tensor) -> None:
    """Check a frame table ``int32 [T, R]`` against ``q``."""
    check_tensor("frames", frames, 2, "[T, R]")
    check_dtype("frames", frames, torch.int32)
    check_device("frames", frames, q)
    if frames.shape[0] != q.shape[1] or frames.shape[1] < 1:
        raise ValueError(
            f"frames must be [T, R] with T = {q.shape[1]} rows (frames of q) and R >= 1, got {tuple(frames.shape)}"
        )


def check_frame_values(frames: Tensor, Tk: int) -> None:
    """Raise ValueError unless every entry of ``frames`` is -1 or a frame ``0..Tk-1``. Reads values."""
    low, high = int(frames.min()), int(frames.max())
    if low < -1 or high >= Tk:
        bad = low if low < -1 else high
        raise ValueError(f"frames holds {bad}, but entries must be -1 (absent) or 0..{Tk - 1}")


def check_trajectories(positions: Tensor, valid: Tensor, frames: Tensor, grid: tuple[int, int], q: Tensor) -> None:
    """Check ``positions [Bp, T, L, P, 2]``, ``valid [Bp, T, L, P]``, ``frames [T, L]`` against ``q``."""
    B, T, P = q.shape[0], q.shape[1], q.shape[2]
    Bp, L = positions.shape[0], positions.shape[2]
    if grid[0] * grid[1] != P:
        raise ValueError(
            f"trajectories live on a {grid[0]}x{grid[1]} grid ({grid[0] * grid[1]} sites), but q has P = {P} sites"
        )
    if positions.shape[1] != T:
        raise ValueError(f"trajectories cover {positions.shape[1]} frames, but q has T = {T}")
    if Bp < 1 or B % Bp != 0:
        raise ValueError(f"trajectories are for {Bp} clips, which does not divide B = {B} of q")
    check_shape("trajectories.positions", positions, (Bp, T, L, P, 2), "[Bp, T, L, P, 2]")
    check_shape("trajectories.valid", valid, (Bp, T, L, P), "[Bp, T, L, P]")
    check_shape("trajectories.frames", frames, (T, L), "[T, L]")
    for name, x in (("positions", positions), ("valid", valid), ("frames", frames)):
        check_device(f"trajectories.{name}", x, q)


def check_scale(scale: object, D: int) -> float:
    """Return the logit scale: ``D ** -0.5`` for None."""
    if scale is None:
        return float(D) ** -0.5
    if not isinstance(scale, (int, float)) or scale != scale or scale in (float("inf"), -float("inf")):
        raise ValueError(f"scale must be a finite number or None (D ** -0.5), got {scale!r}")
    return float(scale)


def refuse_double_backward(op: str) -> None:
    """Raise RuntimeError inside a backward that was asked for a graph: its result would count as constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: double backward (create_graph=True) is not supported by this backend; backend='reference' has it"
        )


def check_out(out: Tensor, q: Tensor, needs_grad: bool) -> None:
    """Check a caller's output tensor ``[B, T, P, H, D]``; it must not overlap itself or need a gradient."""
    check_tensor("out", out, 5, "[B, T, P, H, D]")
    check_shape("out", out, tuple(q.shape), "the shape of q")
    check_device("out", out, q)
    if out.dtype != q.dtype:
        raise TypeError(f"out is {out.dtype}, but q is {q.dtype}")
    if needs_grad or out.requires_grad:
        raise ValueError("out= does not record gradients: call under torch.no_grad(), or leave it out")
    if out.stride(4) != 1:
        raise ValueError(f"out's last axis must be dense (stride 1), got strides {tuple(out.stride())}")
    axes = sorted((st, n) for st, n in zip(out.stride(), out.shape, strict=True) if n > 1)
    span = 0
    for stride, size in axes:
        if stride <= span:
            raise ValueError(f"out overlaps itself (strides {tuple(out.stride())}): give it own memory")
        span += stride * (size - 1)
