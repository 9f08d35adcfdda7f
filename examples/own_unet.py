"""SLR attention as a layer of a network of one's own: a U-Net in thirty lines that takes images, or a clip.

    python examples/own_unet.py

Without a context `SLRAttention` is ordinary self-attention, so the network can be trained on images; with one, the
same weights attend across frames. Gradients flow through it, also under activation checkpointing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zsvr_kernels as zk
from zsvr_kernels.demo.clip import add_noise, bundled_clip
from zsvr_kernels.demo.denoise import optical_flow
from zsvr_kernels.demo.drift import along_trajectories


class Level(nn.Module):
    """A residual convolution and an attention layer."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(8, channels), nn.Conv2d(channels, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1)
        self.attention = zk.SLRAttention(out, num_heads=out // 16, groups=8)

    def forward(self, x: Tensor, context: zk.VideoContext | None) -> Tensor:
        x = self.skip(x) + self.conv(F.silu(self.norm(x)))
        return self.attention(x, context)


class UNet(nn.Module):
    """Half the resolution, a quarter, and back; attention on both."""

    def __init__(self, channels: int = 32, checkpointed: bool = False) -> None:
        super().__init__()
        self.begin, self.end = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)
        self.upper, self.lower = Level(channels, channels), Level(channels, 2 * channels)
        self.joined = Level(3 * channels, channels)
        self.checkpointed = checkpointed

    def run(self, level: Level, x: Tensor, context: zk.VideoContext | None) -> Tensor:
        return checkpoint(level, x, context, use_reentrant=False) if self.checkpointed else level(x, context)

    def forward(self, x: Tensor, context: zk.VideoContext | None = None) -> Tensor:
        first = self.begin(x)
        half = self.run(self.upper, F.avg_pool2d(first, 2), context)
        quarter = self.run(self.lower, F.avg_pool2d(half, 2), context)
        up = self.run(self.joined, torch.cat((half, F.interpolate(quarter, scale_factor=2.0)), 1), context)
        return self.end(first + F.interpolate(up, scale_factor=2.0))


torch.manual_seed(0)
clip = bundled_clip(size=64, frames=6)
noisy = add_noise(2 * clip.frames - 1, 0.3)  # [T, 3, H, W]: frames are the batch
flow_forward, flow_backward = optical_flow(clip.frames)
context = zk.VideoContext(flow_forward[None], flow_backward[None])
net = UNet()

# A few steps as of a sampler: within `step` the context knows how far sampling is, and corrects links late in it.
# What does attention add on the lower level, and how much does it vary along the true paths of the picture?
STEPS = 4
paths = zk.chain_links(zk.Links.from_flow(clip.flow_forward[None], clip.flow_backward[None], grid=(16, 16)))
added: list[Tensor] = []
net.lower.attention.register_forward_hook(lambda _, inputs, out: added.append((out - inputs[0]).flatten(2).mT))
with torch.no_grad():
    for name, given in (("spatial attention", None), ("SLR attention", context)):
        x = noisy
        for k in range(STEPS):
            with context.step(k, STEPS):
                x = x - 0.1 * net(x, given)
        print(f"drift of what attention adds on 16x16, {name}: {along_trajectories(added[-1], paths):.3f}")
print(context)

# One backward, with every level recomputed: the same gradients, and history moves on once, at the end of the step.
gradients = []
for checkpointed in (False, True):
    net.checkpointed = checkpointed
    context.reset()
    with context.step(STEPS - 1, STEPS):
        loss = net(noisy, context).square().mean()
        gradients.append(torch.autograd.grad(loss, list(net.parameters())))
difference = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
size = max(float(g.abs().max()) for g in gradients[0])
print(f"loss {loss.item():.4f}; gradients of {len(gradients[0])} tensors up to {size:.4f}")
print(f"largest difference with activation checkpointing: {difference}")
