"""Which backend runs a call: the measured order of preference, and why a backend refuses.

PREFERENCE is the one place that decides what ``backend="auto"`` means. For CPUs it was measured with ``make bench``
(bench/results), for GPUs it follows the predictions of ``make gates`` (bench/predictions.json) until measured; a
backend that refuses a call is passed over, and `explain` shows each refusal.
An explicit ``backend=`` never falls back: it runs or raises.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zsvr_kernels import _native, _triton

BACKENDS = ("auto", "reference", "cpu", "sdpa", "triton", "cuda")

# (operator, device type) -> backends, best first. "reference" takes everything, so it ends every list.
PREFERENCE: dict[tuple[str, str], tuple[str, ...]] = {
    ("cross_frame_attention", "cpu"): ("cpu", "sdpa", "reference"),
    ("cross_frame_attention", "cuda"): ("triton", "sdpa", "reference"),
    ("trajectory_attention", "cpu"): ("cpu", "reference"),
    ("trajectory_attention", "cuda"): ("triton", "reference"),
    ("chain_links", "cpu"): ("cpu", "reference"),
    ("chain_links", "cuda"): ("triton", "reference"),
    ("correspondence_search", "cpu"): ("cpu", "reference"),
    ("correspondence_search", "cuda"): ("triton", "reference"),
    ("link_score", "cpu"): ("cpu", "reference"),
    ("link_score", "cuda"): ("triton", "reference"),
}
OPERATORS = ("cross_frame_attention", "trajectory_attention", "chain_links", "correspondence_search", "link_score")


class Call(NamedTuple):
    """What a backend needs to know to accept or refuse: metadata, no values."""

    op: str
    device: str  # device type
    dtype: torch.dtype
    D: int | None  # head dim; None where there is none
    needs_grad: bool = False
    return_lse: bool = False


def _refuse_reference(call: Call) -> str | None:
    return None


def _refuse_cpu(call: Call) -> str | None:
    if call.device != "cpu":
        return f"tensors are on {call.device}; it takes CPU tensors"
    if not _native.is_available():
        return _native.why_missing
    if call.op == "chain_links":
        return None  # links are float32 by definition
    if call.dtype not in _native.DTYPES:
        return f"dtype {call.dtype}; it takes float32, bfloat16 and float16"
    if call.D is not None and (call.D % 8 or not 8 <= call.D <= 256):
        return f"head dim {call.D}; it takes multiples of 8 up to 256"
    return None


def _refuse_sdpa(call: Call) -> str | None:
    if call.op != "cross_frame_attention":
        return "it implements cross_frame_attention only"
    if not call.return_lse:
        return None
    if call.needs_grad:
        return "torch's SDPA has no gradient of lse"
    if torch.compiler.is_compiling() or call.device not in ("cpu", "cuda"):
        return "torch's SDPA gives no lse on this device or under torch.compile"
    return _refuse_sdpa_lse_on_cuda(call) if call.device == "cuda" else None


def _refuse_sdpa_lse_on_cuda(call: Call) -> str | None:
    """The kernels that give an lse there are flash (16-bit) and efficient (float32), if they are switched on."""
    switches = torch.backends.cuda
    is_on = switches.mem_efficient_sdp_enabled() if call.dtype == torch.float32 else switches.flash_sdp_enabled()
    if torch.version.hip is not None or call.dtype == torch.float64 or not is_on:
        return "torch's SDPA gives an lse by its flash and efficient kernels, which this dtype or its switches rule out"
    if call.D is None or call.D % 8 or call.D > 256:
        return f"head dim {call.D}; torch's SDPA gives an lse for multiples of 8 up to 256"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "torch's SDPA gives an lse on GPUs of compute capability 8.0 and later"
    return None


def _refuse_triton(call: Call) -> str | None:
    if (reason := _triton.refusal(call.device, call.dtype)) is not None:
        return reason
    if call.D is not None and (call.D % 8 or not 8 <= call.D <= 256):
        return f"head dim {call.D}; it takes multiples of 8 up to 256"
    return None


def _refuse_absent(call: Call) -> str | None:
    return "this version has no such kernel"


_REFUSE: dict[str, Callable[[Call], str | None]] = {
    "reference": _refuse_reference,
    "cpu": _refuse_cpu,
    "sdpa": _refuse_sdpa,
    "triton": _refuse_triton,
    "cuda": _refuse_absent,
}


def refusal(backend: str, call: Call) -> str | None:
    """Return why ``backend`` cannot run ``call``, or None if it can."""
    return _REFUSE[backend](call)


def preference(op: str, device: str) -> tuple[str, ...]:
    return PREFERENCE.get((op, device), ("reference",))


def choose(backend: str, call: Call) -> str:
    """Return the backend that runs ``call``.

    Raises:
        ValueError: ``backend`` is not one of `BACKENDS`.
        RuntimeError: an explicit backend cannot run the call; the message says why and what would.
    """
    if backend == "auto":
        for candidate in preference(call.op, call.device):
            if refusal(candidate, call) is None:
                return candidate
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = refusal(backend, call)
    if reason is not None:
        would = [b for b in BACKENDS[1:] if refusal(b, call) is None]
        raise RuntimeError(
            f"{call.op}: backend {backend!r} cannot run this call: {reason}. "
            f"What would work: {', '.join(would)} (or 'auto')."
        )
    return backend


@dataclass(frozen=True)
class Explanation:
    """What ``backend="auto"`` chooses for a call, and why not the others."""

    call: Call
    choice: str
    refusals: dict[str, str]  # backend -> reason

    def __str__(self) -> str:
        call = self.call
        order = " > ".join(preference(call.op, call.device))
        lines = [
            f"{call.op} on {call.device}, {str(call.dtype).removeprefix('torch.')}"
            + (f", head dim {call.D}" if call.D is not None else ""),
            f"  auto runs: {self.choice}   (order of preference: {order})",
        ]
        for backend in BACKENDS[1:]:
            if backend in self.refusals:
                lines.append(f"  {backend:<10} no: {self.refusals[backend]}")
            else:
                lines.append(f"  {backend:<10} can run it")
        return "\n".join(lines)


# What each operator takes by keyword beside return_lse; none of it changes the choice.
_KEYWORDS: dict[str, tuple[str, ...]] = {
    "cross_frame_attention": ("scale", "backend", "out"),
    "trajectory_attention": ("scale", "backend", "out"),
    "chain_links": ("window", "rounding", "link_rule", "backend"),
    "correspondence_search": ("grid", "radius", "backend"),
    "link_score": ("grid", "backend"),
}
_ATTENTION = ("cross_frame_attention", "trajectory_attention")


def explain(op: str, q: object, *others: object, return_lse: bool = False, **keywords: object) -> Explanation:
    """Print which backend ``backend="auto"`` runs for a call, and each refusal with its reason.

    Args:
        op: one of `OPERATORS`.
        q: the call's first argument (for ``chain_links``: the links, or ``links.forward``).
        others: the call's other arguments; tensors among them, and positions of trajectories, count when asking
            whether a gradient is needed.
        return_lse: as in the call.
        keywords: the call's other keywords; they do not change the choice.

    Returns:
        The explanation that was printed, with ``choice`` and ``refusals``. Under autocast its dtype is the one
        that the call would run in.

    Raises:
        ValueError: ``op`` is not an operator of this package.
        TypeError: the first argument is not what the operator takes, or a keyword is not one of the operator's.
    """
    if op not in OPERATORS:
        raise ValueError(f"op must be one of {', '.join(OPERATORS)}, got {op!r}")
    unknown = [name for name in keywords if name not in _KEYWORDS[op]]
    if unknown or (return_lse and op not in _ATTENTION):
        raise TypeError(f"{op} takes no keyword {(unknown or ['return_lse'])[0]!r}")
    first = getattr(q, "forward", None) if op == "chain_links" and not isinstance(q, Tensor) else q
    if not isinstance(first, Tensor):
        expected = "zsvr_kernels.Links" if op == "chain_links" else "a torch.Tensor"
        raise TypeError(f"{op} takes {expected} first, got {type(q).__name__}")
    if op in _ATTENTION:
        if first.dim() != 5:
            raise ValueError(f"q must have 5 axes [B, T, P, H, D], got shape {tuple(first.shape)}")
        (first,) = autocast(first)
    read = [getattr(x, "positions", x) for x in (first, *others)]
    call = Call(
        op,
        first.device.type,
        first.dtype,
        first.shape[-1] if op in _ATTENTION else None,
        torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in read),
        return_lse,
    )
    refusals = {b: r for b in BACKENDS[1:] if (r := refusal(b, call)) is not None}
    explanation = Explanation(call, choose("auto", call), refusals)
    sys.stdout.write(f"{explanation}\n")
    return explanation


def autocast(*arguments: Any) -> tuple[Any, ...]:
    """Cast floating tensors to autocast's dtype where autocast is on for their device, as SDPA does.

    The first argument says which device; float64, other dtypes and what is no tensor stay as they are.
    """
    if not isinstance(arguments[0], Tensor):
        return arguments
    device = arguments[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return arguments
    dtype = torch.get_autocast_dtype(device)

    def is_cast(x: object) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64

    return tuple(x.to(dtype) if is_cast(x) else x for x in arguments)


def without_autocast(device: torch.device) -> Any:
    """Return a context in which operations on ``device`` keep the dtype of their inputs."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
