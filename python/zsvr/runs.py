"""The folder of a run: what it was asked for, what it gave, and what it can take up again.

::

    config.json    options, hashes of inputs and weights, seed, versions; the same run writes the same bytes
    command.txt    the command line that started it
    metrics.json   results
    flow/          optical flow, see `zsvr.flow.cached`
    frames/        restored frames as PNG, each written whole
"""

from __future__ import annotations

import json
import math
import pathlib
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from zsvr.files import Path, check_free, hash_json, new_file, to_json, write_text
from zsvr.flow import EstimationOptions, Estimator, Flow, cached
from zsvr.video.reading import Frame, stream
from zsvr.video.writing import picture_bytes
from zsvr_kernels.version import __version__

CONFIG, COMMAND, METRICS, FLOW, FRAMES = "config.json", "command.txt", "metrics.json", "flow", "frames"
FORMAT = "zsvr.Run 1"
PACKAGES = ("torch", "numpy", "diffusers", "transformers", "av", "opencv-python-headless", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions that results depend on; packages that are not installed are left out."""
    found = {"zsvr": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device(place: torch.device) -> dict[str, Any]:
    """Return what of a device decides the last bits of a result: its kind and name; of a CPU its threads, too."""
    if place.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(place)}
    if place.type != "cpu":
        return {"type": place.type}
    return {"type": "cpu", "name": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}


def config(
    options: Mapping[str, Any],
    *,
    inputs: Mapping[str, str],
    weights: Mapping[str, str],
    seed: int,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what config.json holds: everything that decides a run's result, and nothing else.

    Args:
        options: by name, values for JSON.
        inputs: SHA-256 of input files by role ("input", "reference", "mask"), see `zsvr.files.hash_file`.
        weights: SHA-256 of files of weights by role.
        seed: 0..2^63-1.
        extra: more of it, for instance descriptions of operator and prior.

    Raises:
        TypeError, ValueError: values that JSON does not know.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be within 0..2^63-1, got {seed}")
    whole: dict[str, Any] = {
        "format": FORMAT,
        "options": dict(options),
        "inputs": dict(inputs),
        "weights": dict(weights),
        "seed": seed,
        "versions": versions(),
    }
    taken = sorted(whole.keys() & (extra or {}).keys())
    if taken:
        raise ValueError(f"extra must not name {', '.join(taken)}: these are recorded already")
    return json.loads(to_json(whole | dict(extra or {})))


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Return a line for every value that differs between two configurations, as ``name: old, now new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            lines += differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        return lines
    return [] if old == new else [f"{name}: {json.dumps(old)}, now {json.dumps(new)}"]


class Run:
    """A run's folder, made by `create` or opened by `load`.

    Attributes:
        path: the folder.
        config: what config.json holds.
    """

    def __init__(self, path: pathlib.Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], *, command: Sequence[str] = ()) -> Run:
        """Return the run of ``config`` in ``path``: a new or empty folder, or one of the very same run, to go on with.

        Raises:
            FileNotFoundError: the folder above does not exist.
            FileExistsError: the folder belongs to another run (says what differs) or holds something else.
        """
        folder = pathlib.Path(path)
        wanted = json.loads(to_json(dict(config)))
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{folder} is a file: a run needs a folder")
        if (folder / CONFIG).exists():
            run = cls.load(folder)
            changed = differences(run.config, wanted)
            if changed:
                listed = "; ".join(changed[:5]) + (f"; and {len(changed) - 5} more" if len(changed) > 5 else "")
                raise FileExistsError(f"{folder} belongs to another run ({listed}): choose another folder")
            return run
        if folder.is_dir():
            foreign = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".zsvr-"))
            if foreign:
                raise FileExistsError(f"{folder} holds {', '.join(foreign[:3])} and no run: choose another folder")
        else:
            check_free(folder)
            folder.mkdir()
        write_text(folder / CONFIG, to_json(wanted))
        if command:
            write_text(folder / COMMAND, shlex.join(command) + "\n", overwrite=True)
        return cls(folder, wanted)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Open the folder of a run.

        Raises:
            FileNotFoundError: there is no config.json. ValueError: it is none of a run.
        """
        folder = pathlib.Path(path)
        file = folder / CONFIG
        if not file.is_file():
            raise FileNotFoundError(f"{folder} is no folder of a run: it has no {CONFIG}")
        found = _read_json(file)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"{file} is none of a run: its format is not {FORMAT!r}")
        return cls(folder, found)

    @property
    def id(self) -> str:
        """The run's name: SHA-256 of its configuration."""
        return hash_json(self.config)

    def flow(self, u: Tensor, estimator: Estimator, options: EstimationOptions | None = None) -> Flow:
        """Return the flow of a clip, from the run's folder if it is there; see `zsvr.flow.cached`."""
        folder = self.path / FLOW
        folder.mkdir(exist_ok=True)
        return cached(folder, u, estimator, options)

    def write_frame(self, n: int, picture: Tensor, *, depth: int = 8) -> None:
        """Keep restored frame ``n``, ``[3, H, W]`` in [0, 1], as PNG of 8 or 16 bits per channel."""
        if n < 0:
            raise ValueError(f"frames are numbered from 0, got {n}")
        folder = self.path / FRAMES
        folder.mkdir(exist_ok=True)
        data = picture_bytes(picture.detach().cpu().float().numpy(), depth)
        with new_file(folder / f"{n:05d}.png", overwrite=True) as partial:
            partial.write_bytes(data)

    def frames(self) -> list[int]:
        """Return the numbers of the frames that are kept, rising."""
        folder = self.path / FRAMES
        if not folder.is_dir():
            return []
        return sorted(int(p.stem) for p in folder.iterdir() if re.fullmatch(r"\d{5,}\.png", p.name))

    def read_frame(self, n: int) -> Tensor:
        """Return frame ``n`` as it was kept, float32 ``[3, H, W]``.

        Raises:
            FileNotFoundError: it is not there.
        """
        first: Frame = next(stream(self.path / FRAMES / f"{n:05d}.png"))
        return first.picture

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Keep results; numbers that are not finite become null."""
        write_text(self.path / METRICS, to_json(finite(metrics)), overwrite=True)

    def read_metrics(self) -> dict[str, Any]:
        """Return the results, null as NaN at the top level.

        Raises:
            FileNotFoundError: there are none yet. ValueError: the file is damaged.
        """
        file = self.path / METRICS
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} has no {METRICS} yet: the run is not finished")
        found = _read_json(file)
        if not isinstance(found, dict):
            raise ValueError(f"{file} is damaged: it holds no results by name")
        return {name: math.nan if value is None else value for name, value in found.items()}


def _read_json(file: pathlib.Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8", errors="surrogateescape"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def finite(value: Any) -> Any:
    """Return the value with numbers that JSON does not know as None, tensors as lists."""
    if isinstance(value, Mapping):
        return {str(name): finite(x) for name, x in value.items()}
    if isinstance(value, torch.Tensor):
        return finite(value.tolist())
    if isinstance(value, (list, tuple)):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
