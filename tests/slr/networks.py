"""Small networks of the structures that adapters know, written from their public descriptions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsvr_kernels.plain import PlainAttention

# ---- guided-diffusion and improved-diffusion ----


class GroupNorm32(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float() if x.dtype != torch.float64 else x).type(x.dtype)


def _weigh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [N, D, P] each
    scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
    logits = torch.einsum("bct,bcs->bts", q * scale, k * scale)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.einsum("bts,bcs->bct", wide.softmax(-1).type(logits.dtype), v)


class QKVAttentionLegacy(nn.Module):
    """Rows of qkv: per head q, k, v."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        N, width, P = qkv.shape
        q, k, v = qkv.reshape(N * self.n_heads, width // self.n_heads, P).chunk(3, dim=1)
        return _weigh(q, k, v).reshape(N, -1, P)


class QKVAttention(nn.Module):
    """Rows of qkv: all q, all k, all v."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv: Tensor) -> Tensor:
        N, width, P = qkv.shape
        D = width // (3 * self.n_heads)
        q, k, v = (x.reshape(N * self.n_heads, D, P) for x in qkv.chunk(3, dim=1))
        return _weigh(q, k, v).reshape(N, -1, P)


class _Recompute(torch.autograd.Function):
    """guided-diffusion's own checkpointing: forward without graph, run again in the backward."""

    @staticmethod
    def forward(ctx: Any, run: Any, length: int, *args: Any) -> Any:
        ctx.run, ctx.inputs, ctx.weights = run, args[:length], args[length:]
        with torch.no_grad():
            return run(*ctx.inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs = [x.detach().requires_grad_(True) for x in ctx.inputs]
        with torch.enable_grad():
            out = ctx.run(*[x.view_as(x) for x in inputs])
        return (None, None, *torch.autograd.grad(out, (*inputs, *ctx.weights), gradient, allow_unused=True))


class AttentionBlock(nn.Module):
    """guided-diffusion's attention block; ``attention`` decides the order of qkv."""

    def __init__(
        self, channels: int, num_heads: int, attention: nn.Module | None = None, use_checkpoint: bool = False
    ) -> None:
        super().__init__()
        self.channels, self.num_heads, self.use_checkpoint = channels, num_heads, use_checkpoint
        self.norm = GroupNorm32(8, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = attention or QKVAttentionLegacy(num_heads)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.use_checkpoint:
            return self._forward(x)
        return _Recompute.apply(self._forward, 1, x, *self.parameters())

    def _forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        return (flat + self.proj_out(self.attention(self.qkv(self.norm(flat))))).reshape(x.shape)


class ImprovedBlock(AttentionBlock):
    """improved-diffusion's: its attention sees heads in the batch and knows no number of heads."""

    class QKVAttention(nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return _weigh(*qkv.chunk(3, dim=1))

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__(channels, num_heads, self.QKVAttention())

    def _forward(self, x: Tensor) -> Tensor:
        N, C, *_ = x.shape
        flat = x.reshape(N, C, -1)
        qkv = self.qkv(self.norm(flat))
        h = self.attention(qkv.reshape(N * self.num_heads, -1, qkv.shape[2])).reshape(N, C, -1)
        return (flat + self.proj_out(h)).reshape(x.shape)


class GuidedUNet(nn.Module):
    """A U-Net with guided-diffusion's names: attention on two grids, on the way down, in the middle and up."""

    def __init__(self, channels: int = 16, num_heads: int = 2, use_checkpoint: bool = False) -> None:
        super().__init__()

        def block() -> AttentionBlock:
            return AttentionBlock(channels, num_heads, use_checkpoint=use_checkpoint)

        def conv(stride: int = 1) -> nn.Module:
            return nn.Conv2d(channels, channels, 3, stride, padding=1)

        self.input_blocks = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, channels, 3, 2, padding=1)), nn.Sequential(conv(), block()), conv(2)]
        )
        self.middle_block = nn.Sequential(conv(), block(), conv())
        self.output_blocks = nn.ModuleList(
            [nn.Sequential(conv(), block(), nn.Upsample(scale_factor=2)), nn.Sequential(conv(), block())]
        )
        self.out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.input_blocks:
            x = block(x)
            kept.append(x)
        x = self.middle_block(x)
        for block in self.output_blocks:
            x = block(x + kept.pop())
        return self.out(x)


# ---- latent diffusion ----


