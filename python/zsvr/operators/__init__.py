"""Degradations as linear operators: noise, missing pixels, gray, resolution, blur, low light, compositions."""

from zsvr.operators.base import Flat, Operator, Spectral, inner, to_model, to_unit
from zsvr.operators.registry import REGISTRY, TASKS, from_description, load, make, save

__all__ = [
    "REGISTRY",
    "TASKS",
    "Flat",
    "Operator",
    "Spectral",
    "from_description",
    "inner",
    "load",
    "make",
    "save",
    "to_model",
    "to_unit",
]
