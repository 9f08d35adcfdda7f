"""The GPU as the package sees it."""

from __future__ import annotations

import torch

import zsvr_kernels as zk
from zsvr_kernels import _triton


def test_it_has_configurations(cuda):
    assert _triton.target(cuda) in _triton.SHARED_MEMORY
    for dtype in _triton.DTYPES:
        assert _triton.refusal("cuda", dtype) is None


def test_it_is_named(cuda):
    info = zk.build_info()
    assert info["gpu"] == torch.cuda.get_device_name(cuda) and info["triton"][0].isdigit()
