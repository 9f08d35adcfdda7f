"""Does torch's SDPA take overlapping views of K and V: each of its kernels, forward and backward, against copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.contest import reason
from bench.gpu.machine import Machine, best
from bench.peers import SDPA_BACKENDS
from bench.shapes import DTYPES, LEVELS

Record = dict[str, Any]


def overlapping(x: Tensor) -> Tensor:
    """Return windows of two adjacent frames ``[T-1, H, 2*P, D]`` over ``x [T, P, H, D]``, without a copy."""
    T, P, H, D = x.shape
    frame, site, head, _ = x.stride()
    return x.as_strided((T - 1, H, 2 * P, D), (frame, head, site, 1), x.storage_offset())


def _step(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, backend: SDPBackend) -> tuple[Tensor, ...]:
    """Return output and gradients with respect to the windows themselves: nothing differentiates the views."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, d_o)


def _compare(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Record:
    found: Record = {}
    for name, x, y in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
        found[name] = {
            "equal": torch.equal(x, y),
            "difference": float((x.double() - y.double()).abs().max()),
            "largest": float(y.double().abs().max()),
            "nan": int(torch.isnan(x).sum()),
        }
    return found


def measure(machine: Machine, level: str, dtype: str, T: int) -> Record:
    """Return, for every SDPA kernel: equality with a call on copies, NaN, and the time of both."""
    shape = LEVELS[level]
    P, H, D = shape.grid[0] * shape.grid[1], shape.H, shape.D
    generator = torch.Generator(machine.device).manual_seed(5)
    tokens = torch.randn(3, T, P, H, D, generator=generator, device=machine.device).to(DTYPES[dtype])
    q = tokens[0, 1:].transpose(1, 2)  # [T-1, H, P, D]
    k, v = tokens[1], tokens[2]
    d_o = torch.randn(q.shape, generator=generator, device=machine.device).to(q.dtype)
    backends = SDPA_BACKENDS if machine.device.type == "cuda" else {"flash": SDPBackend.FLASH_ATTENTION}
    found: Record = {}
    for name, backend in backends.items():

        def forward(copies: bool, backend: SDPBackend = backend) -> Tensor:
            keys, values = overlapping(k), overlapping(v)
            if copies:
                keys, values = keys.contiguous(), values.contiguous()
            with torch.no_grad(), sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, keys, values)

        def step(copies: bool, backend: SDPBackend = backend) -> tuple[Tensor, ...]:
            keys, values = overlapping(k), overlapping(v)
            if copies:
                keys, values = keys.contiguous(), values.contiguous()
            return _step(q, keys, values, d_o, backend)

        def seconds(call: Callable[[bool], Any], copies: bool) -> float:
            return best(machine, lambda: call(copies), mode="cold", samples=5)

        try:
            # Another query of the same process must not change what the windows see: compared last.
            record = {"fwd": {c: seconds(forward, c == "copies") for c in ("views", "copies")}}
            record["step"] = {c: seconds(step, c == "copies") for c in ("views", "copies")}
            record["compared"] = _compare(step(False), step(True))
        except RuntimeError as error:
            machine.synchronize()
            record = {"error": reason(error)}
        found[name] = record
    return {"level": level, "dtype": dtype, "T": T, "kernels": found}
