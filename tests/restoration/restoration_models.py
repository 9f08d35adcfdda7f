"""Tiny networks of random weights, and a moving texture, for tests of the whole loop."""

from __future__ import annotations

from typing import Any

import torch

from zsvr import priors

SCHEDULE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
SIZE = 32


def tiny_unet(seed: int = 0, learned: bool = True) -> Any:
    """Return a network of ADM's structure with random weights, attention at 16x16 and 8x8."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    model = UNet2DModel(
        sample_size=SIZE, in_channels=3, out_channels=6 if learned else 3, layers_per_block=1,
        block_out_channels=(16, 32, 32), attention_head_dim=16, norm_num_groups=8,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift", attn_norm_num_groups=8,
    )  # fmt: skip
    for p in model.parameters():  # residual branches and the last layer start at zero otherwise
        p.data.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model.eval()


def tiny_prior(seed: int = 0, learned: bool = True) -> priors.PixelPrior:
    """Return a prior around `tiny_unet`."""
    return priors.PixelPrior(tiny_unet(seed, learned), dict(SCHEDULE), facts={"kind": "random"})


def moving(frames: int = 4) -> torch.Tensor:
    """Return a texture that moves two pixels a frame, ``[T, 3, 32, 32]`` in [0, 1]."""
    texture = torch.rand(3, SIZE + 8, SIZE + 24, generator=torch.Generator().manual_seed(1))
    texture = torch.nn.functional.avg_pool2d(texture, 5, 1, 2)
    texture = (texture - texture.min()) / (texture.max() - texture.min())
    return torch.stack([texture[:, 4 : 4 + SIZE, 2 * i : 2 * i + SIZE] for i in range(frames)])
