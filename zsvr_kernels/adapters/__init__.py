"""Adapters: how self-attention layers of other libraries are taken apart. Told by structure; no library is imported."""

from __future__ import annotations

from torch import nn

from zsvr_kernels.adapters.base import Adapter, Run
from zsvr_kernels.adapters.diffusers_attention import DiffusersAttention
from zsvr_kernels.adapters.guided_diffusion_block import GuidedDiffusionBlock
from zsvr_kernels.adapters.ldm_attention import LDMAttention
from zsvr_kernels.adapters.plain_attention import PlainAttentionAdapter
from zsvr_kernels.adapters.timm_attention import TimmAttention
from zsvr_kernels.adapters.torch_multihead import TorchMultihead

__all__ = ["Adapter", "Run", "adapt", "adapter_for"]

# The first that recognises a module takes it.
ADAPTERS: tuple[type[Adapter], ...] = (
    PlainAttentionAdapter,
    TorchMultihead,
    DiffusersAttention,
    GuidedDiffusionBlock,
    LDMAttention,
    TimmAttention,
)


def adapter_for(module: nn.Module) -> type[Adapter] | None:
    """Return the adapter class that recognises a module, or None."""
    for adapter in ADAPTERS:
        if adapter.recognises(module):
            return adapter
    return None


def adapt(module: nn.Module, *, qkv_order: str | None = None) -> Adapter:
    """Return the adapter of one module; see `SLRAttention.from_attention` for arguments and errors."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    module = module._modules.get("_orig_mod") or module  # what torch.compile has wrapped
    adapter = adapter_for(module)
    if adapter is None:
        known = ", ".join(a.kind for a in ADAPTERS)
        raise TypeError(f"{type(module).__name__} is not an attention this package knows: {known}")
    reason = adapter.refusal(module)
    if reason is not None:
        raise ValueError(f"this {adapter.kind} cannot be replaced by SLR attention: {reason}")
    if adapter is GuidedDiffusionBlock:
        return GuidedDiffusionBlock(module, qkv_order)
    if qkv_order is not None:
        raise ValueError(f"qkv_order is for {GuidedDiffusionBlock.kind}, got a {adapter.kind}")
    return adapter(module)  # type: ignore[call-arg]
