"""Short-long-range attention: cross-frame attention and trajectory attention in place of spatial self-attention."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zsvr_kernels import backends, serial, validation
from zsvr_kernels.adapters import Adapter, adapt
from zsvr_kernels.context import VideoContext
from zsvr_kernels.merging import merge_attention
from zsvr_kernels.ops.cross_frame_attention import cross_frame_attention
from zsvr_kernels.ops.trajectory_attention import trajectory_attention
from zsvr_kernels.options import COMBINES, SLROptions
from zsvr_kernels.plain import PlainAttention
from zsvr_kernels.sampling import Grid
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


_numbers = itertools.count()


class SLRAttention(nn.Module):
    """A self-attention layer that attends across the frames of a clip.

    Without a `VideoContext` it is the spatial self-attention it stands for. With one, frames are folded into the batch,
    clip by clip (``[B*T, ...]``; with classifier-free guidance the branches outermost, ``[G*B*T, ...]``), and every
    frame's tokens attend as `slr_attention` says with the context's frame table, trajectories and options.

    Args:
        channels: C of the input.
        num_heads: H.
        head_dim: D; None means ``channels // num_heads``.
        norm: ``"group"``, ``"layer"`` or None, before the projections.
        groups, eps: of the norm.
        qkv_bias, out_bias: biases of the projections.
        residual: add the input to the output.
        prefix: tokens before the grid's in a token sequence; see `SLROptions`.
        name: under which the context keeps this layer's history; None: a number of this process. Give one where
            the history is to outlive it (`VideoContext.save`).

    Shape:
        x: ``[N, C, Hg, Wg]`` or ``[N, P, C]``, the output alike. For tokens the grid is ``grid``, or the context's
        `VideoContext.grid_of`.

    Example:
        >>> layer = zsvr_kernels.SLRAttention(64, 4)
        >>> flow = torch.zeros(1, 7, 2, 64, 64)
        >>> layer(torch.randn(8, 64, 16, 16), zsvr_kernels.VideoContext(flow, flow)).shape
        torch.Size([8, 64, 16, 16])
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        norm: str | None = "group",
        groups: int = 32,
        eps: float = 1e-5,
        qkv_bias: bool = True,
        out_bias: bool = True,
        residual: bool = True,
        prefix: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.attention: nn.Module = PlainAttention(
            channels,
            num_heads,
            head_dim=head_dim,
            norm=norm,
            groups=groups,
            eps=eps,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            residual=residual,
        )
        self._adopt(prefix, name)

    def _adopt(self, prefix: int, name: str | None, qkv_order: str | None = None) -> None:
        self._qkv_order = qkv_order
        self._adapter = adapt(self.attention, qkv_order=qkv_order)
        self.prefix = validation.check_int("prefix", prefix, 0)
        self._is_named = name is not None
        self.name = f"slr{next(_numbers)}" if name is None else name

    @property
    def adapter(self) -> Adapter:
        """What takes the attention apart."""
        if self._adapter.module is not self.attention:  # replaced by another, or this layer is a replica
            self._adapter = adapt(self.attention, qkv_order=self._qkv_order)
        return self._adapter

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self._is_named:  # a copy keeps its own history
            self.name = f"slr{next(_numbers)}"

    @classmethod
    def from_attention(
        cls, module: nn.Module, *, prefix: int = 0, name: str | None = None, qkv_order: str | None = None
    ) -> SLRAttention:
        """Make the layer from an existing self-attention; weights are shared, not copied.

        Args:
            module: diffusers ``Attention``, guided-diffusion ``AttentionBlock``, CompVis/LDM ``CrossAttention`` used as
                self-attention, timm ``Attention``, ``torch.nn.MultiheadAttention``, or `PlainAttention`.
            prefix, name: as in the constructor.
            qkv_order: of a guided-diffusion block, ``"legacy"`` (per head q, k, v) or ``"new"``; None: told by the
                class of its ``attention``.

        Raises:
            TypeError: not an attention this package knows; the message lists what it knows.
            ValueError: a known one that cannot be replaced, and why (cross-attention, added key-value projections).
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.attention = module
        layer._adopt(prefix, name, qkv_order)
        return layer

    def extra_repr(self) -> str:
        a = self.adapter
        return f"{a.kind}, channels={a.channels}, heads={a.heads}, head_dim={a.head_dim}, name={self.name!r}"

    def forward(self, x: Tensor, context: VideoContext | None = None, *, grid: Grid | None = None) -> Tensor:
        """Return the layer's output for ``x [N, C, Hg, Wg]`` or ``[N, P, C]``; N is a multiple of the context's T."""
        return attend(self.adapter, x, context, grid=grid, prefix=self.prefix, name=self.name)


def attend(
    adapter: Adapter,
    x: Tensor,  # [N, C, Hg, Wg] or [N, P, C]
    context: VideoContext | None,
    *,
    grid: Grid | None,
    prefix: int,
    name: str,
    **inputs: Any,
) -> Tensor:
    """Run an attention layer with SLR attention at its heart; ``inputs`` go to the adapter's `Adapter.begin`."""
    rank = 4 if isinstance(x, Tensor) and x.dim() == 4 else 3
    validation.check_tensor("x", x, rank, "[N, C, Hg, Wg] or [N, P, C]")
    if context is not None and not isinstance(context, VideoContext):
        raise TypeError(f"context must be zsvr_kernels.VideoContext or None, got {type(context).__name__}")
    if context is None:
        table = torch.zeros(1, 1, dtype=torch.int32, device=x.device)
        plan = _Plan((x.shape[0], 1), grid, "spatial", 0.5, "auto", 0, table, False, False)
    else:
        plan = _plan(context, tuple(x.shape), x.device, grid, prefix)
    tokens, state = adapter.begin(x, **inputs)  # [N, P, C]
    q, k, v = (y.unflatten(0, plan.batch) for y in adapter.project(tokens))  # [B, T, P, H, D]
    trajectories = None
    if context is not None and plan.needs_trajectories:
        trajectories = _trajectories(
            context,
            name,
            plan.grid,
            x.device,
            _features(context, tokens, k, plan.prefix) if plan.uses_features else None,
        )
    del tokens  # where nothing is saved for a backward, each del gives its memory to what follows
    y = slr_attention(
        q,
        k,
        v,
        plan.table,
        trajectories,
        combine=plan.combine,
        blend=plan.blend,
        scale=adapter.scale,
        prefix=plan.prefix if trajectories is not None else 0,
        backend=plan.backend,
    )
    del q, k, v
    return adapter.finish(y.flatten(0, 1), state)


