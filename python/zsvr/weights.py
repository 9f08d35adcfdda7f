"""Reading files of weights: safetensors, or PyTorch's without executing anything in them."""

from __future__ import annotations

import pathlib
import re
import warnings
import zipfile
import zlib
from typing import Any

import torch
from torch import Tensor

from zsvr.files import Path

_OBJECT = re.compile(r"Unsupported (?:global|class)\S*:?\s*(?:GLOBAL\s+)?([\w.]+)")


def reason(path: Path, error: Exception | None = None) -> str:
    """Return why a file of weights cannot be read, in one line, and what to do.

    PyTorch's own messages advise to load with execution allowed; that advice is not passed on.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
    except OSError as unreadable:
        return str(unreadable)
    if not start:
        return "it is empty: download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file: fetch the file itself (git lfs pull)"
    if start.startswith(b"<") and b"\0" not in start:
        return "it is a web page (or XML), not the file: download it again"
    text = str(error or "")
    if found := _OBJECT.search(text):
        return (
            f"it holds more than tensors, objects of {found[1]}, and such objects could execute code: save the "
            "network's state dict alone"
        )
    if "TorchScript" in text:
        return "it is a TorchScript archive: save the network's state dict instead"
    line = (text.strip().splitlines() or [""])[0]
    if not line or "eights only" in line or "weights_only" in line:
        return "it is no file of PyTorch's, or it is damaged: download it again"
    return f"it is damaged, or no file of weights ({type(error).__name__}: {line[:200]})"


def load(path: Path, *, mmap: bool = False) -> Any:
    """Return what ``torch.save`` wrote: tensors in plain containers, onto the CPU. Nothing in the file is executed.

    Args:
        path: the file.
        mmap: leave the tensors in the file until they are used.

    Raises:
        OSError: the file cannot be opened. ValueError: it is damaged, or holds something else.
    """
    with open(path, "rb"):  # what the system says of it comes before what PyTorch does
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # other files make the reader fail in any way
        raise ValueError(f"{path} holds no tensors that can be read safely: {reason(path, error)}") from error


def check_sums(path: Path) -> None:
    """Compare the contents of a file of ``torch.save`` with the checksums in it, which PyTorch does not look at.

    Files of old versions, and those written without checksums, have none to compare.

    Raises:
        ValueError: a bit has changed.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged ({error}): download it again") from error
    if changed:
        raise ValueError(f"{path} is damaged, {changed} in it does not have its checksum: download it again")


def state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a .pth file, which is read without executing anything.

    Raises:
        FileNotFoundError: there is none. ValueError: it holds something else.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    if pathlib.Path(path).suffix == ".safetensors":
        import safetensors.torch

        try:
            return safetensors.torch.load_file(str(path))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file, or it is damaged: {reason(path, error)}") from error
    found = load(path)
    check_sums(path)
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{path} holds no state dict of tensors, but {type(found).__name__}")
    return found
