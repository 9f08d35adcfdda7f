"""Checks of arguments, in one place: what was got, what was expected, what to do.

Every check reads metadata only (shape, stride, dtype, device), so it costs microseconds and traces under
torch.compile. Values (frame indices) are checked by the backends, next to where they are used.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

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


def check_device(name: str, x: Tensor, reference: Tensor, owner: str = "q") -> None:
    if x.device != reference.device:
        raise ValueError(f"{name} is on {x.device}, but {owner} is on {reference.device}: move one of them")


def check_one_device(*tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device: a fake must not answer for a mixed call."""
    devices = {x.device for x in tensors if x is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


def check_on_cpu(**tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor is a CPU tensor with memory behind it: its address goes to native code."""
    for name, x in tensors.items():
        if x is None:
            continue
        if x.device.type != "cpu":
            raise ValueError(f"{name} must be on cpu, got {x.device}")
        if x.numel() and not x.data_ptr():
            raise ValueError(f"{name} must have memory, got a storage of {x.untyped_storage().nbytes()} bytes")


def _check_beside(owner: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless every tensor is on the device of ``owner``; on the CPU, with memory behind it."""
    if owner.device.type == "cpu":
        check_on_cpu(**tensors)
        return
    for name, x in tensors.items():
        if x is not None:
            check_device(name, x, owner)


def check_int(name: str, value: object, minimum: int | None = None) -> int:
    """Return ``value`` as an int (NumPy's ints count, bools do not), at least ``minimum``."""
    if type(value) is not int:
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{name} must be an int, got {value!r}") from None
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_step(k: object, K: object) -> tuple[int, int]:
    """Return the index and the number of sampling steps, ``0 <= k < K``."""
    steps = check_int("K", K, 1)
    step = check_int("k", k, 0)
    if step >= steps:
        raise ValueError(f"k must be within 0..K-1 = 0..{steps - 1}, got {step}")
    return step, steps


LARGEST_WINDOW = 65535


def check_window(window: object) -> int | None:
    """Return the window of a chaining: None, or an int of 0 to `LARGEST_WINDOW` frames on either side."""
    if window is None:
        return None
    frames = check_int("window", window, 0)
    if frames > LARGEST_WINDOW:
        raise ValueError(f"window must be at most {LARGEST_WINDOW}, got {frames}; None reaches every frame")
    return frames


def _number(value: object) -> float | None:
    """Return a Python or NumPy number (bools are none) as a float, inf if it has no float; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_bound(name: str, value: object) -> float:
    """Return ``value`` as a float if it is a finite number of at least 0."""
    number = _number(value)
    if number is None:
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    return number


def check_grid(grid: object) -> tuple[int, int]:
    """Return ``grid`` as two positive ints ``(Hg, Wg)``, or raise."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise TypeError(f"grid must be two ints (Hg, Wg), got {grid!r}")
    return check_int("grid's Hg", grid[0], 1), check_int("grid's Wg", grid[1], 1)


def check_links(
    forward: Tensor,  # float32 [B, T-1, P, 2]
    backward: Tensor,  # float32 [B, T-1, P, 2]
    valid_forward: Tensor,  # bool [B, T-1, P]
    valid_backward: Tensor,  # bool [B, T-1, P]
    grid: object,
) -> tuple[int, int]:
    """Check the tensors of links against each other and the grid; return the grid.

    Raises:
        TypeError: not tensors, or dtypes other than float32 and bool; a grid that is not two ints.
        ValueError: ranks, shapes or devices that do not fit.
    """
    Hg, Wg = check_grid(grid)
    for name, x in (("forward", forward), ("backward", backward)):
        check_tensor(name, x, 4, "[B, T-1, P, 2]")
        check_dtype(name, x, torch.float32)
        expected = (forward.shape[0], forward.shape[1], Hg * Wg, 2)
        check_shape(name, x, expected, f"[B, T-1, P, 2] on a {Hg}x{Wg} grid")
        check_device(name, x, forward, "forward")
    for name, x in (("valid_forward", valid_forward), ("valid_backward", valid_backward)):
        check_tensor(name, x, 3, "[B, T-1, P]")
        check_dtype(name, x, torch.bool)
        check_shape(name, x, tuple(forward.shape[:3]), "[B, T-1, P] of forward")
        check_device(name, x, forward, "forward")
    return Hg, Wg


def check_flow(
    flow_forward: Tensor,  # [B, T-1, 2, Hi, Wi]
    flow_backward: Tensor,  # [B, T-1, 2, Hi, Wi]
    occ_forward: Tensor | None,  # bool [B, T-1, Hi, Wi]
    occ_backward: Tensor | None,  # bool [B, T-1, Hi, Wi]
) -> None:
    """Check optical flow and, if given, its occlusion against each other.

    Raises:
        TypeError: not tensors, or dtypes other than floating and bool.
        ValueError: ranks, shapes or devices that do not fit; one occlusion without the other.
    """
    for name, x in (("flow_forward", flow_forward), ("flow_backward", flow_backward)):
        check_tensor(name, x, 5, "[B, T-1, 2, Hi, Wi]")
        check_dtype(name, x, *FLOATS)
        if x.shape[2] != 2 or min(x.shape[3:]) < 1:
            raise ValueError(f"{name} must be [B, T-1, 2, Hi, Wi], got shape {tuple(x.shape)}")
    check_shape("flow_backward", flow_backward, tuple(flow_forward.shape), "as flow_forward")
    check_device("flow_backward", flow_backward, flow_forward, "flow_forward")
    if (occ_forward is None) != (occ_backward is None):
        raise ValueError("give both occ_forward and occ_backward, or neither")
    shape = (*flow_forward.shape[:2], *flow_forward.shape[3:])
    for name, occ in (("occ_forward", occ_forward), ("occ_backward", occ_backward)):
        if occ is not None:
            check_tensor(name, occ, 4, "[B, T-1, Hi, Wi]")
            check_dtype(name, occ, torch.bool)
            check_shape(name, occ, shape, "[B, T-1, Hi, Wi]")
            check_device(name, occ, flow_forward, "flow_forward")


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


def check_trajectory_fields(
    positions: Tensor,  # float32 [B, T, L, P, 2]
    valid: Tensor,  # bool [B, T, L, P]
    frames: Tensor,  # int32 [T, L]
    grid: object,
) -> tuple[int, int]:
    """Check the tensors of trajectories against each other and the grid; return the grid.

    Raises:
        TypeError: not tensors, or dtypes other than float32, bool and int32; a grid that is not two ints.
        ValueError: ranks, shapes or devices that do not fit, or an empty axis.
    """
    Hg, Wg = check_grid(grid)
    check_tensor("positions", positions, 5, "[B, T, L, P, 2]")
    check_dtype("positions", positions, torch.float32)
    B, T, L = positions.shape[:3]
    if min(B, T, L) < 1:
        raise ValueError(f"B, T and L must be at least 1, got positions {tuple(positions.shape)}")
    check_shape("positions", positions, (B, T, L, Hg * Wg, 2), f"[B, T, L, P, 2] on a {Hg}x{Wg} grid")
    check_tensor("valid", valid, 4, "[B, T, L, P]")
    check_dtype("valid", valid, torch.bool)
    check_shape("valid", valid, (B, T, L, Hg * Wg), "[B, T, L, P] of positions")
    check_device("valid", valid, positions, "positions")
    check_tensor("frames", frames, 2, "[T, L]")
    check_dtype("frames", frames, torch.int32)
    check_shape("frames", frames, (T, L), "[T, L] of positions")
    check_device("frames", frames, positions, "positions")
    return Hg, Wg


def check_trajectories(positions: Tensor, valid: Tensor, frames: Tensor, grid: tuple[int, int], q: Tensor) -> None:
    """Check ``positions [Bp, T, L, P, 2]``, ``valid [Bp, T, L, P]``, ``frames [T, L]`` also against ``q``."""
    Hg, Wg = check_trajectory_fields(positions, valid, frames, grid)
    B, T, P = q.shape[0], q.shape[1], q.shape[2]
    if Hg * Wg != P:
        raise ValueError(f"trajectories live on a {Hg}x{Wg} grid ({Hg * Wg} sites), but q has P = {P} sites")
    if positions.shape[1] != T:
        raise ValueError(f"trajectories cover {positions.shape[1]} frames, but q has T = {T}")
    if B % positions.shape[0] != 0:
        raise ValueError(f"trajectories are for {positions.shape[0]} clips, which does not divide B = {B} of q")
    check_device("trajectories.positions", positions, q)


def check_inverse(
    index: tuple[Tensor, Tensor, Tensor],  # int64 [B*Tk*P + 1], int32 [nnz], float32 [nnz]
    valid: Tensor,  # bool [B, T, L, P]
    Tk: int,
) -> None:
    """Check an inverse index of the corner gather; on the CPU values too: a kernel follows them as addresses.

    Elsewhere kernels hold themselves inside the index, and ``samples`` may go on behind the last row.
    """
    B, T, L, P = valid.shape
    for name, x, dtype in zip(
        ("offsets", "samples", "weights"), index, (torch.int64, torch.int32, torch.float32), strict=True
    ):
        check_tensor(name, x, 1, "[nnz]")
        check_dtype(name, x, dtype)
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(x.stride())}")
    offsets, samples, weights = index
    _check_beside(valid, offsets=offsets, samples=samples, weights=weights)
    check_shape("offsets", offsets, (B * Tk * P + 1,), "[B*Tk*P + 1]")
    check_shape("weights", weights, tuple(samples.shape), "as samples")
    if valid.device.type != "cpu":
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != samples.numel() or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"offsets must rise from 0 to the number of samples, {samples.numel()}")
    if samples.numel():
        low, high = (int(x) for x in samples.aminmax())
        if low < 0 or high >= T * L * P:
            raise ValueError(f"samples must be 0..{T * L * P - 1} (T*L*P - 1), got {low}..{high}")


