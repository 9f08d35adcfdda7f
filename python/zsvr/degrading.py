"""Making degraded clips from clean ones: an operator, keyed noise, and files that keep both."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor

from zsvr import noise, operators
from zsvr.files import Path, check_free, hash_tensors, new_file, to_json
from zsvr.operators.base import Operator, to_model, to_unit
from zsvr.video import Sound, write

FORMAT = "zsvr.Measurement 1"
PREPARATIONS = ("square", "none")


@dataclass(frozen=True, eq=False)
class Measurement:
    """A degraded clip, exactly as it was made.

    Attributes:
        y: float32 ``[T, Cy, Hy, Wy]`` in the model's range [-1, 1], noise not clipped.
        operator: what degraded it.
        noise_std: standard deviation of the noise, for pictures in [0, 1].
        seed: of the noise.
        first: number of the first frame in the whole clip; noise belongs to frames by number.
    """

    y: Tensor
    operator: Operator
    noise_std: float
    seed: int
    first: int = 0

    @property
    def picture(self) -> Tensor:
        """The measurement as a picture file would show it: ``[T, 3, Hy, Wy]`` in [0, 1], clipped, grey as RGB."""
        shown = to_unit(self.y)
        return shown.expand(-1, 3, -1, -1) if shown.shape[1] == 1 else shown


def prepare(frames: Tensor, how: str = "square", size: int = 256) -> Tensor:
    """Return frames ``[T, 3, H, W]`` in [0, 1] as the standard protocol wants them.

    Args:
        frames: any size.
        how: "square": centre crop to a square of the shorter side, antialiased bicubic resize to ``size``; "none".
        size: side in pixels.

    Raises:
        ValueError: an unknown way, frames that are none.
    """
    if how not in PREPARATIONS:
        raise ValueError(f"frames can be prepared {' or '.join(PREPARATIONS)}, got {how!r}")
    if frames.dim() != 4 or not frames.is_floating_point():
        raise ValueError(f"frames must be floating [T, 3, H, W], got {tuple(frames.shape)} of {frames.dtype}")
    if how == "none":
        return frames
    H, W = frames.shape[2:]
    side = min(H, W)
    top, left = (H - side) // 2, (W - side) // 2
    square = frames[..., top : top + side, left : left + side]
    if side == size:
        return square
    return F.interpolate(square, (size, size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def describe_preparation(before: Tensor, after: Tensor) -> list[str]:
    """Return a note that says what became of the frames, none where their size is as it was."""
    if before.shape == after.shape:
        return []
    sizes = ["x".join(map(str, (x.shape[3], x.shape[2]))) for x in (before, after)]
    return [
        f"frames of {sizes[0]} were cropped to a square and brought to {sizes[1]} (prepare=none leaves them); noise "
        "and blur are understood in the new ones"
    ]


def degrade(clean: Tensor, operator: Operator, *, noise_std: float = 0.0, seed: int = 0, first: int = 0) -> Measurement:
    """Degrade a clean clip: ``y = A(2u - 1) + 2 noise_std n`` with standard normal n that depends on seed and frame.

    Args:
        clean: ``[T, 3, Hc, Wc]`` in [0, 1].
        operator: see `zsvr.operators.make`.
        noise_std: standard deviation for pictures in [0, 1], at least 0.
        seed: 0..2^63-1.
        first: number of the first frame in the whole clip.

    Raises:
        ValueError: frames that the operator cannot take, values out of range.
    """
    if clean.dim() != 4 or clean.shape[1] != 3 or not clean.is_floating_point() or len(clean) < 1:
        raise ValueError(f"clean frames must be floating [T, 3, H, W] in [0, 1], got {tuple(clean.shape)}")
    if not 0 <= noise_std < float("inf"):
        raise ValueError(f"noise_std must be finite and at least 0, got {noise_std}")
    shape = operator.measured_shape((clean.shape[2], clean.shape[3]))
    y = operator.A(to_model(clean.float()))
    if tuple(y.shape[1:]) != tuple(shape):
        raise ValueError(f"operator {operator.name} gave {tuple(y.shape[1:])}, announced {tuple(shape)}")
    if noise_std > 0:
        y = y + 2 * noise_std * noise.measurement(seed, range(first, first + len(y)), shape).to(y)
    return Measurement(y, operator, float(noise_std), seed, first)


def beside(path: Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Return the files that `save` puts beside a video: exact values, and the operator."""
    video = pathlib.Path(path)
    return video.with_name(f"{video.name}.measurement.safetensors"), video.with_name(
        f"{video.name}.operator.safetensors"
    )


def save(
    path: Path,
    measurement: Measurement,
    *,
    rate: float | Fraction = 24,
    times: Sequence[float] | None = None,
    sound: Sound | None = None,
    depth: int = 8,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write a measurement: a lossless video of what a camera would give, and beside it the exact values and operator.

    Args:
        path: the video, or a folder; other arguments as in `zsvr.video.write`.

    Returns:
        Notes for the user.

    Raises:
        As `zsvr.video.write`; nothing is left behind, or, if only the small files failed, the new video alone.
    """
    import safetensors.torch

    values, description = beside(path)
    tensors = {"y": measurement.y.detach().cpu().float().contiguous()}
    facts = {
        "format": FORMAT, "noise_std": measurement.noise_std, "seed": measurement.seed, "first": measurement.first,
        "sha256": hash_tensors(tensors),
    }  # fmt: skip
    check_free(path, overwrite=overwrite)
    notes = None
    try:
        with contextlib.ExitStack() as files:  # the small files take their names only after the video has its own
            partial = files.enter_context(new_file(values, overwrite=overwrite))
            safetensors.torch.save_file(tensors, str(partial), {"facts": to_json(facts)})
            operators.save(measurement.operator, files.enter_context(new_file(description, overwrite=overwrite)))
            notes = write(
                path, measurement.picture, rate=rate, times=times, sound=sound, lossless=True, depth=depth,
                overwrite=overwrite,
            )  # fmt: skip
    except BaseException:
        if notes is not None:  # those of an older video would be taken for this one's
            values.unlink(missing_ok=True)
            description.unlink(missing_ok=True)
        raise
    return notes


def load(path: Path) -> Measurement:
    """Return the exact measurement that `save` put beside a video.

    Raises:
        FileNotFoundError: there is none. ValueError: the files are damaged, or others.
    """
    import safetensors

    values, description = beside(path)
    if not values.is_file():
        raise FileNotFoundError(f"{values} is missing: {path} was not made by degrading, or was moved without it")
    try:
        with safetensors.safe_open(str(values), framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts["format"] != FORMAT or facts["sha256"] != hash_tensors(tensors):
            raise ValueError(f"{values} is damaged, or no measurement: its values are not those that were saved")
        found = tensors["y"], facts["noise_std"], facts["seed"], facts["first"]
    except (safetensors.SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{values} is damaged, or no measurement: {error}") from error
    y, noise_std, seed, first = found
    return Measurement(y, operators.load(description), noise_std, seed, first)
