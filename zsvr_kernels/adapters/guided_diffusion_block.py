"""guided-diffusion (and improved-diffusion): ``AttentionBlock`` with 1-D convolutions, both orders of its qkv."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zsvr_kernels.adapters.base import Adapter, to_tokens, unknown_parts

ORDERS = ("legacy", "new")


class GuidedDiffusionBlock(Adapter):
    """``x + proj_out(attention(qkv(norm(x))))`` over ``[N, C, ...]``.

    The *legacy* order holds q, k, v of one head after the other, ``(H, 3, D)``; the *new* one all q, then all k, then
    all v, ``(3, H, D)``. A state dict cannot tell them apart, the block's ``attention`` can: guided-diffusion's
    ``QKVAttentionLegacy`` and improved-diffusion's ``QKVAttention``, which knows no number of heads, are legacy.
    """

    kind = "guided-diffusion AttentionBlock"
    forward_name = "_forward"  # inside the block's own checkpointing

    def __init__(self, module: Any, qkv_order: str | None = None) -> None:
        self.module = module
        self.heads = module.num_heads
        self.channels = module.qkv.in_channels
        self.head_dim = self.channels // self.heads
        if qkv_order is None:
            is_legacy = "legacy" in type(module.attention).__name__.lower() or not hasattr(module.attention, "n_heads")
            qkv_order = "legacy" if is_legacy else "new"
        if qkv_order not in ORDERS:
            raise ValueError(f"qkv_order must be one of {', '.join(ORDERS)}, got {qkv_order!r}")
        self.qkv_order = qkv_order
        if not hasattr(module, "_forward"):
            self.forward_name = "forward"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if not all(hasattr(module, name) for name in ("norm", "qkv", "proj_out", "num_heads", "attention")):
            return False
        return isinstance(module.qkv, nn.Conv1d) and module.qkv.out_channels == 3 * module.qkv.in_channels

    @classmethod
    def refusal(cls, module: Any, name: str = "") -> str | None:
        if getattr(module, "encoder_kv", None) is not None:
            return "it also attends to an encoder's keys and values"
        return unknown_parts(module, "norm", "qkv", "proj_out")

    def begin(self, x: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        if x.dim() != 4:
            raise ValueError(f"{self.kind} takes [N, C, Hg, Wg], got shape {tuple(x.shape)}")
        module: Any = self.module
        return to_tokens(module.norm(x.flatten(2))), x

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module: Any = self.module
        qkv = module.qkv(tokens.mT).mT.contiguous()  # [N, P, 3C]
        if self.qkv_order == "legacy":
            q, k, v = qkv.unflatten(-1, (self.heads, 3, self.head_dim)).unbind(-2)
        else:
            q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(-3)
        return q, k, v

    def finish(self, y: Tensor, state: Tensor) -> Tensor:
        module: Any = self.module
        return state + module.proj_out(y.flatten(2).mT).reshape(state.shape)

    def read_call(self, x: Tensor, *others: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]] | None:
        if any(y is not None for y in (*others, *kwargs.values())):
            return None
        return x, {}
