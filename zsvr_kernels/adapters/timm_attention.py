"""timm and others after ViT: ``Attention`` with one Linear for q, k, v and one for the output."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zsvr_kernels.adapters.base import Adapter, check_no_more, is_linear, unknown_parts


class TimmAttention(Adapter):
    """``proj(norm(softmax(scale q_norm(q) k_norm(k)^T) v))`` over tokens ``[N, P, C]``, class tokens first."""

    kind = "timm Attention"

    def __init__(self, module: Any) -> None:
        self.module = module
        self.heads = module.num_heads
        self.channels = module.qkv.in_features
        self.head_dim = module.qkv.out_features // (3 * module.num_heads)
        self.scale = float(getattr(module, "scale", self.head_dim**-0.5))

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if not all(hasattr(module, name) for name in ("qkv", "proj", "num_heads")):
            return False
        return (
            is_linear(module.qkv) and is_linear(module.proj) and module.qkv.out_features % (3 * module.num_heads) == 0
        )

    @classmethod
    def refusal(cls, module: Any, name: str = "") -> str | None:
        for field in ("relative_position_bias_table", "rel_pos", "rope", "rel_pos_h"):
            if getattr(module, field, None) is not None:
                return f"its logits depend on positions ({field})"
        return unknown_parts(module, "qkv", "q_norm", "k_norm", "norm", "proj")

    def begin(self, x: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        if x.dim() != 3:
            raise ValueError(f"{self.kind} takes tokens [N, P, C], got shape {tuple(x.shape)}")
        return x, None

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module: Any = self.module
        q, k, v = module.qkv(tokens).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        if getattr(module, "q_norm", None) is not None:
            q = module.q_norm(q)
        if getattr(module, "k_norm", None) is not None:
            k = module.k_norm(k)
        return q, k, v

    def finish(self, y: Tensor, state: Any) -> Tensor:
        module: Any = self.module
        y = y.flatten(2)
        if getattr(module, "norm", None) is not None:
            y = module.norm(y)
        y = module.proj(y)
        drop = getattr(module, "proj_drop", None)
        return y if drop is None else drop(y)

    @property
    def out_channels(self) -> int:
        module: Any = self.module
        return module.proj.out_features

    def read_call(
        self, x: Tensor, attn_mask: Tensor | None = None, *others: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]] | None:
        check_no_more(self.kind, attn_mask, *others, *kwargs.values())
        return x, {}
