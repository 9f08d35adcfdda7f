"""diffusers: the ``Attention`` of UNet2DModel blocks and of transformer blocks (``attn1``), through its processor."""

from __future__ import annotations

import functools
import inspect
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
        if getattr(module, "to_k", None) is None or module.to_out is None:
            return "it has no projection of keys or of the output"
        if not module.to_q.out_features == module.to_k.out_features == module.to_v.out_features:
            return "its queries, keys and values have different widths (grouped queries)"
        if getattr(module, "is_causal", False):
            return "it is causal"
        norm = getattr(module, "norm_q", None)
        if norm is not None and any(p.numel() != module.to_q.out_features // module.heads for p in norm.parameters()):
            return "it normalises queries and keys across heads"
        if isinstance(module.processor, nn.Module) and next(module.processor.parameters(), None) is not None:
            return f"its processor has weights of its own ({type(module.processor).__name__})"
        rotary = [n for n in _parameters(module.processor) if any(x in n for x in ("rotary", "rope", "freqs"))]
        if rotary:
            return f"its processor turns queries and keys by their positions ({rotary[0]})"
        return None

    def begin(self, x: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        module: Any = self.module
        tokens = to_tokens(x) if x.dim() == 4 else x
        if module.group_norm is not None:
            tokens = module.group_norm(tokens.mT).mT
        return tokens.contiguous(), x

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module: Any = self.module
        if self._uses_fused():
            q, k, v = module.to_qkv(tokens).chunk(3, dim=-1)
        else:
            q, k, v = module.to_q(tokens), module.to_k(tokens), module.to_v(tokens)
        q, k, v = (y.unflatten(-1, (self.heads, self.head_dim)) for y in (q, k, v))
        if getattr(module, "norm_q", None) is not None:
            q = module.norm_q(q)
        if getattr(module, "norm_k", None) is not None:
            k = module.norm_k(k)
        return q, k, v

    def _uses_fused(self) -> bool:
        """Return whether the processor reads ``to_qkv``; unfusing a model leaves ``to_qkv`` and its flag behind."""
        module: Any = self.module
        processor = module.processor if self._original is None else self._original
        return getattr(module, "fused_projections", False) and "Fused" in type(processor).__name__

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
        return hidden_states, {name: x for name, x in unused.items() if x is not None}

    @property
    def out_channels(self) -> int:
        module: Any = self.module
        return getattr(module.to_out[0], "out_features", self.channels)

    def original(self) -> Callable[..., Any]:
        module: Any = self.module
        return functools.partial(module.processor, module)

    def install(self, run: Run) -> Callable[[], None]:
        module: Any = self.module
        processor = SLRProcessor(run, module.processor)
        before = module.__dict__.get("processor")

        def undo() -> None:
            self._original = None
            if module.__dict__.get("processor") is processor:
                if before is None:
                    del module.__dict__["processor"]
                else:
                    module.__dict__["processor"] = before

        # A processor that holds weights is a submodule: it stays one, hidden, so that the state dict stays the same.
        module.__dict__["processor"] = self._installed = processor
        self._original = processor.original
        return undo

    def is_installed(self) -> bool:
        return self.module.__dict__.get("processor") is self._installed

    _original: Any = None


def _parameters(processor: Any) -> list[str]:
    return list(inspect.signature(processor.__call__).parameters)


class SLRProcessor:
    """The attention processor that a patched diffusers ``Attention`` holds. It has no weights of its own."""

    def __init__(self, run: Run, original: Any) -> None:
        self.run = run
        self.original = original
        if set(_parameters(original)) - set(_parameters(self)) - {"args", "kwargs"}:
            # diffusers passes on only those of cross_attention_kwargs that the signature names.
            def call(*args: Any, **kwargs: Any) -> Any:
                return SLRProcessor.__call__(self, *args, **kwargs)

            call.__signature__ = inspect.signature(original.__call__)  # type: ignore[attr-defined]
            self.__dict__["__call__"] = call

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        def original(*a: Any, **k: Any) -> Any:
            return self.original(attn, *a, **k)

        # By keyword and only if given: a processor of the user's own need not take them all.
        given = {"encoder_hidden_states": encoder_hidden_states, "attention_mask": attention_mask, "temb": temb}
        kwargs |= {name: x for name, x in given.items() if x is not None}
        return self.run(original, hidden_states, **kwargs)
