"""From a video and a checkpoint to a restored video: what `zsvr restore` and `zsvr.restore` do."""

from __future__ import annotations

import itertools
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zsvr import degrading, hosts, operators, priors, runs, video
from zsvr import flow as flows
from zsvr.files import hash_file, hash_json, hash_tensors
from zsvr.flow import Flow
from zsvr.operators.base import Operator, to_model, to_unit
from zsvr.priors.base import Prior
from zsvr.restoration import Report, Restoration, Sampling, describe_shots
from zsvr.temporal.semantic import open_clip_encoder
from zsvr.temporal.settings import Temporal

Path = str | os.PathLike[str]
MODES = ("real", "synthetic")
LEVEL = 1 / 255  # a picture file may round that much
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class Restored:
    """A restored clip and how it came about.

    Attributes:
        frames: float32 ``[T, 3, Hc, Wc]`` in [0, 1], on the CPU.
        degraded: what was restored, as a picture ``[T, 3, Hy, Wy]`` in [0, 1].
        clean: the input prepared, in synthetic mode; else None.
        config: everything that decides the result; see `zsvr.runs.config`.
        rate, times, sound, depth: of the input video, for writing the result.
        patch: table of the patched attention layers, "" where attention was left alone.
        seconds: of sampling.
        notes: what a user should know.
    """

    frames: Tensor
    degraded: Tensor
    clean: Tensor | None
    config: dict[str, Any]
    rate: Any = 24
    times: tuple[float, ...] | None = None
    sound: Any = None
    depth: int = 8
    patch: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass
class Job:
    """A restoration, opened and checked but not yet run; see `restore` for the fields."""

    restoration: Restoration
    clip: video.Video
    degraded: Tensor
    clean: Tensor | None
    config: dict[str, Any]
    run: runs.Run | None = None
    notes: list[str] = field(default_factory=list)

    def start(self, callback: Callable[[Report], None] | None = None) -> Restored:
        """Sample and return the result."""
        started = time.perf_counter()
        frames = self.restoration.run(callback).float().cpu()
        seconds = time.perf_counter() - started
        if self.run is not None:
            for n, frame in enumerate(frames):
                self.run.write_frame(n, frame, depth=8 if self.clip.depth == 8 else 16)
        patch = "" if self.restoration.patch is None else str(self.restoration.patch)
        return Restored(
            frames, self.degraded, self.clean, self.config, self.clip.rate, self.clip.times, self.clip.sound,
            self.clip.depth, patch, seconds, tuple(self.notes),
        )  # fmt: skip


