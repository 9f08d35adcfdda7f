"""Operators by name: how they are made, saved and loaded."""

from __future__ import annotations

import inspect
import json
import os
import pathlib
from typing import Any

from torch import Tensor

from zsvr.files import new_file
from zsvr.operators.base import Operator
from zsvr.operators.blur import FourierBlur, SeparableBlur
from zsvr.operators.composition import Compose
from zsvr.operators.downscaling import AverageDownscale, BicubicDownscale
from zsvr.operators.inpainting import Inpaint
from zsvr.operators.kernels import is_separable
from zsvr.operators.pixelwise import Denoise, Gray, LowLight

REGISTRY: dict[str, type[Operator]] = {
    cls.name: cls
    for cls in (
        Denoise,
        Inpaint,
        Gray,
        AverageDownscale,
        BicubicDownscale,
        SeparableBlur,
        FourierBlur,
        LowLight,
        Compose,
    )
}
TASKS = {"sr": "sr_bicubic", "deblur": "blur_sep", "colorize": "gray"}
FORMAT = "zsvr.operator 1"


def make(task: str, **arguments: Any) -> Operator:
    """Return the operator of a name or task.

    Args:
        task: a name in `REGISTRY`, or a task: ``"sr"`` (sr_bicubic), ``"deblur"`` (blur_sep, or blur_fft for a kernel
            that is no product of a row and a column), ``"colorize"`` (gray).
        arguments: of that operator. Operators inside ``"compose"`` may be descriptions as `describe` returns them.

    Raises:
        ValueError: an unknown name; values out of range.
        TypeError: an argument that the operator does not have.

    Example:
        >>> make("sr", scale=4)
        sr_bicubic(scale=4)
    """
    name = TASKS.get(task, task)
    if task == "deblur" and not is_separable(arguments.get("kernel", "gaussian")):
        name = FourierBlur.name
    if name not in REGISTRY:
        raise ValueError(f"unknown task or operator {task!r}: expected one of {', '.join(sorted({*TASKS, *REGISTRY}))}")
    cls = REGISTRY[name]
    allowed = list(inspect.signature(cls).parameters)
    unknown = sorted(set(arguments) - set(allowed))
    if unknown:
        takes = ", ".join(allowed) or "no arguments"
        raise TypeError(f"operator {name} does not take {', '.join(unknown)}: it takes {takes}")
    if cls is Compose:
        given = arguments.get("operators", ())
        arguments["operators"] = [from_description(op) if isinstance(op, dict) else op for op in given]
    return cls(**arguments)


def from_description(description: dict[str, Any]) -> Operator:
    """Return the operator that `Operator.describe` described.

    Raises:
        ValueError, TypeError: it describes none.
    """
    if "name" not in description:
        raise ValueError(f"a description of an operator has a name, got {sorted(description)}")
    return make(description["name"], **{n: v for n, v in description.items() if n != "name"})


def save(operator: Operator, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write an operator to a safetensors file: tensors as such, everything else as JSON in its metadata.

    The path holds the old file or the whole new one, at any time.

    Raises:
        FileExistsError: the file exists, and ``overwrite`` is False.
        FileNotFoundError: its folder does not.
        ModuleNotFoundError: safetensors is not installed.
    """
    safetensors = _safetensors()
    tensors: dict[str, Tensor] = {}
    facts = {"format": FORMAT, "operator": _without_tensors(operator.describe(), tensors)}
    with new_file(path, overwrite=overwrite) as partial:  # one key: several would be written in any order
        safetensors.torch.save_file(tensors, str(partial), {"facts": json.dumps(facts, sort_keys=True)})


def load(path: str | os.PathLike[str]) -> Operator:
    """Return the operator that `save` wrote. Nothing in the file is executed.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is another file, or damaged.
        ModuleNotFoundError: safetensors is not installed.
    """
    safetensors = _safetensors()
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no operator at {path}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            if facts.get("format") != FORMAT:
                raise ValueError(f"it holds {facts.get('format', 'no format')!r}, expected {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return from_description(_with_tensors(facts["operator"], tensors))
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of operators.save, or it is damaged: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("saving and loading operators needs safetensors: pip install safetensors") from error
    return safetensors


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a description for JSON; its tensors are put into ``tensors`` and referred to by name."""
    if isinstance(value, Tensor):
        name = f"tensor{len(tensors)}"
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {n: _without_tensors(v, tensors) for n, v in value.items()}
    if isinstance(value, list):
        return [_without_tensors(v, tensors) for v in value]
    if isinstance(value, tuple):  # JSON has none
        return {"tuple": [_without_tensors(v, tensors) for v in value]}
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"tensor"}:
        return tensors[value["tensor"]]
    if set(value) == {"tuple"}:
        return tuple(_with_tensors(v, tensors) for v in value["tuple"])
    return {n: _with_tensors(v, tensors) for n, v in value.items()}
