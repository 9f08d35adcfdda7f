"""Where the time of a sampling step goes: network, attention, flow, guidance, host, noise, everything else."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from zsvr import flow as flows
from zsvr import hosts, operators, priors, video
from zsvr.degrading import degrade
from zsvr.pipeline import DTYPES, choose_device
from zsvr.priors.base import Prior
from zsvr.restoration import Restoration, Sampling, _Window
from zsvr.temporal.guidance import ConsistencyGuidance
from zsvr.temporal.settings import Temporal


@dataclass
class Profile:
    """Seconds by part; ``str(profile)`` is a table.

    Attributes:
        seconds: of one sampling step, by part. "network" is all of it but the attention layers.
        total: of one step.
        before: flow, once per clip. reading, writing: of the clip as a lossless video.
        what: the set-up in words.
    """

    what: str
    total: float
    before: float
    reading: float
    writing: float
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def overhead(self) -> float:
        """Share of a step outside the network and attention."""
        return 1 - (self.seconds.get("network", 0.0) + self.seconds.get("attention", 0.0)) / self.total

    def __str__(self) -> str:
        lines = [self.what, f"{'part':<24}{'ms':>10}{'share':>8}"]
        for name, value in sorted(self.seconds.items(), key=lambda item: -item[1]):
            lines.append(f"{name:<24}{1e3 * value:>10.1f}{value / self.total:>8.1%}")
        lines.append(f"{'one step':<24}{1e3 * self.total:>10.1f}")
        lines.append(f"{'flow, once per clip':<24}{1e3 * self.before:>10.1f}")
        lines.append(f"{'reading, once per clip':<24}{1e3 * self.reading:>10.1f}")
        lines.append(f"{'writing, once per clip':<24}{1e3 * self.writing:>10.1f}")
        lines.append(f"outside network and attention: {self.overhead:.1%}")
        return "\n".join(lines)


class _Clock:
    """Adds up the time within named calls; nested calls count for the inner name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._open: list[list[Any]] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._open.append([name, self.now(), 0.0])
        try:
            yield
        finally:
            _, started, inner = self._open.pop()
            spent = self.now() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - inner
            if self._open:
                self._open[-1][2] += spent

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with self.part(name):
                return function(*arguments, **keywords)

        return call


def random_adm(width: int, size: int, device: torch.device, dtype: torch.dtype) -> Prior:
    """Return a prior of ADM's layout at another width, with random weights."""
    from diffusers import UNet2DModel

    levels = (1, 1, 2, 2, 4, 4) if size >= 256 else (1, 2, 2, 4)
    attention = 3 if size >= 256 else 2
    plain = len(levels) - attention
    torch.manual_seed(0)
    model: Any = UNet2DModel(
        sample_size=size, in_channels=3, out_channels=6, layers_per_block=2,
        block_out_channels=tuple(width * m for m in levels), attention_head_dim=min(64, width),
        down_block_types=("ResnetDownsampleBlock2D",) * plain + ("AttnDownBlock2D",) * attention,
        up_block_types=("AttnUpBlock2D",) * attention + ("ResnetUpsampleBlock2D",) * plain,
        downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32, norm_eps=1e-5,
    )  # fmt: skip
    model = model.to(device) if dtype == torch.float32 else model.to(device, dtype)
    schedule = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
    return priors.PixelPrior(model.eval(), schedule, facts={"kind": "random ADM layout"})


def profile(
    *,
    prior: Prior | str | None = None,
    width: int = 64,
    size: int = 128,
    frames: int = 4,
    steps: int = 2,
    host: str = "ddnm",
    device: torch.device | str | None = None,
    dtype: str = "fp32",
    temporal: Temporal | None = None,
) -> Profile:
    """Time sampling steps of super-resolution on a moving random texture, part by part.

    Args:
        prior: an opened prior or a path; None: a network of ADM's layout, ``width`` channels, random weights.
        size: side of the frames. frames: T. steps: steps that are timed, after one to warm up.
        host: see `zsvr.hosts.make`. temporal: None: the preset "paper", with similarity correction at every step.

    Raises:
        ValueError: numbers below 1, or parts that do not fit each other.
    """
    if dtype not in DTYPES or min(frames, steps, size, width) < 1:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES)}, and frames, steps, size and width at least 1, got {dtype}, "
            f"{frames}, {steps}, {size}, {width}"
        )
    place = choose_device(prior, device)
    kind = DTYPES[dtype]
    if prior is None:
        opened = random_adm(width, size, place, kind)
    else:
        opened = prior if isinstance(prior, Prior) else priors.open(prior, device=place, dtype=kind)
    texture = torch.rand(3, size + 64, size + 64, generator=torch.Generator().manual_seed(0))
    texture = torch.nn.functional.avg_pool2d(texture, 5, 1, 2)
    clean = torch.stack([texture[:, i : i + size, 2 * i : 2 * i + size] for i in range(frames)])
    operator = operators.make("sr_avg", scale=4)
    y = degrade(clean, operator).y.to(place)
    started = time.perf_counter()
    flow = flows.estimate(operator.preview(y).cpu(), flows.estimator("dis"))
    before = time.perf_counter() - started
    settings = temporal or Temporal.preset("paper", {"correct.similarity_start": 0.0})
    clip = Restoration(
        y, operator, opened, hosts.make(host, operator=operator), settings, Sampling(steps + 2), flow=flow.to(place)
    )
    clock = _Clock(place)
    window = _Window(clip, clip.shots[0], None)
    with window.installed(), contextlib.ExitStack() as stack:
        layers = [] if clip.patch is None else [x.adapter.module for x in clip.patch.patched if x.adapter is not None]
        for module in layers:
            stack.enter_context(mock.patch.object(module, "forward", clock.timed("attention", module.forward)))
        for owner, name, part in (
            (opened, "predict", "network"), (clip.host, "advance", "host"), (window, "_noise", "noise"),
            (ConsistencyGuidance, "shift", "guidance"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, _method(clock, part, owner, name)))
        operations = window.run(0, steps + 2)
        next(operations)
        clock.seconds.clear()
        started = clock.now()
        for _ in range(steps):  # the last step of the schedule is left out: it draws no noise
            next(operations)
        total = clock.now() - started
    seconds = {name: value / steps for name, value in clock.seconds.items()}
    seconds["everything else"] = total / steps - sum(seconds.values())
    reading, writing = _time_files(clean)
    parameters = sum(p.numel() for p in opened.model.parameters())
    what = f"{frames} frames of {size}x{size}, network of {parameters / 1e6:.1f} M parameters, {dtype} on {place}"
    return Profile(what, total / steps, before, reading, writing, seconds)


def _time_files(frames: Tensor) -> tuple[float, float]:
    """Return the seconds that it takes to read and to write frames as a lossless video."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "clip.mkv"
        started = time.perf_counter()
        video.write(path, frames, lossless=True)
        written = time.perf_counter()
        video.read(path)
        return time.perf_counter() - written, written - started


def _method(clock: _Clock, part: str, owner: Any, name: str) -> Callable[..., Any]:
    """Return a timed stand-in for a method of an object or a class."""
    function = getattr(owner, name)
    if not isinstance(owner, type):
        return clock.timed(part, function)

    def call(self: Any, *arguments: Any, **keywords: Any) -> Tensor:
        with clock.part(part):
            return function(self, *arguments, **keywords)

    return call
