"""Short-long-range attention as a function of tensors: cross-frame and trajectory attention, combined."""

from __future__ import annotations

import torch
from torch import Tensor

from zsvr_kernels import backends, serial, validation
from zsvr_kernels.merging import merge_attention
from zsvr_kernels.ops.cross_frame_attention import cross_frame_attention
from zsvr_kernels.ops.trajectory_attention import trajectory_attention
from zsvr_kernels.options import COMBINES
from zsvr_kernels.trajectories import Trajectories


def slr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: Tensor,
    trajectories: Trajectories | None,
    *,
    combine: str = "serial",
    blend: float = 0.5,
    scale: float | None = None,
    prefix: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Attend over a short range (all tokens of the listed frames) and a long range (the token's own trajectory).

    With ``X = cross_frame_attention(q, k, v, frames)`` and ``Tr(u) = trajectory_attention(q, k, u, trajectories)``:

    - ``"serial"``: ``Tr(X)``, weights from q and k, values from X;
    - ``"parallel"``: ``blend X + (1 - blend) Tr(v)``;
    - ``"joint"``: one softmax over the keys of both (a key that is in both counts twice);
    - ``"cross"``, ``"trajectory"``: X, ``Tr(v)``; ``"spatial"``: ordinary self-attention of every frame.

    A site whose trajectory reaches no other frame takes X in "parallel" and "joint". So with one frame, or with every
    frame listed alone and no trajectories, all but "trajectory" equal spatial self-attention.

    Args:
        q, k, v: ``[B, T, P, H, D]``, one floating dtype; any strides, D dense.
        frames: int32 ``[T, R]``; see `neighbors`.
        trajectories: for T frames and P - prefix sites; None: none, the result is X.
        combine, blend: as above.
        scale: factor on the logits; None means ``D ** -0.5``.
        prefix: tokens before the grid's, which have no trajectory and take X.
        backend: of both operators; see `explain`.

    Returns:
        ``[B, T, P, H, D]`` of q's dtype; differentiable in q, k, v.

    Raises:
        ValueError, TypeError: as the operators; an unknown ``combine``; "trajectory" without trajectories.

    Source: arXiv 2407.01960; serial combination as in FLATTEN (arXiv 2310.05922).

    Example:
        >>> q, k, v = torch.randn(3, 1, 8, 256, 4, 64).unbind(0)
        >>> flow = torch.zeros(1, 7, 2, 64, 64)
        >>> trajectories = zsvr_kernels.chain_links(zsvr_kernels.Links.from_flow(flow, flow, grid=(16, 16)))
        >>> zsvr_kernels.slr_attention(q, k, v, zsvr_kernels.neighbors(8), trajectories).shape
        torch.Size([1, 8, 256, 4, 64])
    """
    if combine not in COMBINES:
        raise ValueError(f"combine must be one of {', '.join(COMBINES)}, got {combine!r}")
    blend = validation.check_bound("blend", blend)
    if blend > 1:
        raise ValueError(f"blend must be within 0..1, got {blend}")
    prefix = validation.check_int("prefix", prefix, 0)
    q, k, v = backends.autocast(q, k, v)
    T = validation.check_qkv(q, k, v).T
    if k.shape[1] != T:
        raise ValueError(f"q has T = {T} frames, but k and v have {k.shape[1]}: SLR attention takes one clip")
    if combine == "trajectory" and trajectories is None:
        raise ValueError('combine="trajectory" needs trajectories, got None')
    if combine == "trajectory" and prefix:
        raise ValueError('combine="trajectory" has nothing to give the prefix tokens: use another, or prefix=0')
    if combine == "spatial":
        frames = torch.arange(T, dtype=torch.int32, device=q.device)[:, None]
    if trajectories is None or combine in ("cross", "spatial"):
        return cross_frame_attention(q, k, v, frames, scale=scale, backend=backend)

    if not isinstance(trajectories, Trajectories):
        raise TypeError(f"trajectories must be zsvr_kernels.Trajectories or None, got {type(trajectories).__name__}")
    if combine == "serial" and not prefix and (chosen := serial.takes(q, k, v, trajectories, backend)) is not None:
        validation.check_frames(frames, q)
        t = trajectories
        validation.check_trajectories(t.positions, t.valid, t.frames, t.grid, q)
        return serial.SerialFunction.apply(q, k, v, frames, t, validation.check_scale(scale, q.shape[-1]), chosen)
    q_grid, k_grid, v_grid = (x[:, :, prefix:] for x in (q, k, v))
    if combine == "trajectory":
        return trajectory_attention(q, k, v, trajectories, scale=scale, backend=backend)
    if combine == "joint":
        x, lse = cross_frame_attention(q, k, v, frames, scale=scale, return_lse=True, backend=backend)
        sampled, lse_sampled = trajectory_attention(
            q_grid, k_grid, v_grid, trajectories, scale=scale, return_lse=True, backend=backend
        )
        lse_sampled = lse_sampled.masked_fill(_isolated(trajectories, q.shape[0])[..., None], -torch.inf)
        y, _ = merge_attention(x[:, :, prefix:], lse[:, :, prefix:], sampled, lse_sampled)
    else:
        x = cross_frame_attention(q, k, v, frames, scale=scale, backend=backend)
        if combine == "serial":
            y = trajectory_attention(q_grid, k_grid, x[:, :, prefix:], trajectories, scale=scale, backend=backend)
        else:
            sampled = trajectory_attention(q_grid, k_grid, v_grid, trajectories, scale=scale, backend=backend)
            mixed = torch.lerp(sampled, x[:, :, prefix:], blend)
            y = torch.where(_isolated(trajectories, q.shape[0])[..., None, None], x[:, :, prefix:], mixed)
    return torch.cat((x[:, :, :prefix], y), 2) if prefix else y


def _isolated(trajectories: Trajectories, B: int) -> Tensor:  # bool [B, T, P]
    isolated = trajectories.isolated()
    return isolated.repeat(B // isolated.shape[0], 1, 1)
