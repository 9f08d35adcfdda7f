"""Which backend runs a call: the measured order of preference, and why a backend refuses.

PREFERENCE is the one place that decides what ``backend="auto"`` means. It was measured with ``make bench``
(bench/results); a backend that refuses a call is passed over, and `explain` shows each refusal.
An explicit ``backend=`` never falls back: it runs or raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zsvr_kernels import _native

BACKENDS = ("auto", "reference", "cpu", "sdpa", "triton", "cuda")

# (operator, device type) -> backends, best first. "reference" takes everything, so it ends every list.
PREFERENCE: dict[tuple[str, str], tuple[str, ...]] = {
    ("cross_frame_attention", "cpu"): ("cpu", "sdpa", "reference"),
    ("cross_frame_attention", "cuda"): ("sdpa", "reference"),
    ("trajectory_attention", "cpu"): ("cpu", "reference"),
    ("chain_links", "cpu"): ("cpu", "reference"),
}
OPERATORS = ("cross_frame_attention", "trajectory_attention", "chain_links")


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
        return None
    if call.dtype not in _native.DTYPES:
        return f"dtype {call.dtype}; it takes float32, bfloat16 and float16"
    if call.D is not None and (call.D % 8 or not 8 <= call.D <= 256):
        return f"head dim {call.D}; it takes multiples of 8 up to 256"
    return None


def _refuse_sdpa(call: Call) -> str | None:
    if call.op != "cross_frame_attention":
        return "it implements cross_frame_attention only"
    if call.return_lse and (call.device != "cpu" or torch.compiler.is_compiling()):
        return "torch's SDPA gives no lse on this device or under torch.compile"
    if call.return_lse and call.needs_grad:
        return "torch's SDPA has no gradient of lse"
    return None


def _refuse_absent(call: Call) -> str | None:
    return "this version has no such kernel"


_REFUSE: dict[str, Callable[[Call], str | None]] = {
    "reference": _refuse_reference,
    "cpu": _refuse_cpu,
    "sdpa": _refuse_sdpa,
    "triton": _refuse_absent,
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


def explain(op: str, q: Tensor, *others: object, return_lse: bool = False, **ignored: object) -> Explanation:
    """Print which backend ``backend="auto"`` runs for a call, and each refusal with its reason.

    Args:
        op: ``"cross_frame_attention"``, ``"trajectory_attention"`` or ``"chain_links"``.
        q: the call's first tensor (for ``chain_links``: ``links.forward``).
        others: the call's other arguments; tensors among them count when asking whether a gradient is needed.
        return_lse: as in the call.

    Returns:
        The explanation that was printed, with ``choice`` and ``refusals``.

    Raises:
        ValueError: ``op`` is not an operator of this package.
    """
    if op not in OPERATORS:
        raise ValueError(f"op must be one of {', '.join(OPERATORS)}, got {op!r}")
    tensors = [x for x in (q, *others) if isinstance(x, Tensor)]
    call = Call(
        op,
        q.device.type,
        q.dtype,
        None if op == "chain_links" else q.shape[-1],
        torch.is_grad_enabled() and any(x.requires_grad for x in tensors),
        return_lse,
    )
    refusals = {b: r for b in BACKENDS[1:] if (r := refusal(b, call)) is not None}
    explanation = Explanation(call, choose("auto", call), refusals)
    sys.stdout.write(f"{explanation}\n")
    return explanation


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast floating tensors to autocast's dtype where autocast is on for their device, as SDPA does."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
