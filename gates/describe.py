"""A launch as data: what Triton's JIT would compile for it, so that any process with Triton can do the same.

The JIT specialises a kernel on its arguments: an int equal to 1 and None become constants, ints and addresses that are
multiples of 16 are declared so, an int takes the narrowest of int32, int64 and uint64 that holds it. Code depends on
all of it (16-byte loads need it), so a description is made from the launch's own values, never by hand.
`tests/test_gates.py` holds this file against the JIT's own binder.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from typing import Any

from torch import Tensor

from zsvr_kernels._triton import Launch

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIVISOR = 16
# Targets of configuration tables as Triton names them.
AMD = ("gfx942",)
POINTERS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64", "bool": "u1"}
POINTERS |= {f"int{n}": f"i{n}" for n in (8, 16, 32, 64)} | {"uint8": "u8"}
# Constants by which a kernel goes about a problem; the others say what the problem is.
CHOICES = re.compile(
    r"BLOCK\w*|TILE_[HW]|PART_\w+|HEADS|ENTRIES|STRIP_[HW]|CANDIDATES|D[12]?|KIND|PACKED|EXACT|PRECISION|WIDE"
)
Description = dict[str, Any]


def _pointer(x: Tensor, target: str, aligns: bool) -> tuple[str, str]:
    # An allocation starts at a multiple of 256 bytes on every device; a meta tensor has no address to ask.
    is_aligned = x.storage_offset() * x.element_size() % DIVISOR == 0
    is_within_2gb = target in AMD and x.untyped_storage().nbytes() < 2**31
    marks = ("D" if is_aligned and aligns else "") + ("S" if is_within_2gb else "")
    return f"*{POINTERS[str(x.dtype).removeprefix('torch.')]}", marks


def _integer(x: int, aligns: bool) -> tuple[str, str]:
    kind = "i32" if -(2**31) <= x < 2**31 else "u64" if x >= 2**63 else "i64"
    return kind, "D" if aligns and x % DIVISOR == 0 else ""


def _constant(x: Any) -> Any:
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if hasattr(x, "primitive_bitwidth"):  # a triton.language.dtype
        return {"dtype": str(x)}
    raise TypeError(f"a constant of a kernel is a number, text, None or a Triton dtype, got {type(x).__name__}")


def specialise(x: Any, target: str, *, specialises: bool = True, aligns: bool = True) -> tuple[str, str]:
    """Return type and marks of an argument that is no ``tl.constexpr``: "D" divisible by 16, "S" within 2 GB (AMD).

    ``specialises`` and ``aligns`` are False where the kernel asks for neither (``do_not_specialize``,
    ``do_not_specialize_on_alignment``).
    """
    if x is None:
        return "constexpr", ""
    if isinstance(x, Tensor):
        kind, marks = _pointer(x, target, aligns)
    elif isinstance(x, bool):
        return "u1", ""
    elif isinstance(x, int):
        if x == 1 and specialises:
            return "constexpr", ""
        kind, marks = _integer(x, aligns)
    elif isinstance(x, float):
        return "fp32", ""
    else:
        raise TypeError(f"an argument of a kernel is a tensor, number or None, got {type(x).__name__}")
    return kind, marks if specialises else ""


def describe(launch: Launch, target: str) -> Description:
    """Return the description of a compile: everything that code depends on but target and release of Triton.

    Raises:
        TypeError: arguments are not the kernel's parameters, or one has a type that no kernel takes.
    """
    kernel = launch.kernel
    unknown = launch.arguments.keys() - {parameter.name for parameter in kernel.params}
    absent = [p.name for p in kernel.params if not p.has_default and p.name not in launch.arguments]
    if unknown or absent:
        raise TypeError(f"{kernel.fn.__name__}: not its parameters: {sorted(unknown)}; not given: {absent}")
    signature, constants, marks = {}, {}, {}
    for parameter in kernel.params:
        name = parameter.name
        x = launch.arguments.get(name, parameter.default)
        if parameter.is_constexpr:
            kind, mark = "constexpr", ""
        else:
            kind, mark = specialise(
                x,
                target,
                specialises=not parameter.do_not_specialize,
                aligns=not parameter.do_not_specialize_on_alignment,
            )
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = _constant(x)
        if mark:
            marks[name] = mark
    path = pathlib.Path(kernel.fn.__code__.co_filename).resolve()
    is_ours = path.is_relative_to(ROOT)
    return {
        "folder": str(ROOT if is_ours else path.parent),
        "module": ".".join(path.relative_to(ROOT).with_suffix("").parts) if is_ours else path.stem,
        "kernel": kernel.fn.__name__,
        "signature": signature,
        "constants": constants,
        "marks": marks,
        # What Launch.run passes; tests/test_gates.py checks.
        "options": {"enable_fp_fusion": True, **launch.options},
    }


def key(description: Description) -> str:
    """Return a short name for what is compiled; equal descriptions have equal ones wherever the checkout lies."""
    content = {name: value for name, value in description.items() if name != "folder"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def choices(description: Description) -> dict[str, Any]:
    """Return the constants and options by which a kernel goes about a problem: its committed configuration."""
    constants = {name: value for name, value in description["constants"].items() if CHOICES.fullmatch(name)}
    return constants | {name: x for name, x in description["options"].items() if name != "enable_fp_fusion"}


def configuration(description: Description) -> str:
    """Return a text that is equal for compiles of a kernel in one configuration, be it for float16 or bfloat16."""
    pointers = [kind.replace("fp16", "bf16") for kind in description["signature"].values() if kind.startswith("*")]
    return json.dumps([description["kernel"], pointers, choices(description)], sort_keys=True)
