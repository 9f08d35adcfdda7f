"""Temporal consistency guidance: gradients that pull frames towards their neighbours, warped by optical flow.

Pixel level, with ``d_ij = x_i - W(x_j, F_ij)`` for neighbours j of i, and masks M_ij of where the flow can be trusted:

    L = sum_i sum_j 1/N_el sum_pixels,channels M_ij (d_ij / 2)^2
    shift_i = -gain (sum_j M_ij d_ij - sum_{j: i neighbour of j} W_ji^T (M_ji d_ji)) = -2 gain N_el dL/dx_i

Other norms put phi(d) for d, the derivative of a robust loss. Source: the idea of Cao et al. 2024, "Zero-Shot Video
Restoration and Enhancement Using Pre-Trained Image Diffusion Model"; the formulas are this project's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zsvr.temporal.settings import GuidanceOptions
from zsvr_kernels.sampling import sites, warp

L1_STEP = 4 / 255  # phi of the l1 norm, in the model's range
CHARBONNIER_WIDTH = 0.1
STEPS = 1000  # for which the gain is meant
LARGEST_GAIN = 1 / 8  # for shift-like flows the map in brackets has eigenvalues below 8: steps do not overshoot

ImageEncoder = Callable[[Tensor], Tensor]  # frames [T, 3, H, W] in [0, 1] -> embeddings [T, E]


def effective_gain(gain: float, steps: int, *, detach_neighbor: bool = False) -> float:
    """Return the gain at each of ``steps`` sampling steps: ``min(gain 1000/steps, 1/8)``, 1/4 without the transpose."""
    return min(gain * STEPS / steps, 2 * LARGEST_GAIN if detach_neighbor else LARGEST_GAIN)


def transposed_warp(field: Tensor, displacement: Tensor) -> Tensor:
    """Apply the transpose of `zsvr_kernels.sampling.warp`: scatter ``field`` to where ``displacement`` points.

    ``<transposed_warp(a, F), b> = <a, warp(b, F)>``. Sums have a fixed order, on GPUs too.

    Args:
        field: ``[N, C, Hc, Wc]``. displacement: ``[N, 2, Hc, Wc]`` (dx, dy) in pixels.
    """
    Hc, Wc = field.shape[2:]
    P = Hc * Wc
    where = sites((Hc, Wc), dtype=displacement.dtype, device=field.device) + displacement.flatten(2).mT
    x, y = where[..., 0].clamp(0, Wc - 1), where[..., 1].clamp(0, Hc - 1)
    left, top = x.floor(), y.floor()
    fx, fy = (x - left).to(field.dtype), (y - top).to(field.dtype)
    x0, y0 = left.long(), top.long()
    x1, y1 = (x0 + 1).clamp(max=Wc - 1), (y0 + 1).clamp(max=Hc - 1)
    index = torch.cat((y0 * Wc + x0, y0 * Wc + x1, y1 * Wc + x0, y1 * Wc + x1), 1)  # [N, 4 P]
    weight = torch.cat(((1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy), 1)
    values = weight[:, None] * field.flatten(2).repeat(1, 1, 4)  # [N, C, 4 P]
    add = _add_by_line if field.device.type == "cpu" else _add_sorted
    return add(index, values, P).reshape(field.shape)


def _add_by_line(index: Tensor, values: Tensor, P: int) -> Tensor:
    """Add ``values [N, C, M]`` at ``index [N, M]``, ``[N, C, P]``. On CPUs one thread owns a line."""
    N, C, M = values.shape
    return values.new_zeros(N, C, P).scatter_add_(2, index[:, None].expand(N, C, M), values)


def _add_sorted(index: Tensor, values: Tensor, P: int) -> Tensor:
    """Do the same on GPUs, where ``index_put_`` sorts before it adds, and ``scatter_add_`` adds in any order."""
    N, C, M = values.shape
    rows = (index + P * torch.arange(N, device=index.device)[:, None]).flatten()
    out = values.new_zeros(N * P, C).index_put_((rows,), values.mT.reshape(N * M, C), accumulate=True)
    return out.reshape(N, P, C).mT


class _Warp(torch.autograd.Function):
    """`warp`, whose backward is `transposed_warp`."""

    @staticmethod
    def forward(ctx: Any, field: Tensor, displacement: Tensor) -> Tensor:
        ctx.save_for_backward(displacement)
        return warp(field, displacement)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (displacement,) = ctx.saved_tensors
        return transposed_warp(gradient, displacement), None


def influence(d: Tensor, norm: str) -> Tensor:
    """Return phi(d): ``d`` (l2), ``(4/255) sign(d)`` (l1), ``d / sqrt(1 + (d/0.1)^2)`` (charbonnier)."""
    if norm == "l2":
        return d
    if norm == "l1":
        return L1_STEP * d.sign()
    return d / (1 + (d / CHARBONNIER_WIDTH).square()).sqrt()


def _loss(d: Tensor, norm: str) -> Tensor:
    """Return the loss of which phi is the derivative."""
    if norm == "l2":
        return d.square() / 2
    if norm == "l1":
        return L1_STEP * d.abs()
    return CHARBONNIER_WIDTH**2 * ((1 + (d / CHARBONNIER_WIDTH).square()).sqrt() - 1)


def _pairs(
    x0: Tensor,
    flow_forward: Tensor,
    flow_backward: Tensor,
    reliable_forward: Tensor,
    reliable_backward: Tensor,
    neighbors: Sequence[int],
) -> list[tuple[Any, Any, Tensor, Tensor]]:
    """Return for each direction: rows of i, rows of j, the flow from i to j, and its mask ``[T-1, 1, Hc, Wc]``."""
    T, _, Hc, Wc = x0.shape
    earlier, later = slice(0, T - 1), slice(1, T)
    every = [
        (1, earlier, later, flow_forward, reliable_forward),
        (-1, later, earlier, flow_backward, reliable_backward),
    ]
    chosen = []
    for offset, i, j, flow, reliable in every:
        if offset not in neighbors:
            continue
        if flow.shape != (T - 1, 2, Hc, Wc) or reliable.shape != (T - 1, Hc, Wc):
            raise ValueError(
                f"for frames {tuple(x0.shape)} flow must be [{T - 1}, 2, {Hc}, {Wc}] and its mask without the 2, got "
                f"{tuple(flow.shape)} and {tuple(reliable.shape)}"
            )
        chosen.append((i, j, flow, reliable[:, None]))
    return chosen


def consistency_loss(
    x0: Tensor,
    flow_forward: Tensor,
    flow_backward: Tensor,
    reliable_forward: Tensor,
    reliable_backward: Tensor,
    *,
    neighbors: Sequence[int] = (-1, 1),
    norm: str = "l2",
    detach_neighbor: bool = False,
) -> Tensor:
    """Return the loss L of the module's docstring, a scalar; differentiable in x0.

    Args:
        x0: ``[T, C, Hc, Wc]``, in the model's range.
        flow_forward: ``[T-1, 2, Hc, Wc]``, finite, in pixels, from frame i to i+1. flow_backward: from i+1 to i.
        reliable_forward, reliable_backward: bool ``[T-1, Hc, Wc]``, where the flow can be trusted.
        neighbors, norm, detach_neighbor: see `GuidanceOptions`.
    """
    elements = x0[0].numel()
    total = x0.new_zeros(())
    for i, j, flow, mask in _pairs(x0, flow_forward, flow_backward, reliable_forward, reliable_backward, neighbors):
        other = x0[j].detach() if detach_neighbor else x0[j]
        d = x0[i] - _Warp.apply(other, flow)
        total = total + _loss(d, norm).masked_fill(~mask, 0.0).sum() / (2 * elements)
    return total


@torch.no_grad()
def consistency_shift(
    x0: Tensor,
    flow_forward: Tensor,
    flow_backward: Tensor,
    reliable_forward: Tensor,
    reliable_backward: Tensor,
    *,
    gain: float,
    neighbors: Sequence[int] = (-1, 1),
    norm: str = "l2",
    detach_neighbor: bool = False,
) -> Tensor:
    """Return the shift of the module's docstring, ``[T, C, Hc, Wc]``; arguments as in `consistency_loss`."""
    shift = torch.zeros_like(x0)
    for i, j, flow, mask in _pairs(x0, flow_forward, flow_backward, reliable_forward, reliable_backward, neighbors):
        pull = influence(x0[i] - warp(x0[j], flow), norm).masked_fill(~mask, 0.0)
        shift[i] -= gain * pull
        if not detach_neighbor:
            shift[j] += gain * transposed_warp(pull, flow)
    return shift


