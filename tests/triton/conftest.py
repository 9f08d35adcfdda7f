"""Triton's kernels: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so it has a process of its own:
``TRITON_INTERPRET=1 pytest tests/triton``; anywhere else without a GPU these tests skip.
"""

from __future__ import annotations

import pytest
import torch

from zsvr_kernels import _triton

IDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] if _triton.is_interpreted else [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def device() -> torch.device:
    """Where kernels run."""
    if _triton.why_missing:
        pytest.skip(_triton.why_missing)
    if _triton.is_interpreted:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set")
    return torch.device("cuda")


@pytest.fixture(params=DTYPES, ids=[IDS[x] for x in DTYPES])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
