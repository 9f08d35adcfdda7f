"""How this project decides that a kernel is right. Public, so that other backends can be held to the same rule.

The oracle is the reference in float64 on inputs already rounded to the tested dtype. The budget for a kernel's error
is twice the error of the plain same-dtype PyTorch computation, plus one rounding of the largest value:

    max|kernel - oracle| <= 2 (max|eager - oracle| + eps(dtype) max|oracle|)

and the same with the L2 norm. Gradients are also held to a direction (cosine) and a gain (signed bias): a gradient
that is one percent too long everywhere can hide below the other bounds. Nothing is tuned per test.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from zsvr_kernels import _native
from zsvr_kernels.sampling import Grid, bilinear_sample, sites
from zsvr_kernels.trajectories import Trajectories


@dataclass(frozen=True)
class Comparison:
    """Error measures of one tensor against the oracle, all in float64."""

    maximum: float  # max |x - oracle|
    norm: float  # L2 norm of x - oracle
    angle: float  # sine of the angle between x and oracle
    bias: float  # <x - oracle, oracle> / <oracle, oracle>: relative gain error, signed

    @classmethod
    def of(cls, x: Tensor, oracle: Tensor) -> Comparison:
        x, oracle = x.detach().double().flatten(), oracle.detach().double().flatten()
        if not x.numel():
            return cls(0.0, 0.0, 0.0, 0.0)
        error = x - oracle
        energy = float(oracle @ oracle)
        bias = float(error @ oracle) / energy if energy > 0 else 0.0
        residual = error - bias * oracle
        length = float(torch.linalg.vector_norm(x))
        angle = float(torch.linalg.vector_norm(residual)) / length if length > 0 else 0.0
        return cls(float(error.abs().max()), float(torch.linalg.vector_norm(error)), angle, bias)


def assert_within_budget(kernel: Tensor, oracle: Tensor, eager: Tensor, what: str, *, gradient: bool = False) -> None:
    """Raise AssertionError unless ``kernel`` is as close to ``oracle`` as the budget demands.

    Args:
        kernel: the result under test; its dtype sets eps.
        oracle: float64 result on the same rounded inputs.
        eager: the plain PyTorch result in the dtype under test.
        what: names the tensor in the message.
        gradient: also bound the angle and the signed bias.
    """
    if kernel.shape != oracle.shape:
        raise AssertionError(f"{what}: shape {tuple(kernel.shape)}, expected {tuple(oracle.shape)}")
    kernel, oracle, eager = kernel.detach(), oracle.detach(), eager.detach()
    infinite = ~torch.isfinite(oracle)
    if not torch.equal(kernel[infinite].double(), oracle[infinite].double()):
        raise AssertionError(f"{what}: infinities are not where the oracle has them")
    if not bool(torch.isfinite(kernel[~infinite]).all()):
        count = int((~torch.isfinite(kernel[~infinite])).sum())
        raise AssertionError(f"{what}: {count} values are NaN or infinite where the oracle is finite")
    kernel, oracle, eager = kernel[~infinite], oracle[~infinite], eager[~infinite]
    if not kernel.numel():
        return
    eps = torch.finfo(kernel.dtype).eps
    ours, theirs = Comparison.of(kernel, oracle), Comparison.of(eager, oracle)
    largest = float(oracle.abs().max())
    norm = float(torch.linalg.vector_norm(oracle.double()))
    # What rounding does to a gain: independent errors of one eps average out over the elements.
    gain = 4 * eps / math.sqrt(kernel.numel()) + 4 * torch.finfo(torch.float32).eps
    bounds = [
        ("max error", ours.maximum, 2 * (theirs.maximum + eps * largest)),
        ("L2 error", ours.norm, 2 * (theirs.norm + eps * norm)),
    ]
    if gradient:
        bounds.append(("angle", ours.angle, 2 * (theirs.angle + eps)))
        bounds.append(("signed bias", abs(ours.bias), 2 * (abs(theirs.bias) + gain)))
    for name, got, budget in bounds:
        if not got <= budget:
            raise AssertionError(
                f"{what}: {name} {got:.3e} exceeds the budget {budget:.3e} "
                f"(kernel {ours}, same-dtype eager {theirs}, largest value {largest:.3e})"
            )


def assert_best_sites(
    found: tuple[Tensor, Tensor],  # site int32 [N, P], score fp32 [N, P]
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,  # [N, P, C]
    centre: Tensor,  # int32 [N, P, 2]
    grid: Grid,
    radius: int,
    what: str,
) -> None:
    """Raise AssertionError unless a search found the best candidates: another site may win on a near tie only.

    Every candidate is compared in float64. The score of the site that was found is held to the budget, and no other
    candidate may be better by more than two such errors.
    """
    site, score = found
    N, P = site.shape
    if site.dtype != torch.int32 or score.dtype != torch.float32:
        raise AssertionError(f"{what}: sites are {site.dtype}, scores {score.dtype}")
    candidates = window_mask(centre, grid, radius)
    oracle = cosines(f_src.double(), f_dst.double())
    oracle = oracle.masked_fill(~candidates | oracle.isnan(), -torch.inf)
    best = oracle.max(-1).values
    index = site.long()[..., None]
    own = oracle.gather(-1, index)[..., 0]
    empty = best == -torch.inf
    if not torch.equal(index[empty][:, 0], candidates.int().argmax(-1)[empty]):
        raise AssertionError(f"{what}: where no candidate has a number, the lowest site must be found")
    if not bool((score[empty] == -torch.inf).all()):
        raise AssertionError(f"{what}: where no candidate has a number, the score must be -inf")
    if not bool((own[~empty] > -torch.inf).all()):
        raise AssertionError(f"{what}: a site outside the window, or without a number")
    tokens = f_dst.float().gather(1, index.expand(-1, -1, f_dst.shape[2]))
    eager = cosines(f_src.float().reshape(N * P, 1, -1), tokens.reshape(N * P, 1, -1))[:, 0].reshape(N, P)
    assert_within_budget(score, own, eager, f"{what}: score")
    if bool((~empty).any()):
        eps = torch.finfo(torch.float32).eps
        budget = 2 * (float((eager - own)[~empty].abs().max()) + eps * float(own[~empty].abs().max()))
        lost = float((best - own)[~empty].max())
        if not lost <= 2 * budget:
            raise AssertionError(f"{what}: a candidate is better by {lost:.3e}, budget {2 * budget:.3e}")


# ---- the same computations as plain PyTorch in the tested dtype ----


def cosines(f_src: Tensor, f_dst: Tensor) -> Tensor:
    """Return the definition's cosines ``[N, P, M]`` of every source token ``[N, P, C]`` with ``f_dst [N, M, C]``."""
    lengths = [torch.linalg.vector_norm(x, dim=-1).clamp(min=1e-6) for x in (f_src, f_dst)]
    return (f_src[:, :, None] * f_dst[:, None]).sum(-1) / (lengths[0][:, :, None] * lengths[1][:, None])