def restore(
    source: Path | Tensor,
    *,
    prior: Prior | Path = "adm256",
    prior_options: Mapping[str, Any] | None = None,
    task: str | None = None,
    operator: Operator | Mapping[str, Any] | None = None,
    host: str = "auto",
    host_options: Mapping[str, Any] | None = None,
    temporal: Temporal | str = "paper",
    sampling: Sampling | None = None,
    steps: int | None = None,
    noise_std: float = 0.0,
    mode: str = "real",
    prepare: str = "square",
    seed: int = 0,
    start: int = 0,
    stop: int | None = None,
    flow: Flow | None = None,
    flow_path: Path | None = None,
    run: Path | None = None,
    device: torch.device | str | None = None,
    dtype: str = "fp32",
    compile: bool = False,
    expected_count: int | None = None,
    callback: Callable[[Report], None] | None = None,
) -> Restored:
    """Restore a degraded clip with a pre-trained image diffusion model; no training.

    Args:
        source: a video or folder of pictures, or frames ``[T, 3, H, W]`` in [0, 1]. A video that `zsvr degrade` wrote,
            without ``task`` and ``operator``: its exact measurement and operator, which are beside it.
        prior: an opened prior, or what `zsvr.priors.open` takes, with ``prior_options``; ``"adm256"`` is the published
            256 x 256 network.
        task: of `zsvr.operators.make`: "denoise", "sr", "deblur", "inpaint", "colorize", "lowlight", or an operator's
            name.
        operator: its arguments, or an operator.
        host, host_options: of `zsvr.hosts.make`.
        temporal: `Temporal`, or the name of a preset.
        sampling: the schedule; ``steps`` is a short form of it.
        noise_std: standard deviation of the measurement's noise in [0, 1] units.
        mode: ``"real"``: the input is degraded already. ``"synthetic"``: it is clean; it is degraded first.
        prepare: ``"square"``: crop and resize the input, so that the canvas is what the prior was trained at;
            ``"none"``: leave it. Exact measurements are never changed.
        seed: of all noise, 0..2^63-1.
        start, stop: range of frames of the source.
        flow: of these frames on its canvas, instead of estimating it; ``flow_path``: weights (raft_large) or folder of
            .flo files (given).
        run: folder that keeps config, flow and frames; an interrupted run goes on there with its flow.
        device, dtype: of the network; None: a GPU if there is one. ``"fp32"``, ``"bf16"``, ``"fp16"``. A prior that
            is open already stays where it is, as it is.
        compile: compile the network with torch.compile.
        expected_count: attention layers that are to be replaced; None: what is known of the prior.
        callback: called after every sampling operation.

    Returns:
        A `Restored`; write it with `zsvr.video.write`.

    Raises:
        ValueError, TypeError, FileNotFoundError: input and options that do not fit; says what would.
        zsvr.restoration.NotFiniteError: the prior gave NaN.

    Source: Cao et al. 2024, "Zero-Shot Video Restoration and Enhancement Using Pre-Trained Image Diffusion Model"
    (arXiv 2407.01960).

    Example:
        >>> result = zsvr.restore("noisy.mp4", task="denoise", noise_std=0.1)
        >>> zsvr.video.write("restored.mp4", result.frames, rate=result.rate, sound=result.sound)
    """
    job = open_job(
        source, prior=prior, prior_options=prior_options, task=task, operator=operator, host=host,
        host_options=host_options, temporal=temporal, sampling=sampling, steps=steps, noise_std=noise_std, mode=mode,
        prepare=prepare, seed=seed, start=start, stop=stop, flow=flow, flow_path=flow_path, run=run, device=device,
        dtype=dtype, compile=compile, expected_count=expected_count,
    )  # fmt: skip
    return job.start(callback)


