"""Hosts by name, and the choice between them."""

from __future__ import annotations

import inspect
from typing import Any

from zsvr.hosts.base import Host, check_noise_std
from zsvr.hosts.ddnm import DDNM, DDNMPlus
from zsvr.hosts.dps import DPS
from zsvr.hosts.gdp import GDP
from zsvr.operators.base import Operator

REGISTRY: dict[str, type[Host]] = {cls.name: cls for cls in (DDNM, DDNMPlus, GDP, DPS)}


def choose(operator: Operator, noise_std: float = 0.0) -> str:
    """Return the host that ``"auto"`` means: gdp for low light, ddnm+ for noisy measurements, ddnm for exact ones.

    Raises:
        ValueError: denoising without noise.
    """
    if operator.blind:
        return GDP.name
    if check_noise_std(noise_std) > 0:
        return DDNMPlus.name
    if operator.name == "denoise":
        raise ValueError("denoising needs noise_std > 0 (in units of [0, 1] frames): without noise nothing is to do")
    return DDNM.name


def make(name: str = "auto", *, operator: Operator | None = None, noise_std: float = 0.0, **arguments: Any) -> Host:
    """Return the host of a name.

    Args:
        name: in `REGISTRY`, or ``"auto"``; see `choose`.
        operator: what is to be undone; ``"auto"`` needs it.
        noise_std: standard deviation of the measurement's noise in [0, 1] units; ddnm+ uses it, ddnm refuses it.
        arguments: of that host.

    Raises:
        ValueError: an unknown name, values out of range, a host that does not fit the noise.
        TypeError: an argument that the host does not have.

    Example:
        >>> make("ddnm+", noise_std=0.1).describe()["eta"]
        0.85
    """
    if name == "auto":
        if operator is None:
            raise ValueError("host 'auto' is chosen by the operator: give it, or name a host")
        name = choose(operator, noise_std)
    if name not in REGISTRY:
        raise ValueError(f"unknown host {name!r}: expected auto or one of {', '.join(REGISTRY)}")
    cls = REGISTRY[name]
    allowed = [n for n in inspect.signature(cls).parameters if n != "noise_std"]
    unknown = sorted(set(arguments) - set(allowed))
    if unknown:
        raise TypeError(f"host {name} does not take {', '.join(unknown)}: it takes {', '.join(allowed)}")
    if cls is DDNMPlus:
        return DDNMPlus(noise_std=noise_std, **arguments)
    if cls is DDNM and check_noise_std(noise_std) > 0:
        raise ValueError("host 'ddnm' takes measurements as exact: use 'ddnm+' where noise_std > 0")
    return cls(**arguments)
