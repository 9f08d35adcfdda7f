"""Calls of the operators with their oracles, at sizes that the device or the interpreter can bear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import zsvr_kernels as zk
from zsvr_kernels import testing
from zsvr_kernels.ops.cross_frame_attention import cross_frame_attention_reference
from zsvr_kernels.ops.trajectory_attention import trajectory_attention_reference

ATTENTIONS = ("cross_frame_attention", "trajectory_attention")


@dataclass(frozen=True)
class Attention:
    """An attention operator with its second kind of argument: a frame table, or trajectories."""

    name: str
    extra: Any

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Any:
        return getattr(zk, self.name)(q, k, v, self.extra, **{"backend": "triton", **keywords})

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scale = q.shape[-1] ** -0.5
        if self.name == "cross_frame_attention":
            return cross_frame_attention_reference(q, k, v, self.extra, scale)
        t = self.extra
        return trajectory_attention_reference(q, k, v, t.positions, t.valid, t.frames, t.grid, scale)

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(testing, f"eager_{self.name}")(q, k, v, self.extra, q.shape[-1] ** -0.5)


def sizes(device: torch.device) -> tuple[int, tuple[int, int], int]:
    """Return T, the grid and H."""
    return (3, (4, 5), 2) if device.type == "cpu" else (6, (13, 17), 3)


def attention(name: str, device: torch.device, T: int, grid: tuple[int, int], L: int = 3) -> Attention:
    generator = torch.Generator().manual_seed(3)
    if name == "cross_frame_attention":
        return Attention(name, testing.random_frames(T, T, 2, generator).to(device))
    return Attention(name, testing.random_trajectories(1, T, T, L, grid, generator).to(device))


def tokens(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(20240701)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]


def case(name: str, device: torch.device, dtype: torch.dtype, D: int = 64) -> tuple[Attention, list[Tensor]]:
    """Return an operator and q, k, v."""
    T, grid, H = sizes(device)
    return attention(name, device, T, grid), tokens(device, dtype, (1, T, grid[0] * grid[1], H, D))


def differentiate(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], weights: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Return o, lse, dq, dk, dv of a loss that reads both outputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    o, lse = function(*leaves)
    gradients = torch.autograd.grad((o, lse), leaves, [w.to(x.dtype) for w, x in zip(weights, (o, lse), strict=True)])
    return [o.detach(), lse.detach(), *gradients]


def weights(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights of o and of lse for `differentiate`, rounded to q's dtype."""
    generator = torch.Generator().manual_seed(5)
    made = [torch.randn(shape, generator=generator).to(q.device, q.dtype) for shape in (q.shape, q.shape[:4])]
    return made[0], made[1]


def step(function: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Return o, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = function(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, weight)]


def clip(device: torch.device, T: int, grid: tuple[int, int]) -> zk.Links:
    """Return links of a smooth flow with its occlusions."""
    generator = torch.Generator().manual_seed(11)
    coarse = 2 * torch.randn(T - 1, 2, 3, 4, generator=generator)
    flow = torch.nn.functional.interpolate(coarse, size=grid, mode="bilinear", align_corners=False)[None].to(device)
    return zk.Links.from_flow(flow, -flow, grid=grid, alpha=0.1, beta=0.5)