def check_features(f_src: Tensor, f_dst: Tensor, grid: object) -> tuple[int, int]:
    """Check features ``[N, P, C]`` of frame pairs against each other and the grid; return the grid.

    Raises:
        TypeError: not tensors, or dtypes that differ or are not float32, bfloat16, float16, float64.
        ValueError: ranks, shapes or devices that do not fit, no channel, or channels that are not dense.
    """
    Hg, Wg = check_grid(grid)
    for name, x in (("f_src", f_src), ("f_dst", f_dst)):
        check_tensor(name, x, 3, "[N, P, C]")
        check_dtype(name, x, *FLOATS)
        check_shape(name, x, (f_src.shape[0], Hg * Wg, f_src.shape[2]), f"[N, P, C] on a {Hg}x{Wg} grid")
        check_device(name, x, f_src, "f_src")
        if x.dtype != f_src.dtype:
            raise TypeError(f"{name} is {x.dtype}, but f_src is {f_src.dtype}: cast them to one dtype")
        if x.shape[2] < 1:
            raise ValueError(f"{name} must have at least one channel, got shape {tuple(x.shape)}")
        if x.stride(2) != 1 and x.shape[2] != 1:
            raise ValueError(
                f"{name}'s last axis must be dense (stride 1), got strides {tuple(x.stride())}: call .contiguous()"
            )
    return Hg, Wg


