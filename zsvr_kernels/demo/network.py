"""A small U-Net with random weights: what the demo measures features in, since the package ships no trained one."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsvr_kernels.context import VideoContext
from zsvr_kernels.plain import PlainAttention
from zsvr_kernels.slr import SLRAttention

CHANNELS = (32, 64, 96, 128)  # at full, 1/2, 1/4, 1/8 of the resolution; attention on all but the first
STRIDE = 8
HEAD_DIM, GROUPS = 32, 8
# Factor on the projections to q and k. It gives logits a standard deviation of about 3: with torch's own initialisation
# it is 0.3, and attention is then a plain mean over all tokens, which no trained network's is.
SHARPNESS = 3.0


class Residual(nn.Module):
    """Two normalised 3x3 convolutions beside a 1x1 one."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(GROUPS, channels), nn.GroupNorm(GROUPS, out)])
        self.convolutions = nn.ModuleList([nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)])
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(F.silu(norm(y)))
        return self.skip(x) + y


class SmallUNet(nn.Module):
    """Three levels down, one layer of attention on each of 1/2, 1/4, 1/8, and up again on 1/4 and 1/2.

    Args:
        seed: of the weights.

    Shape:
        x: ``[T, 3, H, W]``, sides that are multiples of 8; the output alike.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        c = CHANNELS
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.begin = nn.Conv2d(3, c[0], 3, padding=1)
            self.down = nn.ModuleList([Residual(a, b) for a, b in pairwise(c)])
            self.down_attention = nn.ModuleList([self._attention(n) for n in c[1:]])
            self.up = nn.ModuleList([Residual(c[3] + c[2], c[2]), Residual(c[2] + c[1], c[1])])
            self.up_attention = nn.ModuleList([self._attention(n) for n in (c[2], c[1])])
            self.last = Residual(c[1] + c[0], c[0])
            self.end = nn.Conv2d(c[0], 3, 3, padding=1)

    @staticmethod
    def _attention(channels: int) -> SLRAttention:
        plain = PlainAttention(channels, channels // HEAD_DIM, groups=GROUPS)
        with torch.no_grad():
            plain.qkv.weight[: 2 * channels] *= SHARPNESS
        return SLRAttention.from_attention(plain)

    def attentions(self) -> list[SLRAttention]:
        """Return the attention layers in the order in which they run."""
        return [*self.down_attention, *self.up_attention]  # type: ignore[list-item]

    def forward(self, x: Tensor, context: VideoContext | None = None) -> Tensor:
        x = self.begin(x)
        kept = []
        for block, attention in zip(self.down, self.down_attention, strict=True):
            kept.append(x)
            x = attention(block(F.avg_pool2d(x, 2)), context)
        for block, attention in zip(self.up, self.up_attention, strict=True):
            x = attention(block(torch.cat((F.interpolate(x, scale_factor=2.0), kept.pop()), 1)), context)
        return self.end(self.last(torch.cat((F.interpolate(x, scale_factor=2.0), kept.pop()), 1)))