class CrossAttention(nn.Module):
    """CompVis latent diffusion's: self-attention where no context is given."""

    def __init__(self, query_dim: int, context_dim: int | None = None, heads: int = 2, dim_head: int = 16) -> None:
        super().__init__()
        inner = heads * dim_head
        self.scale, self.heads = dim_head**-0.5, heads
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim or query_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f, y in ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        )
        logits = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], -torch.finfo(logits.dtype).max)
        return self.to_out((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """LDM's block in LDM's spatial transformer: attn1, attn2 over a text, tokens in between."""

    def __init__(self, channels: int = 32, context_dim: int = 24) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels)
        self.attn2 = CrossAttention(channels, context_dim)
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), context=text)
        return tokens.mT.reshape(x.shape)


class LatentNet(nn.Module):
    def __init__(self, channels: int = 32, context_dim: int = 24) -> None:
        super().__init__()
        self.inlet = nn.Conv2d(4, channels, 3, padding=1)
        self.block = TransformerBlock(channels, context_dim)
        self.reduce = nn.Conv2d(channels, channels, 3, 2, padding=1)
        self.deep = TransformerBlock(channels, context_dim)
        self.register_buffer("text", torch.linspace(-1, 1, 5 * context_dim).reshape(1, 5, context_dim))

    def forward(self, x: Tensor) -> Tensor:
        text = self.text.expand(len(x), -1, -1)
        return self.deep(self.reduce(self.block(self.inlet(x), text)), text)


# ---- vision transformers ----


class ViTAttention(nn.Module):
    """As in timm: one Linear for q, k, v, optional norms of q and k."""

    def __init__(self, dim: int, num_heads: int = 4, qk_norm: bool = False, scale_norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.norm = nn.LayerNorm(dim) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        N, P, C = x.shape
        q, k, v = self.qkv(x).reshape(N, P, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        return self.proj_drop(self.proj(self.norm(y.transpose(1, 2).reshape(N, P, C))))


class ViT(nn.Module):
    """Patch tokens and one class token; ``make`` builds a layer, ``call`` runs its attention."""

    def __init__(self, kind: str = "timm", dim: int = 32, depth: int = 2, patch: int = 2) -> None:
        super().__init__()
        self.kind = kind
        self.inlet = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(torch.linspace(-1, 1, dim).reshape(1, 1, dim))
        layers: list[nn.Module] = []
        for _ in range(depth):
            if kind == "timm":
                layers.append(ViTAttention(dim, qk_norm=True))
            elif kind == "multihead":
                layers.append(nn.MultiheadAttention(dim, 4, batch_first=True))
            elif kind == "sequence first":
                layers.append(nn.MultiheadAttention(dim, 4))
            else:
                layers.append(nn.TransformerEncoderLayer(dim, 4, 2 * dim, 0.0, batch_first=True))
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.inlet(x).flatten(2).mT
        tokens = torch.cat((self.cls.expand(len(tokens), -1, -1), tokens), 1)
        for layer in self.layers:
            if self.kind == "multihead":
                tokens = tokens + layer(tokens, tokens, tokens, need_weights=False)[0]
            elif self.kind == "sequence first":
                turned = tokens.transpose(0, 1)
                tokens = tokens + layer(turned, turned, turned)[0].transpose(0, 1)
            elif self.kind == "timm":
                tokens = tokens + layer(tokens)
            else:
                tokens = layer(tokens)
        return tokens


# ---- by hand ----


class HandWritten(nn.Module):
    """Somebody's own network, built with this package's plain attention, on two grids."""

    def __init__(self, channels: int = 16, depth: int = 1) -> None:
        super().__init__()
        self.inlet = nn.Conv2d(3, channels, 3, padding=1)
        self.first = nn.ModuleList(PlainAttention(channels, 2, groups=4) for _ in range(depth))
        self.reduce = nn.Conv2d(channels, channels, 3, 2, padding=1)
        self.second = PlainAttention(channels, 2, norm="layer")

    def forward(self, x: Tensor) -> Tensor:
        x = self.inlet(x)
        for layer in self.first:
            x = layer(x)
        return self.second(self.reduce(x))


# ---- diffusers ----


def adm(**changes: Any) -> nn.Module:
    """OpenAI's ADM as a diffusers UNet2DModel, shrunk: 7 attention layers on two grids."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        **{
            "sample_size": 16,
            "in_channels": 3,
            "out_channels": 6,
            "layers_per_block": 1,
            "block_out_channels": (32, 32, 64),
            "attention_head_dim": 16,
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 32,
            "norm_eps": 1e-5,
            **changes,
        }
    ).eval()


def stable_diffusion(cross_attention_dim: int = 24, **changes: Any) -> nn.Module:
    """A diffusers UNet2DConditionModel, shrunk: 4 transformer blocks, each with attn1 and attn2."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            "sample_size": 16,
            "layers_per_block": 1,
            "block_out_channels": (32, 32),
            "cross_attention_dim": cross_attention_dim,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            **changes,
        }
    ).eval()