def blend_with_previous(x0: Tensor, flow_backward: Tensor, reliable_backward: Tensor) -> Tensor:
    """Return x0 with each frame, in order, replaced by the warped previous one where its flow can be trusted.

    ``x_i := M W(x_{i-1}, F_{i,i-1}) + (1 - M) x_i``, x_{i-1} already blended; differentiable in x0. Arguments as in
    `consistency_loss`.
    """
    blended = list(x0[:1])
    for i in range(1, len(x0)):
        before = _Warp.apply(blended[-1][None], flow_backward[i - 1 : i])[0]
        blended.append(torch.where(reliable_backward[i - 1], before, x0[i]))
    return torch.stack(blended)


class ConsistencyGuidance:
    """The guidance of one window of frames: what the sampler adds at each step.

    Args:
        options: see `GuidanceOptions`.
        flow_forward, flow_backward: ``[T-1, 2, Hc, Wc]`` on the canvas that is denoised, in its pixels.
        reliable_forward, reliable_backward: bool ``[T-1, Hc, Wc]``.
        ids: absolute numbers of the frames; pairs that are not adjacent do not pull at each other. None: all are.
        encoder: image encoder of the semantic level; required if the options switch it on.
        decode: gives frames in [-1, 1] for what is denoised, for the semantic level of a latent model. None: identity.

    Raises:
        ValueError: shapes that do not fit, or the semantic level without an encoder.
    """

    def __init__(
        self,
        options: GuidanceOptions,
        flow_forward: Tensor,
        flow_backward: Tensor,
        reliable_forward: Tensor,
        reliable_backward: Tensor,
        *,
        ids: Sequence[int] | None = None,
        encoder: ImageEncoder | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if options.is_semantic_on and encoder is None:
            raise ValueError("guidance.clip asks for the semantic level: give its image encoder")
        if flow_forward.dim() != 4 or flow_forward.shape != flow_backward.shape or flow_forward.shape[1] != 2:
            raise ValueError(
                f"flows must both be [T-1, 2, Hc, Wc], got {tuple(flow_forward.shape)} and {tuple(flow_backward.shape)}"
            )
        T = flow_forward.shape[0] + 1
        numbers = torch.arange(T) if ids is None else torch.as_tensor(ids)
        if numbers.shape != (T,):
            raise ValueError(f"ids must be {T} numbers, one per frame, got {list(ids or [])}")
        self.options = options
        self.encoder = encoder
        self.decode = decode
        self.adjacent = (numbers.diff() == 1).to(flow_forward.device)  # bool [T-1]
        masks = []
        for flow, mask in ((flow_forward, reliable_forward), (flow_backward, reliable_backward)):
            masks.append(mask & self.adjacent[:, None, None] & torch.isfinite(flow).all(1))
        self._fields = (flow_forward.nan_to_num(0, 0, 0), flow_backward.nan_to_num(0, 0, 0), *masks)

    def _acts(self, k: int, steps: int, target: str) -> tuple[bool, bool]:
        options = self.options
        if options.target != target or not options.is_active(k / steps) or not len(self.adjacent):
            return False, False
        return options.is_pixel_on, options.is_semantic_on and k % options.sem_every == 0

    def needs_network_gradient(self, k: int, steps: int) -> bool:
        """Return whether `shift_through` at step k of ``steps`` needs the network's graph."""
        return any(self._acts(k, steps, "x"))

    def _pixel_options(self) -> dict[str, Any]:
        return {name: getattr(self.options, name) for name in ("neighbors", "norm", "detach_neighbor")}

    def _finish(self, shift: Tensor, held: Tensor | None, variance: float) -> Tensor:
        if self.options.scale_by_variance:
            shift = shift * variance
        return shift if held is None else shift.masked_fill(held[:, None, None, None], 0.0)

    def shift(self, x0: Tensor, k: int, steps: int, *, held: Tensor | None = None, variance: float = 1.0) -> Tensor:
        """Return what is added to the clean estimate (or, by the host, to the mean) at step k of ``steps``.

        Args:
            x0: ``[T, C, Hc, Wc]``.
            held: bool ``[T]``, frames that pull at others but are not shifted themselves.
            variance: posterior variance of the step, used if ``scale_by_variance``.

        Returns:
            like x0; zero where guidance is off at this step, or acts on the sample.
        """
        pixel, semantic = self._acts(k, steps, "x0")
        options = self.options
        total = torch.zeros_like(x0)
        if pixel:
            gain = effective_gain(options.gain, steps, detach_neighbor=options.detach_neighbor)
            total += consistency_shift(x0.detach(), *self._fields, gain=gain, **self._pixel_options())
        if semantic:
            with torch.inference_mode(False), torch.enable_grad():
                leaf = x0.detach().clone().requires_grad_(True)
                distances = self._distances(leaf)
                (gradient,) = torch.autograd.grad(distances.sum(), leaf)
            total += self._semantic(gradient, distances)
        return self._finish(total, held, variance)

    def shift_through(
        self, x: Tensor, x0: Tensor, k: int, steps: int, *, held: Tensor | None = None, variance: float = 1.0
    ) -> Tensor:
        """Return what is added to the sample after step k: the losses at x0, differentiated in x through the network.

        Args:
            x: ``[T, C, Hc, Wc]``, the network's input; requires a gradient.
            x0: the clean estimate, a function of x. Its graph is kept.
            held, variance: as in `shift`.

        Returns:
            like x; zero where guidance is off at this step, or acts on the clean estimate.
        """
        pixel, semantic = self._acts(k, steps, "x")
        options = self.options
        total = torch.zeros_like(x, requires_grad=False)
        if pixel:
            gain = effective_gain(options.gain, steps, detach_neighbor=options.detach_neighbor)
            loss = consistency_loss(x0, *self._fields, **self._pixel_options())
            (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
            total -= 2 * gain * x0[0].numel() * gradient
        if semantic:
            distances = self._distances(x0)
            (gradient,) = torch.autograd.grad(distances.sum(), x, retain_graph=True)
            total += self._semantic(gradient, distances)
        return self._finish(total, held, variance)

    def blend(self, x0: Tensor, k: int, steps: int) -> Tensor:
        """Return x0 blended with warped previous frames while progress is below ``x0_blend``, else x0 itself."""
        if k / steps >= self.options.x0_blend or not len(self.adjacent):
            return x0
        return blend_with_previous(x0, self._fields[1], self._fields[3])

    def _distances(self, x0: Tensor) -> Tensor:
        """Return ``1 - cos(E_i, E_{i+1})`` of each pair, ``[T-1]``, zero where frames are not adjacent."""
        assert self.encoder is not None
        frames = x0 if self.decode is None else self.decode(x0)
        embedded = self.encoder(((frames + 1) / 2).clamp(0, 1)).float()
        cosine = torch.nn.functional.cosine_similarity(embedded[:-1], embedded[1:], dim=-1)
        return (1 - cosine).masked_fill(~self.adjacent.clone(), 0.0)  # autograd keeps nothing of inference mode

    def _semantic(self, gradient: Tensor, distances: Tensor) -> Tensor:
        options = self.options
        if not options.sem_normalize:
            return -options.sem_gain * gradient
        ends = distances.detach(), self.adjacent.to(distances.dtype)
        sums, counts = (torch.nn.functional.pad(v, (1, 0)) + torch.nn.functional.pad(v, (0, 1)) for v in ends)
        mean = (sums / counts.clamp(min=1)).to(gradient.dtype)[:, None, None, None]
        rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
        return -options.sem_gain * mean * gradient / (rms + 1e-12)
