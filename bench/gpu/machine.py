"""Where measurements run: a CUDA device, timed by events, or the host, on which every line can be tried out.

A contestant is timed in three ways. cold: one replay of its CUDA graph, after the second-level cache was overwritten;
warm: replays back to back; eager: calls from Python back to back, launches included. The functions of a `Prepared`
advance `now` by what one call took, so `bench.timing.Rounds` counts device time as any other.
"""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench import memory
from bench.contest import reason
from zsvr_kernels import _triton

MODES = ("cold", "warm", "eager")
WARM_SECONDS = 3e-4  # a graph of repeated calls is at least this long
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "pstate")
THROTTLE_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # of newer, older drivers

Call = Callable[[], Any]


@dataclass
class Prepared:
    """A contestant that can be timed."""

    cold: Call
    warm: Call
    eager: Call
    why_not_graphed: str = ""


class Host:
    """The CPU in the GPU's place: for trying the code out, not for results."""

    name = "dry run on a CPU"
    is_spent = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.has_triton = _triton.is_interpreted and not _triton.why_missing
        self.backend = "triton" if self.has_triton else "reference"
        self.elapsed = 0.0

    def now(self) -> float:
        return self.elapsed

    def synchronize(self) -> None:
        pass

    def prepare(self, call: Call) -> Prepared:
        """Time one call; every sample repeats that time, since an interpreted kernel takes seconds."""
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start

        def timed() -> None:
            self.elapsed += seconds

        return Prepared(timed, timed, timed)

    def peak_extra(self, call: Call) -> int | None:
        return memory.peak_extra(call)

    def clocks(self) -> dict[str, str]:
        return {}

    def tidy(self) -> None:
        gc.collect()


class Cuda:
    """The current CUDA device; the process works on one side stream, as graph capture wants it."""

    backend = "triton"
    has_triton = True
    is_spent = False  # a capture failed, after which the allocator may go on as if it had not ended

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self.elapsed = 0.0
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        properties = torch.cuda.get_device_properties(self.device)
        self._flushed = torch.empty(max(256 << 20, 4 * properties.L2_cache_size), dtype=torch.uint8, device=self.device)
        # nvidia-smi counts devices by itself, whatever CUDA_VISIBLE_DEVICES says.
        self._smi = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else str(self.device.index)
        self._pool = torch.cuda.graph_pool_handle()  # shared: nobody reads what a replay leaves

    def now(self) -> float:
        return self.elapsed

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def _timed(self, launch: Call, count: int = 1, before: Call | None = None) -> float:
        """Return the seconds of device time of one of the ``count`` calls that ``launch`` makes."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if before is not None:
            before()  # it keeps the device busy while the host issues what is timed
        start.record()
        launch()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) * 1e-3 / count
        self.elapsed += seconds
        return seconds

    def _capture(self, call: Call, count: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
            for _ in range(count):
                call()
        return graph

    def prepare(self, call: Call) -> Prepared:
        """Warm a contestant up, capture it, and choose how often a sample repeats it."""
        for _ in range(2):
            call()
        seconds = self._timed(call)
        calls = max(1, min(10, int(2e-3 / max(seconds, 1e-6))))

        def eagerly() -> None:
            for _ in range(calls):
                call()

        why, one, many, count = "", call, eagerly, calls
        try:
            one = self._capture(call, 1).replay
            once = min(self._timed(one) for _ in range(3))
            count = max(1, min(20, int(WARM_SECONDS / max(once, 1e-6))))
            many = one if count == 1 else self._capture(call, count).replay
        except (RuntimeError, AssertionError) as error:
            self.synchronize()
            self.is_spent = True
            why, one, many, count = reason(error), call, eagerly, calls
        return Prepared(
            cold=lambda: self._timed(one, before=lambda: self._flushed.fill_(1)),
            warm=lambda: self._timed(many, count, before=many),
            eager=lambda: self._timed(eagerly, calls),
            why_not_graphed=why,
        )

    def peak_extra(self, call: Call) -> int | None:
        return memory.peak_extra_cuda(call, self.device)

    def clocks(self) -> dict[str, str]:
        """Return clocks in MHz, what holds them down, temperature and power, as nvidia-smi says; nothing is set."""
        for throttle in THROTTLE_FIELDS:
            fields = (*CLOCK_FIELDS, throttle)
            command = ["nvidia-smi", f"--id={self._smi}", f"--query-gpu={','.join(fields)}",
                       "--format=csv,noheader,nounits"]  # fmt: skip
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=10)
            except (OSError, subprocess.TimeoutExpired):
                return {}
            if done.returncode == 0:
                names = (*CLOCK_FIELDS, "throttle_reasons")
                return dict(zip(names, (x.strip() for x in done.stdout.strip().split(",")), strict=False))
        return {}

    def tidy(self) -> None:
        """Give back what a step held, and find out whether the device still answers."""
        gc.collect()
        self.synchronize()
        torch.cuda.empty_cache()
        self._pool = torch.cuda.graph_pool_handle()


Machine = Cuda | Host


def best(machine: Machine, call: Call, *, mode: str = "warm", samples: int = 7) -> float:
    """Return the least of several times of a call, in seconds: for ceilings."""
    timed = getattr(machine.prepare(call), mode)
    least = float("inf")
    for _ in range(samples):
        start = machine.now()
        timed()
        least = min(least, machine.now() - start)
    return max(least, 1e-9)
