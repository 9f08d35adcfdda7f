"""CompVis latent diffusion (and Stable Diffusion's first code): ``CrossAttention`` used as self-attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from zsvr_kernels.adapters.base import Adapter, check_no_more, is_linear, unknown_parts


class LDMAttention(Adapter):
    """``to_out(softmax(scale q k^T) v)`` over tokens; norm and residual belong to the transformer block around it."""

    kind = "LDM CrossAttention"

    def __init__(self, module: Any) -> None:
        self.module = module
        self.heads = module.heads
        self.channels = module.to_q.in_features
        self.head_dim = module.to_q.out_features // module.heads
        self.scale = float(getattr(module, "scale", self.head_dim**-0.5))

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if hasattr(module, "processor") or not all(
            hasattr(module, n) for n in ("to_q", "to_k", "to_v", "to_out", "heads")
        ):
            return False
        return all(is_linear(x) for x in (module.to_q, module.to_k, module.to_v))

    @classmethod
    def refusal(cls, module: Any, name: str = "") -> str | None:
        if module.to_k.in_features != module.to_q.in_features:
            return f"its keys come from {module.to_k.in_features} channels, its queries from {module.to_q.in_features}"
        if name.rpartition(".")[2] == "attn2":
            return "it is cross-attention (attn2)"
        if not module.to_q.out_features == module.to_k.out_features == module.to_v.out_features:
            return "its queries, keys and values have different widths"
        return unknown_parts(module, "to_q", "to_k", "to_v", "to_out")

    def begin(self, x: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        return x, None

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module: Any = self.module
        q, k, v = (
            f(tokens).unflatten(-1, (self.heads, self.head_dim)) for f in (module.to_q, module.to_k, module.to_v)
        )
        return q, k, v

    def finish(self, y: Tensor, state: Any) -> Tensor:
        module: Any = self.module
        return module.to_out(y.flatten(2))

    def read_call(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, *others: Any, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]] | None:
        if context is not None and context is not x:
            return None
        check_no_more(self.kind, mask, *others, *kwargs.values())
        return x, {}
