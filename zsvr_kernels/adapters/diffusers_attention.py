"""diffusers: the ``Attention`` of UNet2DModel blocks and of transformer blocks (``attn1``), through its processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from zsvr_kernels.adapters.base import Adapter, Run, is_linear, to_tokens


class DiffusersAttention(Adapter):
    """Whatever the default processor does around the attention: norms, projections, residual, rescaling."""

    kind = "diffusers Attention"

    def __init__(self, module: Any) -> None:
        self.module = module
        self.heads = module.heads
        self.channels = module.to_q.in_features
        self.head_dim = module.to_q.out_features // module.heads
        self.scale = float(module.scale)

    @classmethod
    def recognises(cls, module: Any) -> bool:
        names = ("to_q", "to_out", "heads", "scale", "processor", "set_processor", "residual_connection")
        return all(hasattr(module, name) for name in names) and is_linear(module.to_q)

    @classmethod
    def refusal(cls, module: Any, name: str = "") -> str | None:
        if getattr(module, "is_cross_attention", False) or getattr(module, "only_cross_attention", False):
            return "it is cross-attention"
        if name.rpartition(".")[2] == "attn2":
            return "it is cross-attention (attn2)"
        if getattr(module, "to_k", None) is not None and module.to_k.in_features != module.to_q.in_features:
            return f"its keys come from {module.to_k.in_features} channels, its queries from {module.to_q.in_features}"
        if getattr(module, "added_kv_proj_dim", None) is not None:
            return "it attends to added keys and values of another sequence"
        if getattr(module, "spatial_norm", None) is not None:
            return "its norm depends on another tensor (spatial_norm): it belongs to a decoder"
        return None

    def begin(self, x: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        module: Any = self.module
        tokens = to_tokens(x) if x.dim() == 4 else x
        if module.group_norm is not None:
            tokens = module.group_norm(tokens.mT).mT
        return tokens.contiguous(), x

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module: Any = self.module
        if getattr(module, "fused_projections", False):
            q, k, v = module.to_qkv(tokens).chunk(3, dim=-1)
        else:
            q, k, v = module.to_q(tokens), module.to_k(tokens), module.to_v(tokens)
        q, k, v = (y.unflatten(-1, (self.heads, self.head_dim)) for y in (q, k, v))
        if getattr(module, "norm_q", None) is not None:
            q = module.norm_q(q)
        if getattr(module, "norm_k", None) is not None:
            k = module.norm_k(k)
        return q, k, v

    def finish(self, y: Tensor, state: Tensor) -> Tensor:
        module: Any = self.module
        y = module.to_out[1](module.to_out[0](y.flatten(2)))
        if state.dim() == 4:
            y = y.mT.reshape(state.shape)
        if module.residual_connection:
            y = y + state
        return y / module.rescale_output_factor

    def read_call(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, dict[str, Any]] | None:
        if encoder_hidden_states is not None and encoder_hidden_states is not hidden_states:
            return None
        if attention_mask is not None:
            raise ValueError("SLR attention takes no attention_mask: leave it out, or leave this layer unpatched")
        return hidden_states, {}

    def install(self, run: Run) -> Callable[[], None]:
        module: Any = self.module
        original = module.processor
        processor = SLRProcessor(run, original)

        def undo() -> None:
            if module.processor is processor:
                _put(module, original)

        _put(module, processor)
        self._installed = processor
        return undo

    def is_installed(self) -> bool:
        return self.module.processor is self._installed  # type: ignore[union-attr]


def _put(module: Any, processor: Any) -> None:
    """Set a processor as it is: ``set_processor`` would drop the weights of one that holds some."""
    if isinstance(processor, nn.Module):
        module.processor = processor
        return
    module._modules.pop("processor", None)
    module.processor = processor


class SLRProcessor:
    """The attention processor that a patched diffusers ``Attention`` holds. It has no weights of its own."""

    def __init__(self, run: Run, original: Any) -> None:
        self.run = run
        self.original = original

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        def original(*a: Any, **k: Any) -> Any:
            return self.original(attn, *a, **k)

        return self.run(original, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
