"""Ceilings of the machine, measured in the same process as the kernels: arithmetic from registers, reads, matmul."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from zsvr_kernels import _native

FMA_FP32, DOT_BF16, TILE_BF16, READ = range(4)  # the native enum Probe
ARITHMETIC = {"fma_fp32": FMA_FP32, "dot_bf16": DOT_BF16, "tile_bf16": TILE_BF16}
# Bytes that every worker reads: half a first-level cache, half a second-level one, beyond both, beyond all.
READS = {"read_l1": 16 << 10, "read_l2": 1 << 20, "read_l3": 12 << 20, "read_dram": 512 << 20}
SECONDS = 0.02  # length of one sample


def _native_probe(kind: int, iterations: int, data: torch.Tensor | None, floats: int) -> float:
    """Run a native probe once on all of torch's threads and return FLOP/s or bytes/s."""
    threads = _native.threads()
    sink = torch.empty(threads, dtype=torch.float32)
    address = 0 if data is None else data.data_ptr()
    start = time.perf_counter()
    work = _native.module().probe(kind, iterations, address, floats, sink.data_ptr(), _native.parallel_for(), threads)
    return work / (time.perf_counter() - start)


class Arithmetic:
    """A register probe, calibrated once; each call is one sample in FLOP/s.

    Raises:
        RuntimeError: the active instruction set lacks the instruction, or there is no native module.
    """

    def __init__(self, name: str, seconds: float = SECONDS) -> None:
        self.name = name
        self.kind = ARITHMETIC[name]
        self.iterations = 64
        while True:
            start = time.perf_counter()
            _native_probe(self.kind, self.iterations, None, 0)
            elapsed = time.perf_counter() - start
            if elapsed > seconds / 4:
                break
            self.iterations *= 4
        self.iterations = max(1, int(self.iterations * seconds / elapsed))

    def __call__(self) -> float:
        return _native_probe(self.kind, self.iterations, None, 0)


def _best(sample: Callable[[], float], seconds: float) -> float:
    """Return the largest of the samples that fit into the time (at least three): a ceiling, not a mean."""
    stop, best, count = time.perf_counter() + seconds, 0.0, 0
    while count < 3 or time.perf_counter() < stop:
        best, count = max(best, sample()), count + 1
    return best


def _read(size: int, seconds: float) -> float:
    data = torch.ones(_native.threads() * size // 4, dtype=torch.float32)
    passes = max(1, (64 << 20) // size)
    return _best(lambda: _native_probe(READ, passes, data, size // 4), seconds)


def _matmul(dtype: torch.dtype, seconds: float, size: int = 2048) -> float:
    a, b = torch.ones(2, size, size, dtype=dtype).unbind(0)
    out = torch.empty_like(a)

    def sample() -> float:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        return 2 * size**3 / (time.perf_counter() - start)

    return _best(sample, seconds)


def measure(*, seconds: float = 0.5, dram: bool = True) -> dict[str, float | None]:
    """Return every ceiling for torch's current number of threads, in FLOP/s or bytes/s.

    None where this machine or build has no such thing. Each takes about ``seconds``.
    """
    ceilings: dict[str, float | None] = {}
    for name in ARITHMETIC:
        try:
            ceilings[name] = _best(Arithmetic(name), seconds)
        except RuntimeError:  # no native module, or an instruction set without it
            ceilings[name] = None
    for name, size in READS.items():
        wanted = _native.is_available() and (dram or name != "read_dram")
        ceilings[name] = _read(size, seconds) if wanted else None
    ceilings["mm_fp32"] = _matmul(torch.float32, seconds)
    ceilings["mm_bf16"] = _matmul(torch.bfloat16, seconds)
    return ceilings
