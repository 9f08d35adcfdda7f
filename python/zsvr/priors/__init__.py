"""Priors: pre-trained image diffusion models, opened from local files."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import Any

from zsvr.priors.adm import ADMPrior, open_adm
from zsvr.priors.base import Prior
from zsvr.priors.diffusers_prior import LatentPrior, PixelPrior, open_diffusers

__all__ = ["ADMPrior", "LatentPrior", "PixelPrior", "Prior", "open", "open_adm", "open_diffusers", "register"]

Factory = Callable[..., Prior]


def _no_embedded(**options: Any) -> Prior:
    raise LookupError(
        "this installation has no embedded prior: name a checkpoint (.pt, .safetensors) or a diffusers folder instead"
    )


_factories: dict[str, Factory] = {"embedded": _no_embedded}


def register(name: str, factory: Factory) -> None:
    """Make ``open(name, **options)`` call ``factory(**options)``.

    Raises:
        ValueError: the name could be a path.
    """
    if not name or any(c in name for c in "/\\.:"):
        raise ValueError(f"a prior's name must not look like a path, got {name!r}")
    _factories[name] = factory


def open(source: str | os.PathLike[str], **options: Any) -> Prior:
    """Open a prior by what the source is.

    Args:
        source: a registered name; a file ``.pt``, ``.pth`` or ``.safetensors``: a guided-diffusion checkpoint, see
            `open_adm`; a folder: saved by diffusers, see `open_diffusers`. ``adm:PATH`` and ``diffusers:PATH`` say it
            explicitly.
        options: of what opens it.

    Raises:
        FileNotFoundError: there is no such file or folder; the message lists the names.
        ValueError: the file or folder holds something else.

    Example:
        >>> prior = zsvr.priors.open("256x256_diffusion_uncond.pt", dtype=torch.float16, device="cuda")
    """
    text = os.fspath(source)
    if text in _factories:
        return _factories[text](**options)
    kind, separator, rest = text.partition(":")
    if separator and kind in ("adm", "diffusers"):
        return (open_adm if kind == "adm" else open_diffusers)(rest, **options)
    path = pathlib.Path(text)
    if path.is_dir():
        return open_diffusers(path, **options)
    if not path.exists():
        raise FileNotFoundError(
            f"no prior {text!r}: neither a file nor a folder, nor one of the names {', '.join(sorted(_factories))}"
        )
    if path.suffix not in (".pt", ".pth", ".safetensors"):
        raise ValueError(
            f"{path} is no prior: expected a guided-diffusion checkpoint (.pt, .pth, .safetensors) or a folder saved "
            "by diffusers; single-file checkpoints of other networks must be converted to such a folder first"
        )
    return open_adm(path, **options)
