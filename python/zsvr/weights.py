"""Reading files of weights: safetensors, or PyTorch's without executing anything in them."""

from __future__ import annotations

import pathlib

import torch
from torch import Tensor

from zsvr.files import Path


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
            raise ValueError(f"{path} is no safetensors file, or it is damaged: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # other files make the reader fail in any way
        raise ValueError(f"{path} holds no tensors that can be read safely: {str(error)[:300]}") from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{path} holds no state dict of tensors, but {type(found).__name__}")
    return found
