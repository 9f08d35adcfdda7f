"""``torch.nn.MultiheadAttention`` used as self-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from zsvr_kernels.adapters.base import Adapter, Run, check_no_more


class TorchMultihead(Adapter):
    """One packed projection of q, k, v, and an output projection. As a layer it takes and gives ``[N, P, C]``.

    In place it keeps the module's own layout (``batch_first`` or not) and returns ``(output, None)``: attention weights
    over all frames are never formed.
    """

    kind = "torch MultiheadAttention"

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module: nn.MultiheadAttention = module
        self.heads = module.num_heads
        self.channels = module.embed_dim
        self.head_dim = module.head_dim

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention)

    @classmethod
    def refusal(cls, module: Any, name: str = "") -> str | None:
        if module.in_proj_weight is None:
            return f"its keys and values have {module.kdim} and {module.vdim} channels, its queries {module.embed_dim}"
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            return "it adds keys of its own (add_bias_kv or add_zero_attn)"
        return None

    def begin(self, x: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        if x.dim() != 3:
            raise ValueError(f"{self.kind} takes tokens [N, P, C], got shape {tuple(x.shape)}")
        return x, None

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = F.linear(tokens, self.module.in_proj_weight, self.module.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        return q, k, v

    def finish(self, y: Tensor, state: Any) -> Tensor:
        # The module reads its projection's weight without calling it, so hooks on it do not run here either.
        return F.linear(y.flatten(2), self.module.out_proj.weight, self.module.out_proj.bias)

    def read_call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, dict[str, Any]] | None:
        if key is not query or value is not query:
            return None
        check_no_more(self.kind, key_padding_mask, attn_mask, is_causal)
        if query.dim() != 3:
            raise ValueError(f"{self.kind} must get a batch of frames, got shape {tuple(query.shape)}")
        return (query if self.module.batch_first else query.transpose(0, 1)), {}

    def install(self, run: Run) -> Callable[[], None]:
        undo = super().install(run)
        # In eval mode torch.nn.TransformerEncoderLayer reads the weights without calling this module, unless it finds
        # a hook in it.
        handle = self.module.register_forward_pre_hook(_nothing)

        def undo_both() -> None:
            handle.remove()
            undo()

        return undo_both

    def wrap(self, out: Tensor) -> Any:
        return (out if self.module.batch_first else out.transpose(0, 1)), None

    def call_original(self, original: Callable[..., Any], x: Tensor) -> Tensor:
        query = x if self.module.batch_first else x.transpose(0, 1)
        out = original(query, query, query, need_weights=False)[0]
        return out if self.module.batch_first else out.transpose(0, 1)


def _nothing(*_: Any) -> None:
    return None
