"""A converted checkpoint kept as a safetensors file, named after what it was made from and verified when read."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zsvr.files import new_file

FORMAT = "zsvr weights 1"


class DamagedCacheError(ValueError):
    """A cache file that is not what its name says."""


def cache_path(folder: pathlib.Path, stem: str, facts: Mapping[str, Any]) -> pathlib.Path:
    """Return the file for weights made from ``facts`` (hash of the source, options), values that JSON can hold."""
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{stem}.{key}.zsvr.safetensors"


def _add(digest: Any, name: str, x: Tensor) -> None:
    digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
    digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write(path: pathlib.Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write the weights; the path holds the old file or the whole new one at any time.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; nothing is left behind.
    """
    import safetensors.torch

    whole = {name: x.detach().cpu().contiguous() for name, x in sorted(tensors.items())}
    digest = hashlib.sha256()
    for name, x in whole.items():
        _add(digest, name, x)
    metadata = {"format": FORMAT, "facts": json.dumps(facts, sort_keys=True), "sha256": digest.hexdigest()}
    with new_file(path, overwrite=True) as partial:
        with partial.open("xb"):  # the library's own error for a folder that cannot be written to names no file
            pass
        safetensors.torch.save_file(whole, str(partial), metadata)


def read(path: pathlib.Path, facts: Mapping[str, Any], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the weights that `write` wrote for the same facts, tensor by tensor onto the device.

    Raises:
        DamagedCacheError: it cannot be read, is another file, for other facts, cut short, or a bit has changed.
    """
    import safetensors

    digest = hashlib.sha256()
    result: dict[str, Tensor] = {}
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("facts") != json.dumps(facts, sort_keys=True):
                raise DamagedCacheError(f"{path} was made from something else")
            for name in sorted(file.keys()):
                x = file.get_tensor(name)
                _add(digest, name, x)
                result[name] = x.to(device)
    except (safetensors.SafetensorError, OSError) as error:
        raise DamagedCacheError(f"{path} cannot be read: {error}") from error
    if metadata.get("sha256") != digest.hexdigest():
        raise DamagedCacheError(f"{path} holds other bytes than were written")
    return result