def open_job(
    source: Path | Tensor,
    *,
    prior: Prior | Path = "adm256",
    prior_options: Mapping[str, Any] | None = None,
    task: str | None = None,
    operator: Operator | Mapping[str, Any] | None = None,
    host: str = "auto",
    host_options: Mapping[str, Any] | None = None,
    temporal: Temporal | str = "paper",
    sampling: Sampling | None = None,
    steps: int | None = None,
    noise_std: float = 0.0,
    mode: str = "real",
    prepare: str = "square",
    seed: int = 0,
    start: int = 0,
    stop: int | None = None,
    flow: Flow | None = None,
    flow_path: Path | None = None,
    run: Path | None = None,
    device: torch.device | str | None = None,
    dtype: str = "fp32",
    compile: bool = False,
    expected_count: int | None = None,
    command: tuple[str, ...] = (),
) -> Job:
    """Open and check everything that `restore` needs, estimate flow, and run nothing of the network.

    Arguments as in `restore`; ``command`` is kept in the run's folder.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place = choose_device(prior, device)
    settings = Temporal.preset(temporal) if isinstance(temporal, str) else temporal
    schedule = Sampling() if sampling is None else sampling
    if steps is not None:
        schedule = Sampling(steps, schedule.spacing, schedule.travel, schedule.latent_host, schedule.latent_every)
    if isinstance(source, Tensor):
        clip = video.Video(_frames(source)[start:stop].float(), 24)  # type: ignore[arg-type]
        if not len(clip.frames):
            raise ValueError(f"no frames from {start} to {stop}: the source has {len(source)}")
    else:
        clip = video.read(source, start, stop)
    notes = list(clip.notes)

    measured = _saved_measurement(source, task, operator, mode)
    if measured is not None:
        notes.append("the exact measurement and operator beside the video are used")
        if noise_std not in (0, measured.noise_std):
            raise ValueError(
                f"noise_std is {noise_std}, but {measured.noise_std} was added, as is recorded beside the video: leave "
                "it out, or name the task to restore the pictures alone"
            )
        chosen = measured.operator.select(range(len(measured.y))[start:stop])
        noise_std = measured.noise_std
    else:
        chosen = _operator(task, operator)
    given = dict(prior_options or {})
    if isinstance(prior, Prior) and given:
        raise ValueError(f"the prior is open already, so {', '.join(sorted(given))} cannot be set")
    opened = prior if isinstance(prior, Prior) else priors.open(prior, device=place, dtype=DTYPES[dtype], **given)
    if compile:
        opened.model.compile()

    clean: Tensor | None = None
    if measured is not None:
        y = measured.y[start:stop]
        shown = measured.picture[start:stop]
        if len(y) != len(clip.frames):
            raise ValueError(f"{source} has {len(clip.frames)} frames, the exact measurement beside it {len(y)}")
        if shown.shape != clip.frames.shape or float((shown - clip.frames).abs().max()) > LEVEL:
            raise ValueError(
                f"{source} shows other pictures than the exact measurement beside it: it was changed since; name the "
                "task to restore the pictures, or degrade anew"
            )
    elif mode == "synthetic":
        clean = degrading.prepare(clip.frames, prepare, opened.size[0])
        notes += degrading.describe_preparation(clip.frames, clean)
        y = degrading.degrade(clean, chosen, noise_std=noise_std, seed=seed, first=start).y
    else:
        side = chosen.measured_shape(opened.size)[1] if prepare == "square" else 0
        pictures = degrading.prepare(clip.frames, prepare, side)
        notes += degrading.describe_preparation(clip.frames, pictures)
        y = chosen.from_picture(pictures)

    method = hosts.make(host, operator=chosen, noise_std=noise_std, **(host_options or {}))
    options = settings.to_dict() | {
        "host": method.describe(), "noise_std": noise_std, "mode": mode, "data.prepare": prepare, "start": start,
        "stop": stop, "compile": compile, "expected_count": expected_count, "prior.options": given,
        "sampler.steps": schedule.steps, "sampler.spacing": schedule.spacing, "sampler.travel": list(schedule.travel),
        "latent.host": schedule.latent_host, "latent.every": schedule.latent_every,
        "dtype": "as opened" if isinstance(prior, Prior) else dtype,
    }  # fmt: skip
    inputs = {"input": hash_tensors({"frames": clip.frames}) if isinstance(source, Tensor) else _hash(source)}
    if measured is not None:
        inputs["measurement"] = hash_tensors({"y": measured.y})
    if flow is not None:
        inputs["flow"] = hash_tensors(flow.tensors())
    guidance = settings.guidance
    encoder, weights = None, {}
    if guidance is not None and guidance.is_semantic_on:
        assert guidance.clip is not None
        encoder = open_clip_encoder(guidance.clip, device=place)
        weights["guidance.clip"] = hash_file(guidance.clip)
    if flow_path is not None and pathlib.Path(flow_path).exists():
        weights["flow"] = hash_file(flow_path)
    config = runs.config(
        options, inputs=inputs, weights=weights, seed=seed,
        extra={"operator": _plain(chosen.describe()), "prior": opened.describe(), "device": runs.device(place)},
    )  # fmt: skip
    first = chosen.select(range(1))  # one frame needs no flow: what does not fit is found before anything is made
    method.start(y[:1], first, seed)
    Restoration(y[:1], first, opened, method, settings, schedule, seed=seed)
    needs_flow = settings.needs_flow and len(y) > 1
    estimator: flows.Estimator | None = None
    if needs_flow and (flow is None or settings.flow.refresh_every):
        estimator = flows.estimator(settings.flow.estimator, path=flow_path, device=place, start=start)
    folder = None if run is None else runs.Run.create(run, config, command=command)
    if flow is None and estimator is not None:
        u = _seen_by_flow(settings, chosen, y, clean)
        estimate = flows.estimate if folder is None else folder.flow
        flow = estimate(u, estimator, settings.flow)
    if flow is not None and bool(flow.cuts.any()):
        parts = [0, *(flow.cuts.nonzero().flatten() + 1).tolist(), len(y)]
        shots = [range(a, b) for a, b in itertools.pairwise(parts)]
        notes.append(f"{int(flow.cuts.sum())} cuts found; shots {describe_shots(shots)} are restored separately")

    def reestimate(u: Tensor) -> Flow:
        assert estimator is not None
        return flows.estimate(u.float().cpu(), estimator, settings.flow)

    restoration = Restoration(
        y.to(place), chosen, opened, method, settings, schedule,
        flow=None if flow is None else flow.to(place), seed=seed, first=start, expected_count=expected_count,
        encoder=encoder, reestimate=None if estimator is None else reestimate,
    )  # fmt: skip
    degraded = to_unit(y)
    degraded = degraded.expand(-1, 3, -1, -1) if degraded.shape[1] == 1 else degraded
    return Job(restoration, clip, degraded, clean, config, folder, notes)


def choose_device(prior: Prior | Path | None, device: torch.device | str | None) -> torch.device:
    """Return where to compute: where an opened prior is, what was asked for, or a GPU if there is one.

    Raises:
        ValueError: the device does not exist here, or the prior is elsewhere.
    """
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was asked for, but torch {torch.__version__} finds no GPU here")
    first = next(prior.model.parameters(), None) if isinstance(prior, Prior) else None
    if first is None:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    place = first.device
    if device is not None and torch.device(device).type != place.type:
        raise ValueError(f"the prior is on {place}, but device is {device}: move it, or leave device out")
    return place


def _frames(source: Tensor) -> Tensor:
    """Return the frames if they are ``[T, 3, H, W]`` in [0, 1].

    Raises:
        ValueError: they are not.
    """
    if source.dim() != 4 or source.shape[1] != 3 or not len(source) or not source.is_floating_point():
        raise ValueError(f"frames must be floating [T, 3, H, W], got {tuple(source.shape)} of {source.dtype}")
    if not bool(((source >= 0) & (source <= 1)).all()):
        least, most = source.min().item(), source.max().item()
        raise ValueError(f"frames must be finite and within [0, 1], got {least:g} to {most:g}: scale or clip them")
    return source


def _saved_measurement(source: Any, task: Any, operator: Any, mode: str) -> degrading.Measurement | None:
    if isinstance(source, Tensor) or task is not None or operator is not None or mode != "real":
        return None
    values, _ = degrading.beside(source)
    if not values.is_file():
        raise ValueError(
            f"name the task or operator: {source} was not made by `zsvr degrade` (there is no {values.name} beside it)"
        )
    return degrading.load(source)


def _operator(task: str | None, operator: Operator | Mapping[str, Any] | None) -> Operator:
    if isinstance(operator, Operator):
        names = {operators.TASKS.get(task or "", task), "blur_fft" if task == "deblur" else None}
        if task is not None and operator.name not in names:
            raise ValueError(f"task {task!r} and operator {operator} say different things: give one of them")
        return operator
    if task is None:
        raise ValueError(f"name the task: one of {', '.join(sorted({*operators.TASKS, *operators.REGISTRY}))}")
    return operators.make(task, **(operator or {}))


def _seen_by_flow(settings: Temporal, operator: Operator, y: Tensor, clean: Tensor | None) -> Tensor:
    if settings.flow.source != "clean":
        return operator.preview(y).float().cpu()
    if clean is None:
        raise ValueError('flow.source="clean" needs mode="synthetic": a real input has no clean frames')
    return clean


def _hash(source: Path) -> str:
    path = pathlib.Path(source)
    if path.is_dir():
        return hash_json({picture.name: hash_file(picture) for picture in video.reading.pictures(path)})
    return hash_file(path)


def _plain(value: Any) -> Any:
    """Return a description for JSON: tensors by shape and hash."""
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "sha256": hash_tensors({"value": value})}
    if isinstance(value, Mapping):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return value


__all__ = ["Job", "Restored", "open_job", "restore", "to_model"]