class _Plan(NamedTuple):
    """What one call of a layer does."""

    batch: tuple[int, int]  # clips (with guidance branches), frames
    grid: Grid | None
    combine: str
    blend: float
    backend: str
    prefix: int
    table: Tensor  # int32 [T, R]
    needs_trajectories: bool
    uses_features: bool


@torch.compiler.disable
def _plan(context: VideoContext, shape: tuple[int, ...], device: torch.device, grid: Grid | None, prefix: int) -> _Plan:
    options = context.options
    prefix = max(prefix, options.prefix) if len(shape) == 3 else 0
    combine = options.combine if options.is_active(context.progress) else "spatial"
    # One frame has no other to reach: serial, parallel and joint are then the short range alone.
    needs = (combine in ("serial", "parallel", "joint") and context.frames > 1) or combine == "trajectory"
    if grid is not None:
        grid = validation.check_grid(grid)
    if len(shape) == 4:
        if grid not in (None, shape[2:]):
            raise ValueError(f"grid is {grid}, but x has shape {shape}")
        grid = (shape[2], shape[3])
    elif grid is None and needs:
        grid = context.grid_of(shape[1] - prefix)
    elif grid is not None and grid[0] * grid[1] != shape[1] - prefix:
        raise ValueError(
            f"grid {grid[0]}x{grid[1]} has {grid[0] * grid[1]} sites, but x has {shape[1] - prefix} tokens"
        )
    return _Plan(
        (clips_of(shape[0], context), context.frames),
        grid,
        combine,
        options.blend,
        options.backend,
        prefix,
        context.table(device),
        needs,
        needs and context.uses_features(),
    )


def needs_grid(options: SLROptions) -> bool:
    """Return whether a layer must know its token grid."""
    return options.combine not in ("cross", "spatial")


def clips_of(N: int, context: VideoContext) -> int:
    """Return how many clips (with guidance branches) a batch of N frames holds, or raise ValueError."""
    T, B = context.frames, context.clips
    if N == 0 or N % T:
        raise ValueError(
            f"a batch of {N} frames is not a whole number of clips of T = {T} frames: frames are folded into the batch "
            "clip by clip, [B*T, ...]"
        )
    if (N // T) % B:
        raise ValueError(
            f"a batch of {N} frames holds {N // T} clips of T = {T}, which is no multiple of the context's B = {B}"
        )
    return N // T


def _features(context: VideoContext, tokens: Tensor, k: Tensor, prefix: int) -> Tensor:
    """Return what links are corrected by, ``[B, T, P, C]`` of the conditional branch."""
    options = context.options
    features = k.flatten(3) if options.correct.feature == "keys" else tokens.unflatten(0, (-1, context.frames))
    branches = features.detach()[:, :, prefix:].unflatten(0, (-1, context.clips))  # [G, B, T, P, C]
    if not -branches.shape[0] <= options.conditional < branches.shape[0]:
        raise ValueError(f"conditional = {options.conditional}, but the batch has {branches.shape[0]} branches")
    return branches[options.conditional]


@torch.compiler.disable
def _trajectories(
    context: VideoContext, name: str, grid: Grid | None, device: torch.device, features: Tensor | None
) -> Trajectories:
    assert grid is not None
    return context.trajectories(grid, device) if features is None else context.corrected(name, grid, features)
