"""Tests that are for a GPU. Those that need no more than the kernels also run in Triton's interpreter, if asked to:
``TRITON_INTERPRET=1 pytest tests/gpu``. Anywhere else without a GPU they skip.
"""

from __future__ import annotations

import os
import pathlib

import pytest
import torch

from zsvr_kernels import _triton

HERE = pathlib.Path(__file__).parent
IDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] if _triton.is_interpreted else [torch.float32, torch.float16, torch.bfloat16]


# What torch warns of on any GPU, once per process: that its search for waiting is new, that TF32 is off.
SAID_ANYWAY = ("Synchronization debug mode is a prototype", "TensorFloat32 tensor cores")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in pathlib.Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            for said in SAID_ANYWAY:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{said}"))


@pytest.fixture
def cuda() -> torch.device:
    """A GPU, for what no interpreter has: streams, graphs, a compiler."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if _triton.is_interpreted:
        pytest.skip("TRITON_INTERPRET=1 is set")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernels run."""
    if _triton.why_missing:
        pytest.skip(_triton.why_missing)
    return torch.device("cpu") if _triton.is_interpreted else request.getfixturevalue("cuda")


@pytest.fixture(params=DTYPES, ids=[IDS[x] for x in DTYPES])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def give_memory_back():
    yield
    if torch.cuda.is_available() and os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") is None:
        torch.cuda.empty_cache()
