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

ADM256 = "256x256_diffusion_uncond"  # the file's name in openai/guided-diffusion


def _no_embedded(**options: Any) -> Prior:
    raise LookupError(
        "this installation has no embedded prior: name a checkpoint (.pt, .safetensors) or a diffusers folder instead"
    )


def _weights_folders() -> list[pathlib.Path]:
    named = os.environ.get("ZSVR_WEIGHTS")
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folders = ([pathlib.Path(named)] if named else []) + [pathlib.Path(caches) / "zsvr", pathlib.Path.cwd()]
    return [pathlib.Path(os.path.expanduser(folder)) for folder in folders]


def _open_adm256(**options: Any) -> Prior:
    folders = _weights_folders()
    for folder in folders:
        for suffix in (".pt", ".safetensors"):
            if (path := folder / f"{ADM256}{suffix}").is_file():
                return open_adm(path, **options)
    raise FileNotFoundError(
        f"there is no {ADM256}.pt (or .safetensors) in {', '.join(map(str, folders))}: it is the checkpoint that "
        'openai/guided-diffusion publishes as "256x256 unconditional" (its README links it; 2.1 GiB). Put it in one of '
        "these folders, name its folder in the environment variable ZSVR_WEIGHTS, or name the file itself: --prior "
        'PATH, prior="PATH"'
    )


_factories: dict[str, Factory] = {"adm256": _open_adm256, "embedded": _no_embedded}


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
        source: a registered name, see below; a file ``.pt``, ``.pth`` or ``.safetensors``: a guided-diffusion
            checkpoint, see `open_adm`; a folder: saved by diffusers, see `open_diffusers`. ``adm:PATH`` and
            ``diffusers:PATH`` say it explicitly.
        options: of what opens it.

    ``"adm256"`` is the 256 x 256 unconditional network of openai/guided-diffusion: ``256x256_diffusion_uncond.pt``, or
    the same as ``.safetensors``, from the first folder that has it: the one that the environment variable
    ``ZSVR_WEIGHTS`` names, the user's cache (``$XDG_CACHE_HOME/zsvr``, ``~/.cache/zsvr``), the current one. Its options
    are those of `open_adm`.

    Raises:
        FileNotFoundError: there is no such file or folder; the message lists the names, or where it was looked for.
        ValueError: the file or folder holds something else.

    Example:
        >>> prior = zsvr.priors.open("adm256", dtype=torch.float16, device="cuda")
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