def window_mask(centre: Tensor, grid: Grid, radius: int) -> Tensor:
    """Return bool ``[N, P, P]``: which destination sites are candidates of which source token."""
    x = centre[..., 0].long().clamp(0, grid[1] - 1)
    y = centre[..., 1].long().clamp(0, grid[0] - 1)
    at = own_sites(grid).long()
    return ((at[:, 0] - x[..., None]).abs() <= radius) & ((at[:, 1] - y[..., None]).abs() <= radius)


def eager_cross_frame_attention(q: Tensor, k: Tensor, v: Tensor, frames: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cross-frame attention as one would write it, in the inputs' own dtype; rows must not be empty."""
    outputs, lses = [], []
    for i, row in enumerate(frames.tolist()):
        sources = [j for j in row if j >= 0]
        keys = k[:, sources].flatten(1, 2).transpose(1, 2)  # [B, H, n*P, D]
        values = v[:, sources].flatten(1, 2).transpose(1, 2)
        logits = (q[:, i].transpose(1, 2) * scale) @ keys.mT
        outputs.append((logits.softmax(-1) @ values).transpose(1, 2))
        lses.append(logits.logsumexp(-1).transpose(1, 2))
    return torch.stack(outputs, 1), torch.stack(lses, 1)


def eager_trajectory_attention(
    q: Tensor, k: Tensor, v: Tensor, trajectories: Trajectories, scale: float
) -> tuple[Tensor, Tensor]:
    """Trajectory attention as one would write it, in q's dtype; every query must have a live slot."""
    B, T, P, H, D = q.shape
    positions, valid = trajectories.positions, trajectories.valid
    Bp, L = positions.shape[0], positions.shape[2]
    outputs, lses = [], []
    for i in range(T):
        row = trajectories.frames[i].long()
        live = ((row >= 0)[:, None] & valid[:, i]).repeat(B // Bp, 1, 1)[:, None]  # [B, 1, L, P]
        where = positions[:, i].repeat(B // Bp, 1, 1, 1).reshape(B * L, P, 2)

        def sample(x: Tensor, row: Tensor = row, where: Tensor = where) -> Tensor:
            source = x[:, row.clamp(min=0)].reshape(B * L, P, H * D)
            return bilinear_sample(source, where, trajectories.grid).reshape(B, L, P, H, D)

        logits = scale * torch.einsum("bphd,blphd->bhlp", q[:, i], sample(k))
        logits = logits.masked_fill(~live, -torch.inf)
        outputs.append(torch.einsum("bhlp,blphd->bphd", logits.softmax(2), sample(v)))
        lses.append(logits.logsumexp(2).transpose(1, 2))
    return torch.stack(outputs, 1), torch.stack(lses, 1)


# ---- inputs that show mistakes ----


def random_frames(T: int, Tk: int, R: int, generator: torch.Generator) -> Tensor:
    """Return a frame table ``[T, R]`` with absent entries and duplicates, no row empty."""
    frames = torch.randint(-1, Tk, (T, R), dtype=torch.int32, generator=generator)
    frames[:, -1] = frames[:, -1].clamp(min=0)
    return frames


def random_trajectories(
    B: int, T: int, Tk: int, L: int, grid: Grid, generator: torch.Generator, *, dead: float = 0.3
) -> Trajectories:
    """Return trajectories whose positions are inside, on sites, on the border, half a pixel and far outside.

    Slot 0 is always live; of the others a share ``dead`` is not valid, and some are absent.
    """
    Hg, Wg = grid
    P = Hg * Wg
    span = torch.tensor((Wg + 3.0, Hg + 3.0))
    positions = torch.rand(B, T, L, P, 2, generator=generator) * span - 2.0
    kind = torch.rand(B, T, L, P, 1, generator=generator)
    positions = torch.where(kind < 0.25, positions.round(), positions)
    border = torch.tensor((Wg - 0.5, Hg - 0.5))
    positions = torch.where((kind > 0.25) & (kind < 0.3), border, positions)
    positions = torch.where((kind > 0.3) & (kind < 0.35), torch.tensor((-0.5, -0.5)), positions)
    positions = torch.where((kind > 0.35) & (kind < 0.4), torch.tensor((Wg - 1.0, 0.0)), positions)
    positions = torch.where((kind > 0.4) & (kind < 0.42), torch.tensor((1e6, -1e6)), positions)
    valid = torch.rand(B, T, L, P, generator=generator) >= dead
    valid[:, :, 0] = True
    frames = torch.randint(-1, Tk, (T, L), dtype=torch.int32, generator=generator)
    frames[:, 0] = frames[:, 0].clamp(min=0)
    return Trajectories.from_positions(positions, valid, frames, grid)


def own_sites(grid: Grid) -> Tensor:
    """Return the sites themselves as centres of search windows, int32 ``[P, 2]``."""
    return sites(grid).to(torch.int32)


def random_centres(N: int, grid: Grid, generator: torch.Generator) -> Tensor:
    """Return centres int32 ``[N, P, 2]``: mostly one offset from the own site, some apart from it, some far outside."""
    P = grid[0] * grid[1]
    common = torch.randint(-1, 2, (N, 1, 2), generator=generator)
    kind = torch.rand(N, P, 1, generator=generator)
    jitter = torch.randint(-2, 3, (N, P, 2), generator=generator)
    centre = own_sites(grid).long() + common + torch.where(kind < 0.15, jitter, 0)
    limits = torch.iinfo(torch.int32)
    wild = torch.tensor([limits.min, limits.max, -1, 1 << 20])[torch.randint(0, 4, (N, P, 2), generator=generator)]
    return torch.where(kind > 0.92, wild, centre).to(torch.int32)


def random_features(
    N: int, P: int, C: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # [N, P, C] both
    """Return source and destination tokens; a third of the source is a noisy copy of its destination."""
    f_src, f_dst = torch.randn(2, N, P, C, generator=generator)
    copied = torch.rand(N, P, 1, generator=generator) < 0.3
    return torch.where(copied, f_dst + 0.2 * f_src, f_src).to(dtype), f_dst.to(dtype)


@dataclass(frozen=True)
class Guarded:
    """A tensor view inside a larger buffer of sentinels, and what the buffer looked like before."""

    view: Tensor
    buffer: Tensor
    outside: Tensor  # bool, elements of the buffer that the view does not cover

    def assert_untouched(self, what: str = "the buffer") -> None:
        """Raise AssertionError if anything outside the view was written."""
        damaged = ~torch.isnan(self.buffer[self.outside])
        if bool(damaged.any()):
            raise AssertionError(f"{what}: {int(damaged.sum())} elements outside the view were written")


LAYOUTS = ("contiguous", "fused", "heads_first", "offset", "padded")


def guarded(x: Tensor, layout: str = "offset") -> Guarded:
    """Return a copy of tokens ``[B, T, P, H, D]`` as a view with other strides; all around it is NaN.

    Layouts: ``"contiguous"`` (at an odd offset); ``"fused"``: every site's row is part of a row of 3C as a fused
    qkv projection gives it; ``"heads_first"``: memory order B, T, H, P, D; ``"offset"``: frames apart in memory;
    ``"padded"``: heads apart.
    """
    T, P, H, D = x.shape[1:]
    if layout == "contiguous":
        strides = (T * P * H * D, P * H * D, H * D, D, 1)
    elif layout == "fused":
        strides = (T * P * 3 * H * D, P * 3 * H * D, 3 * H * D, D, 1)
    elif layout == "heads_first":
        strides = (T * H * P * D, H * P * D, D, P * D, 1)
    elif layout == "offset":
        frame = P * H * D + 24
        strides = (T * frame + 8, frame, H * D, D, 1)
    elif layout == "padded":
        strides = (T * P * H * (D + 8), P * H * (D + 8), H * (D + 8), D + 8, 1)
    else:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    span = sum(s * (n - 1) for s, n in zip(strides, x.shape, strict=True)) + 1
    offset = 13
    buffer = torch.full((offset + max(span, 1) + 64,), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer.as_strided(x.shape, strides, offset)
    covered = torch.zeros(buffer.shape, dtype=torch.bool, device=x.device)
    covered.as_strided(x.shape, strides, offset).fill_(True)
    view.copy_(x)
    return Guarded(view, buffer, ~covered)


# ---- surroundings ----


def _poison(x: Tensor) -> Tensor:
    if x.dtype.is_floating_point:
        return x.fill_(torch.nan)
    return x.fill_(True) if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max)


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within the context every uninitialised allocation from Python holds NaN (integers: the largest value)."""
    with contextlib.ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            original: Callable[..., Tensor] = getattr(owner, name)

            def allocate(*args: Any, original: Callable[..., Tensor] = original, **kwargs: Any) -> Tensor:
                return _poison(original(*args, **kwargs))

            stack.enter_context(mock.patch.object(owner, name, allocate))
        yield


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's number of threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def instruction_sets() -> list[str]:
    """Return the CPU kernels' instruction sets that this process can run, lowest first."""
    if not _native.is_available():
        return []
    native = _native.module()
    before = native.isa()
    usable = [name for name in native.compiled_isas().split(",") if native.set_isa(name)]
    native.set_isa(before)
    return usable


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Run CPU kernels with the given instruction set within the context."""
    native = _native.module()
    before = native.isa()
    if not native.set_isa(name):
        raise ValueError(f"instruction set {name!r} is not compiled in or not on this processor")
    try:
        yield
    finally:
        native.set_isa(before)
