"""Calls from several Python threads at once: the same bits as one after the other, one inverse index for all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import _native, inverse_index, testing

pytestmark = pytest.mark.skipif(not _native.is_available(), reason="the native module is not built")


def test_concurrent_calls_do_not_disturb_each_other(generator):
    trajectories = testing.random_trajectories(1, 3, 3, 3, (6, 7), generator)
    frames = zk.neighbors(3)
    jobs = [[torch.randn(1, 3, 42, 2, 24, generator=generator) for _ in range(3)] for _ in range(8)]

    def work(tensors):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = zk.cross_frame_attention(*leaves, frames, backend="cpu")
        out = zk.trajectory_attention(*leaves[:2], out, trajectories, backend="cpu")
        return (out.detach(), *torch.autograd.grad(out.square().sum(), leaves))

    expected = [work(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, wanted in zip(pool.map(work, jobs), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_the_inverse_index_is_built_once_for_all_threads(generator):
    trajectories = testing.random_trajectories(1, 3, 3, 3, (30, 40), generator)
    wrapped = mock.patch.object(inverse_index, "inverse", wraps=inverse_index.inverse)
    with wrapped as built, ThreadPoolExecutor(4) as pool:
        indices = list(pool.map(lambda _: trajectories.inverse(3), range(16)))
    assert built.call_count == 1 and all(index is indices[0] for index in indices)
