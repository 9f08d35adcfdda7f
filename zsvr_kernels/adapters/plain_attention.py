"""This package's own `PlainAttention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zsvr_kernels.adapters.base import Adapter, to_tokens
from zsvr_kernels.plain import PlainAttention


class PlainAttentionAdapter(Adapter):
    """Norm, fused projection, output projection, residual."""

    kind = "PlainAttention"

    def __init__(self, module: PlainAttention) -> None:
        self.module: PlainAttention = module
        self.channels, self.heads, self.head_dim = module.channels, module.num_heads, module.head_dim

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return isinstance(module, PlainAttention)

    def begin(self, x: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        return self.module.normalise(to_tokens(x) if x.dim() == 4 else x).contiguous(), x

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.module.qkv(tokens).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        return q, k, v

    def finish(self, y: Tensor, state: Tensor) -> Tensor:
        y = self.module.proj(y.flatten(2))
        y = y.mT.reshape(state.shape) if state.dim() == 4 else y
        return state + y if self.module.residual else y
