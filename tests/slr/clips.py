"""Clips, contexts and layers that several of these tests use."""

from __future__ import annotations

import torch

import zsvr_kernels as zk

NOW = zk.CorrectionOptions(similarity_start=0.0)


def some_flow(B, T, size, generator, scale=4.0):
    """Smooth flow and its near opposite, so that most of it passes the check."""
    coarse = scale * torch.randn(B * (T - 1), 2, 2, 2, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size, mode="bilinear").unflatten(0, (B, T - 1)) if T > 1 else None
    if fine is None:
        fine = torch.zeros(B, 0, 2, *size)
    return fine, -fine + 0.05 * torch.randn(fine.shape, generator=generator)


def some_context(generator, B=1, T=4, size=(32, 48), **arguments):
    return zk.VideoContext(*some_flow(B, T, size, generator), **arguments)


def layers(count, **arguments):
    torch.manual_seed(3)
    return [zk.SLRAttention(16, 2, groups=4, name=f"layer{n}", **arguments) for n in range(count)]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def snapshot(context):
    return {f"{key}.{n}": x.clone() for key, h in context.history().items() for n, x in h.tensors().items()}