def check_centre(centre: Tensor, f_src: Tensor) -> None:
    """Check window centres ``int32 [N, P, 2]`` against features ``[N, P, C]``."""
    check_tensor("centre", centre, 3, "[N, P, 2]")
    check_dtype("centre", centre, torch.int32)
    check_shape("centre", centre, (*f_src.shape[:2], 2), "[N, P, 2] of f_src")
    check_device("centre", centre, f_src, "f_src")


def check_link_positions(positions: Tensor, f_src: Tensor) -> None:
    """Check positions ``float32 [N, P, 2]`` against features ``[N, P, C]``."""
    check_tensor("positions", positions, 3, "[N, P, 2]")
    check_dtype("positions", positions, torch.float32)
    check_shape("positions", positions, (*f_src.shape[:2], 2), "[N, P, 2] of f_src")
    check_device("positions", positions, f_src, "f_src")


def check_radius(radius: object) -> int:
    """Return the radius of a search window: an int of 0 to `LARGEST_WINDOW`."""
    sites = check_int("radius", radius, 0)
    if sites > LARGEST_WINDOW:
        raise ValueError(f"radius must be at most {LARGEST_WINDOW}, got {sites}")
    return sites


def check_gradients(
    q: Tensor,  # [B, T, P, H, D]
    d_o: Tensor,  # [B, T, P, H, D]
    dlse: Tensor | None,  # floating [B, T, P, H]
    lse: Tensor,  # float32 [B, T, P, H]
    needs: tuple[bool, ...],
    wanted: int,
) -> None:
    """Check what a backward op gets beside its forward's inputs; ``needs`` has ``wanted`` entries."""
    check_tensor("d_o", d_o, 5, "[B, T, P, H, D]")
    check_dtype("d_o", d_o, q.dtype)
    check_shape("d_o", d_o, tuple(q.shape), "the shape of q")
    check_tensor("lse", lse, 4, "[B, T, P, H]")
    check_dtype("lse", lse, torch.float32)
    check_shape("lse", lse, tuple(q.shape[:4]), "[B, T, P, H] of q")
    if dlse is not None:
        check_tensor("dlse", dlse, 4, "[B, T, P, H]")
        check_dtype("dlse", dlse, *FLOATS)
        check_shape("dlse", dlse, tuple(q.shape[:4]), "[B, T, P, H] of q")
    _check_beside(q, d_o=d_o, dlse=dlse, lse=lse)
    if len(needs) != wanted:
        raise ValueError(f"needs must have {wanted} entries, got {len(needs)}")


