"""What a run will take, before it runs: layers, memory, time from one timed step."""

from __future__ import annotations

import os
import pathlib
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zsvr.pipeline import Job
from zsvr.priors.base import Prior
from zsvr.restoration import _Window, checkpointed, describe_shots


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, without holding any; views of a prior's weights count nothing."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.now = self.peak = 0
        networks = [x for x in (prior.model, *vars(prior).values()) if isinstance(x, nn.Module)]
        self._weights = [x.untyped_storage() for net in networks for x in (*net.parameters(), *net.buffers())]
        self._seen: dict[int, int] = {id(storage): 0 for storage in self._weights}

    def _forget(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            key = id(storage)
            if key not in self._seen:
                self._seen[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self.now)
        return out


def network_bytes(prior: Prior, frames: int, size: tuple[int, int], device: torch.device, *, gradient: bool) -> int:
    """Return the bytes that one call of the network needs beside its weights, from a call with one frame.

    Args:
        frames: T of the call. size: of what is denoised, ``(h, w)``.
        gradient: with a backward to the network's input.
    """
    with torch.set_grad_enabled(gradient), _LiveBytes(prior) as live:
        x = torch.zeros(1, prior.channels, *size, device=device, requires_grad=gradient)
        eps, _ = prior.predict(x, 0)
        if gradient:
            torch.autograd.grad(eps.sum(), x)
    return live.peak * frames


def decoder_bytes(prior: Prior, frames: int, size: tuple[int, int], device: torch.device, *, gradient: bool) -> int:
    """Return the bytes that decoding needs beside the weights, from one frame; 0 of a prior of pixels.

    Arguments as in `network_bytes`.
    """
    if prior.factor == 1:
        return 0
    with torch.set_grad_enabled(gradient), _LiveBytes(prior) as live:
        x = torch.zeros(1, prior.channels, *size, device=device, requires_grad=gradient)
        u = prior.decode(x)
        if gradient:
            torch.autograd.grad(u.sum(), x)
    return live.peak * frames


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a device can still give; of the CPU what the system can free, caches included.

    Where the system does not say (outside Linux), all memory there is.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    facts = pathlib.Path("/proc/meminfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Plan:
    """What `plan` found; ``str(plan)`` is a report.

    Attributes:
        facts: lines of (what, value).
        seconds: of one sampling operation, measured.
        total_seconds: of the whole run, estimated from it.
        needed_bytes, free_bytes: of the device. frames_that_fit: T that the free memory allows.
        layers: table of the attention layers.
    """

    facts: tuple[tuple[str, str], ...]
    seconds: float
    total_seconds: float
    needed_bytes: int
    free_bytes: int
    frames_that_fit: int
    layers: str

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.facts)
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts]
        return "\n".join(lines + ([self.layers] if self.layers else []))


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def needed_bytes(job: Job) -> tuple[int, int]:
    """Return the bytes that a run needs beside the weights, and how many frames the free memory allows."""
    clip = job.restoration
    longest = max(len(shot) for shot in clip.shots)
    guides = clip.temporal.guidance is not None and clip.temporal.guidance.target == "x"
    differentiates = clip.host.needs_network_gradient and clip.host_acts(clip.last)
    where = (clip.size, clip.y.device)
    with checkpointed(clip.prior.model, clip.host):
        network = network_bytes(clip.prior, longest, *where, gradient=differentiates or guides)
    at_once = 1 if getattr(clip.host, "checkpoint", False) else longest
    at_once = at_once if differentiates else min(longest, getattr(clip.prior, "vae_frames", longest))
    decoder = decoder_bytes(clip.prior, at_once, *where, gradient=differentiates)
    network = network + decoder if differentiates else max(network, decoder)  # its graph waits for the decoder's
    state = clip.y.nbytes + 8 * 4 * longest * clip.prior.channels * clip.size[0] * clip.size[1]
    flow = 0 if clip.flow is None else sum(x.nbytes for x in clip.flow.tensors().values())
    needed = network + state + flow
    return needed, int(longest * free_bytes(clip.y.device) / max(needed, 1))


def plan(job: Job, clock: Callable[[], float] = time.perf_counter) -> Plan:
    """Time one sampling operation and return what the whole run will take."""
    clip = job.restoration
    needed, fitting = needed_bytes(job)
    window = _Window(clip, clip.shots[0], None)
    with window.installed():
        started = clock()
        next(iter(window.run(0, 1)))
        if clip.y.is_cuda:
            torch.cuda.synchronize(clip.y.device)
        seconds = clock() - started
    share = sum(len(shot) for shot in clip.shots) / len(clip.shots[0])
    total = seconds * len(clip.operations) * share
    weights = sum(p.nbytes for p in clip.prior.model.parameters())
    on = clip.temporal
    facts = (
        ("clip", f"{clip.frames} frames, canvas {clip.canvas[1]}x{clip.canvas[0]}, measured {tuple(clip.y.shape[1:])}"),
        ("shots", describe_shots(clip.shots)),
        ("operator", str(clip.operator)),
        ("prior", f"{type(clip.prior).__name__}, {_gigabytes(weights)} of weights on {clip.y.device}"),
        ("host", f"{clip.host.name}, {len(clip.operations)} operations, {clip.steps[0]}..{clip.steps[clip.last]}"),
        ("attention", "off" if on.slr is None else f"{on.slr.combine}, frames {on.slr.frames}"),
        ("guidance", "off" if on.guidance is None else f"gain {on.guidance.gain:g}, {on.guidance.norm}"),
        ("noise", on.noise.sharing),
        ("memory", f"{_gigabytes(needed)} beside the weights, {_gigabytes(free_bytes(clip.y.device))} free: "
                   f"about {fitting} frames fit"),
        ("time", f"{seconds:.2f} s for one operation (the first, warm-up included), about {total / 60:.1f} min in all"),
    )  # fmt: skip
    layers = "" if clip.patch is None else str(clip.patch)
    return Plan(facts, seconds, total, needed, free_bytes(clip.y.device), fitting, layers)
