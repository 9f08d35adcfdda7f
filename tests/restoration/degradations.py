"""Every operator, with sizes it takes, and how tests look at one."""

from __future__ import annotations

import torch

from zsvr.operators import kernels, make

LOPSIDED = torch.tensor([0.5, 0.3, 0.1, 0.1, 0.0], dtype=torch.float64)  # not symmetric: shows flips and shifts
LOPSIDED_IMAGE = torch.tensor([[0.0, 0.3, 0.1], [0.2, 0.2, 0.1], [0.05, 0.05, 0.0]], dtype=torch.float64)


def gray_then(*more):
    return make("compose", operators=[make("gray"), *more])


# name -> (operator, multiple of both sides). Every operator in the registry is here; see the test that says so.
CASES = {
    "denoise": (lambda: make("denoise"), 1),
    "inpaint_random": (lambda: make("inpaint", ratio=0.4), 1),
    "inpaint_box": (lambda: make("inpaint", box=(1, 2, 3, 4)), 1),
    "gray": (lambda: make("gray"), 1),
    "gray_luma": (lambda: make("gray", weights=(0.299, 0.587, 0.114)), 1),
    "sr_avg": (lambda: make("sr_avg", scale=3), 3),
    "sr_bicubic_2": (lambda: make("sr_bicubic", scale=2), 2),
    "sr_bicubic_4": (lambda: make("sr_bicubic", scale=4), 4),
    "blur_sep": (lambda: make("blur_sep"), 1),
    "blur_sep_uniform": (lambda: make("blur_sep", kernel="uniform:3"), 1),  # has negative gains
    "blur_sep_lopsided": (lambda: make("blur_sep", kernel=(LOPSIDED, kernels.gaussian(7, 1.0))), 1),
    "blur_sep_cg": (lambda: make("blur_sep", kernel="gaussian:3,0.6", pinv="cg", cg_iters=300), 1),
    "blur_fft": (lambda: make("blur_fft"), 1),
    "blur_fft_motion": (lambda: make("blur_fft", kernel="motion:7,30"), 1),
    "blur_fft_lopsided": (lambda: make("blur_fft", kernel=LOPSIDED_IMAGE), 1),
    "blur_fft_even": (lambda: make("blur_fft", kernel=torch.tensor([[0.1, 0.2], [0.3, 0.4]])), 1),
    "blur_fft_large": (lambda: make("blur_fft", kernel="dps"), 1),
    "blur_fft_mirror": (lambda: make("blur_fft", fft_pad="reflect"), 1),
    "blur_fft_mirror_wiener": (lambda: make("blur_fft", fft_pad="reflect", pinv="wiener", noise_std=0.05), 1),
    "blur_fft_reflect": (lambda: make("blur_fft", kernel=LOPSIDED_IMAGE, fft_pad="reflect"), 1),
    "blur_fft_wiener": (lambda: make("blur_fft", pinv="wiener", noise_std=0.05), 1),
    "lowlight": (lambda: make("lowlight", gain=0.3, offset=0.5 - 0.15), 1),  # an offset with which it is linear
    "gray_sr": (lambda: gray_then(make("sr_avg", scale=2)), 2),
    "sr_inpaint": (lambda: make("compose", operators=[make("sr_bicubic", scale=2), make("inpaint", ratio=0.3)]), 2),
    "blur_sr": (lambda: make("compose", operators=[make("blur_sep", kernel="gaussian:5,1"), make("sr_avg")]), 4),
}
EXACT = ["denoise", "inpaint_random", "inpaint_box", "gray", "gray_luma", "sr_avg", "sr_bicubic_2", "sr_bicubic_4"]
TRUNCATED = [
    "blur_sep",
    "blur_sep_uniform",
    "blur_sep_lopsided",
    "blur_fft",
    "blur_fft_motion",
    "blur_fft_lopsided",
    "blur_fft_large",
]
TRUNCATED += ["blur_fft_even", "blur_fft_mirror"]
FULL_ROW_RANK = ["denoise", "gray", "gray_luma", "sr_avg", "sr_bicubic_2", "sr_bicubic_4", "gray_sr"]


def frames(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def case(name, height=11, width=13):
    build, multiple = CASES[name]
    return build(), (height * multiple, width * multiple)


def relative(a, b):
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp(min=1e-300))


def dense(op, canvas):
    """Return A as a float64 matrix for one channel (or three where they mix)."""
    n = 3 * canvas[0] * canvas[1]
    return op.A(torch.eye(n, dtype=torch.float64).reshape(n, 3, *canvas)).reshape(n, -1).T
