"""Shared fixtures: a seeded generator, real data, and the instruction sets this machine can run."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch

from zsvr_kernels import testing

DATA = pathlib.Path(__file__).resolve().parents[1].parent / "shared" / "data"


def pytest_configure() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240701)


@pytest.fixture(params=testing.instruction_sets() or ["no native module"])
def isa(request: pytest.FixtureRequest):
    if request.param == "no native module":
        pytest.skip("the native module is not built")
    with testing.instruction_set(request.param):
        yield request.param


@pytest.fixture
def real_data() -> pathlib.Path:
    if not DATA.is_dir():
        pytest.skip(f"no real clips at {DATA}")
    return DATA
