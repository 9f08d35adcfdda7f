"""The file a `VideoContext` is saved in: safetensors, with everything that is no tensor as JSON in its metadata."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import secrets
from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import frames as tables
from zsvr_kernels.options import CorrectionOptions, SLROptions
from zsvr_kernels.sampling import Grid

Groups = dict[str, dict[str, Tensor]]  # group -> name -> tensor

FORMAT = "zsvr_kernels.VideoContext 1"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "saving and loading a VideoContext needs safetensors: pip install safetensors"
        ) from error
    return safetensors


def write(path: str | os.PathLike[str], groups: Groups, facts: dict[str, Any]) -> None:
    """Write groups of tensors, and facts for JSON; the path holds the old file or the whole new one, at any time."""
    safetensors = _safetensors()
    target = pathlib.Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no folder, so {target.name} cannot be written there")
    seen: set[int] = set()
    whole = {}
    for name, x in ((f"{group}/{name}", x) for group, tensors in groups.items() for name, x in tensors.items()):
        x = x.detach().cpu().contiguous()
        memory = x.untyped_storage().data_ptr()  # the format knows no tensors that share memory
        whole[name] = x.clone() if memory in seen else x
        seen.add(memory)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")
    try:
        safetensors.torch.save_file(whole, str(partial), {"format": FORMAT, "facts": json.dumps(facts)})
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], device: torch.device | str) -> tuple[Groups, dict[str, Any]]:
    """Return the groups and facts that `write` wrote. Nothing in the file is executed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another file, or damaged.
    """
    safetensors = _safetensors()
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file")
    try:
        with safetensors.safe_open(str(path), framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} holds {metadata.get('format', 'no format')!r}, expected {FORMAT!r}")
            groups: Groups = {}
            for path_in_file in file.keys():  # noqa: SIM118
                group, _, name = path_in_file.rpartition("/")
                groups.setdefault(group, {})[name] = file.get_tensor(path_in_file)
        return groups, json.loads(metadata["facts"])
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no file of VideoContext.save, or it is damaged: {error}") from error


def options_to_json(options: SLROptions) -> tuple[dict[str, Any], Groups]:
    """Return options as values for JSON, and the tensors among them as a group."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    groups: Groups = {}
    for name, value in values.items():
        if callable(value):
            raise ValueError(f"options.{name} is a function, which cannot be saved: use names, patterns or a tensor")
    values["correct"] = dataclasses.asdict(options.correct)
    if isinstance(options.frames, Tensor):
        groups["options"] = {"frames": options.frames}
        values["frames"] = None
    elif isinstance(options.frames, tuple):
        values["frames"] = [[type(item).__name__, *item] for item in options.frames]
    return values, groups


def options_from_json(values: dict[str, Any], groups: Groups) -> SLROptions:
    """Return the options that `options_to_json` took apart."""
    values = {**values, "correct": CorrectionOptions(**values["correct"])}
    if "options" in groups:
        values["frames"] = groups["options"]["frames"].cpu()
    elif isinstance(values["frames"], list):
        kinds = {"Relative": tables.relative, "Absolute": tables.absolute}
        values["frames"] = [kinds[kind](number) for kind, number in values["frames"]]
    return SLROptions(**values)


def grid_to_text(grid: Grid) -> str:
    """Return the name of a token grid, "HgxWg"."""
    return f"{grid[0]}x{grid[1]}"


def grid_from_text(text: str) -> Grid:
    """Return the token grid of that name."""
    Hg, Wg = text.split("x")
    return int(Hg), int(Wg)