def check_sum(name: str, target: Tensor, x: Tensor) -> None:
    """Check a gradient ``[B, T, P, H, D]`` that a kernel adds to: of x's shape, dtype and device, contiguous."""
    check_tensor(name, target, 5, "[B, T, P, H, D]")
    check_dtype(name, target, x.dtype)
    check_shape(name, target, tuple(x.shape), "the shape of what it is the gradient of")
    _check_beside(x, **{name: target})
    if not target.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tuple(target.stride())}")


def check_scale(scale: object, D: int) -> float:
    """Return the logit scale: ``D ** -0.5`` for None."""
    if scale is None:
        return float(D) ** -0.5
    number = _number(scale)
    if number is None or not abs(number) < math.inf:
        raise ValueError(f"scale must be a finite number or None (D ** -0.5), got {scale!r}")
    return number


def refuse_double_backward(op: str) -> None:
    """Raise RuntimeError inside a backward that was asked for a graph: its result would count as constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op}: double backward (create_graph=True) is not supported by this backend; backend='reference' has it"
        )


def _addresses(x: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor's elements and the one after the last."""
    if not x.numel():
        return 0, 0
    span = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + span * x.element_size()


def check_out(out: Tensor, q: Tensor, needs_grad: bool, inputs: dict[str, Tensor]) -> None:
    """Check a caller's output tensor ``[B, T, P, H, D]``: it overlaps neither itself nor an input, needs no gradient.

    ``inputs`` are the tensors the call reads, by name. Memory is compared by range: views that interleave count as
    overlapping.
    """
    check_tensor("out", out, 5, "[B, T, P, H, D]")
    check_shape("out", out, tuple(q.shape), "the shape of q")
    check_device("out", out, q)
    if out.dtype != q.dtype:
        device = q.device.type
        cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        raise TypeError(f"out is {out.dtype}, but q is {q.dtype}" + (" under autocast" if cast else ""))
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
    if torch.compiler.is_compiling() or isinstance(out, FakeTensor):
        return  # no addresses to compare
    first, stop = _addresses(out)
    for name, x in inputs.items():
        begin, end = _addresses(x)
        if begin < stop and first < end:
            raise ValueError(f"out overlaps {name} in memory: give it own memory")
