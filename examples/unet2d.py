"""SLR attention in a diffusers UNet2DModel: patch it, run a clip through it, see what changes.

    python examples/unet2d.py

The network has the shape of ADM (guided-diffusion at 256x256: attention on its three lowest resolutions, learned
variance), scaled down, with random weights. With a checkpoint, only the line that makes the network changes.
"""

import torch
from diffusers import UNet2DModel

import zsvr_kernels as zk
from zsvr_kernels.demo.clip import add_noise, bundled_clip
from zsvr_kernels.demo.denoise import optical_flow
from zsvr_kernels.demo.drift import along_trajectories

torch.manual_seed(0)
torch.set_grad_enabled(False)

# Six frames of 64x64, in [-1, 1], and optical flow between them, forward and backward.
clip = bundled_clip(size=64, frames=6)
frames = 2 * clip.frames - 1  # [T, 3, H, W]
flow_forward, flow_backward = optical_flow(clip.frames)  # [T-1, 2, H, W], in pixels

unet = UNet2DModel(
    sample_size=64,
    in_channels=3,
    out_channels=6,
    layers_per_block=1,
    block_out_channels=(32, 32, 64, 64),
    attention_head_dim=16,
    norm_num_groups=8,
    attn_norm_num_groups=8,
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    downsample_type="resnet",
    upsample_type="resnet",
    resnet_time_scale_shift="scale_shift",
).eval()

# The context holds what attention needs to know of the clip. A leading axis is the number of clips, here one.
context = zk.VideoContext(flow_forward[None], flow_backward[None], options=zk.SLROptions(combine="serial"))

# To see what changes: keep what one layer adds to its input, [T, P, C].
added = []
layer = unet.get_submodule("down_blocks.1.attentions.0")
layer.register_forward_hook(lambda _, inputs, output: added.append((output - inputs[0]).flatten(2).mT))

# Frames are the batch. One call at noise level 300 of 1000, every frame with noise of its own: first as it is...
noisy = add_noise(frames, 0.3)
before = unet(noisy, 300).sample

# ...then with every self-attention replaced, for the length of the block.
with zk.patched(unet, context) as report, context.step(k=0, K=1):
    after = unet(noisy, 300).sample
print(report)

# Outside the block the network is what it was.
assert torch.equal(before, unet(noisy, 300).sample)

# How much do features vary along the true paths of the picture, as a share of their variance?
paths = zk.chain_links(zk.Links.from_flow(clip.flow_forward[None], clip.flow_backward[None], grid=(32, 32)))
print(f"\nthe output changed by {(after - before).norm() / before.norm():.1%}")
print(f"drift of what the first layer adds, spatial attention: {along_trajectories(added[0], paths):.3f}")
print(f"drift of what the first layer adds, SLR attention: {along_trajectories(added[1], paths):.3f}")
