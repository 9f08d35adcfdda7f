"""A spatial self-attention layer of one's own, for models that are built with this package from the start."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from zsvr_kernels import validation

NORMS = ("group", "layer")


class PlainAttention(nn.Module):
    """Spatial self-attention with norm, fused qkv projection, output projection and residual.

    Args: see `SLRAttention`.

    Shape:
        x: ``[N, C, Hg, Wg]`` or ``[N, P, C]``, the output alike.
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
    ) -> None:
        super().__init__()
        channels = validation.check_int("channels", channels, 1)
        num_heads = validation.check_int("num_heads", num_heads, 1)
        if head_dim is None:
            if channels % num_heads:
                raise ValueError(f"channels = {channels} is no multiple of num_heads = {num_heads}: give head_dim")
            head_dim = channels // num_heads
        self.channels, self.num_heads, self.residual = channels, num_heads, residual
        self.head_dim = validation.check_int("head_dim", head_dim, 1)
        inner = num_heads * self.head_dim
        if norm == "group":
            if channels % groups:
                raise ValueError(f"channels = {channels} is no multiple of groups = {groups}")
            self.norm: nn.Module = nn.GroupNorm(groups, channels, eps)
        elif norm == "layer":
            self.norm = nn.LayerNorm(channels, eps)
        elif norm is None:
            self.norm = nn.Identity()
        else:
            raise ValueError(f"norm must be one of {', '.join(NORMS)} or None, got {norm!r}")
        self.qkv = nn.Linear(channels, 3 * inner, bias=qkv_bias)
        self.proj = nn.Linear(inner, channels, bias=out_bias)

    def normalise(self, tokens: Tensor) -> Tensor:
        """Return normalised tokens ``[N, P, C]``."""
        if isinstance(self.norm, nn.GroupNorm):
            return self.norm(tokens.mT).mT
        return self.norm(tokens)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT if x.dim() == 4 else x
        q, k, v = self.qkv(self.normalise(tokens)).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        y = self.proj(y.transpose(1, 2).flatten(2))
        y = y.mT.reshape(x.shape) if x.dim() == 4 else y
        return x + y if self.residual else y
