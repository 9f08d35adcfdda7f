"""PSNR, SSIM and warping error of clips in [0, 1]."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zsvr_kernels.links import inside_pixels
from zsvr_kernels.sampling import warp


def quantize(clip: Tensor) -> Tensor:
    """Return a clip clipped to [0, 1] and rounded to the 256 levels of a picture file, ``floor(255u + 0.5) / 255``.

    Clips of 16-bit floats, which do not hold these levels, come back as float32.
    """
    clip = clip.to(torch.promote_types(clip.dtype, torch.float32))
    return torch.floor(clip.clamp(0, 1) * 255 + 0.5) / 255


def psnr_frames(output: Tensor, truth: Tensor) -> Tensor:
    """Return ``-10 log10 mse`` of every frame, at most 100 dB, float64 ``[T]``; both ``[T, C, H, W]``."""
    mse = (output.double() - truth.double()).square().mean((1, 2, 3))
    return -10 * torch.log10(mse.clamp(min=1e-10))


def psnr(output: Tensor, truth: Tensor) -> float:
    """Return the mean of `psnr_frames`."""
    return float(psnr_frames(output, truth).mean())


def ssim_frames(output: Tensor, truth: Tensor) -> Tensor:
    """Return every frame's mean SSIM over channels, float64 ``[T]``; both ``[T, C, H, W]``, sides of 11 or more.

    Gaussian 11x11 of std 1.5, valid region. Source: Wang et al. 2004; equals scikit-image with gaussian_weights and
    population covariance.
    """
    offsets = torch.arange(11, dtype=torch.float64) - 5
    kernel = torch.exp(-(offsets**2) / (2 * 1.5**2))
    weights = (kernel / kernel.sum()).tolist()

    def blur(x: Tensor) -> Tensor:  # a convolution in float64 takes five times as long
        for axis in (0, 1):
            shifted = [x.narrow(axis, n, x.shape[axis] - 10) for n in range(11)]
            x = shifted[0] * weights[0]
            for part, weight in zip(shifted[1:], weights[1:], strict=True):
                x.add_(part, alpha=weight)
        return x

    def of_channel(a: Tensor, b: Tensor) -> Tensor:  # [H, W] each, so that little memory is held
        a, b = a.double(), b.double()
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        c1, c2 = 0.01**2, 0.03**2
        numerator = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        return (numerator / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()

    def of_frame(output: Tensor, truth: Tensor) -> Tensor:
        return torch.stack([of_channel(a, b) for a, b in zip(output, truth, strict=True)]).mean()

    return torch.stack([of_frame(a, b) for a, b in zip(output, truth, strict=True)])


def ssim(output: Tensor, truth: Tensor) -> float:
    """Return the mean of `ssim_frames`."""
    return float(ssim_frames(output, truth).mean())


def occluded(forward: Tensor, backward: Tensor) -> Tensor:
    """Return where warping by ``forward [N, 2, H, W]`` cannot be judged, bool ``[N, H, W]``.

    Source: the rule of Ruder et al. 2016 that Lai et al. 2018 use, and leaving the frame.
    """
    back = warp(backward, forward)
    whole = (forward + back).double().square()
    squares = forward.double().square() + back.double().square()
    mismatch = whole.sum(1) > 0.01 * squares.sum(1) + 0.5  # float64: long flow must not overflow
    right = F.pad(forward[..., 1:] - forward[..., :-1], (0, 1)).square().sum(1)
    below = F.pad(forward[..., 1:, :] - forward[..., :-1, :], (0, 0, 0, 1)).square().sum(1)
    edge = right + below > 0.01 * forward.square().sum(1) + 0.002
    return mismatch | edge | ~inside_pixels(forward)


def warping_errors(output: Tensor, forward: Tensor, counted: Tensor) -> Tensor:
    """Return the mean squared difference of every frame and its warped successor, float64 ``[..., T-1]``.

    Args:
        output: ``[T, 3, H, W]`` in [0, 1].
        forward: flow ``[T-1, 2, H, W]`` of the reference video.
        counted: bool ``[..., T-1, H, W]``, pixels to count; a pair without any gives 0.
    """
    error = (warp(output[1:], forward) - output[:-1]).double().square().sum(1)
    count = output.shape[1] * counted.sum((-2, -1))
    return (error * counted).sum((-2, -1)) / count.clamp(min=1)


def warping_error(output: Tensor, forward: Tensor, backward: Tensor) -> float:
    """Return the warping error in units of 1e-2: 100 times the mean of `warping_errors` where flow is not `occluded`.

    Args:
        output: ``[T, 3, H, W]`` in [0, 1].
        forward, backward: flow ``[T-1, 2, H, W]`` of the reference video.

    Returns:
        The mean over pairs; NaN for one frame.

    Source: Lai et al., Learning Blind Video Temporal Consistency, ECCV 2018.
    """
    if len(output) < 2:
        return math.nan
    return 100 * float(warping_errors(output, forward, ~occluded(forward, backward)).mean())
