"""The torch.library face of cross-frame attention: schemas, fakes and autograd; kernels hang below it.

torch.compile sees only ``zsvr::cross_frame_attention_fwd`` and ``_bwd``. The backend travels as an argument.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from zsvr_kernels.validation import check_one_device, refuse_double_backward

_LAUNCHERS = {
    "cpu": "cpu",
    "triton": "triton_launch",
}  # backend -> module beside this one with launch_fwd and launch_bwd

_library = torch.library.Library("zsvr", "FRAGMENT")
_library.define(
    "cross_frame_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor frames, float scale, str backend) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "cross_frame_attention_out(Tensor q, Tensor k, Tensor v, Tensor frames, float scale, str backend, "
    "Tensor(a!) out) -> Tensor"
)
_library.define(
    "cross_frame_attention_bwd(Tensor d_o, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, "
    "Tensor lse, Tensor frames, float scale, bool[] needs, str backend) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "cross_frame_attention_bwd_add(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor frames, "
    "float scale, str backend, Tensor(a!) dq, Tensor(b!) dk) -> Tensor"
)


def _launcher(backend: str) -> Any:
    if backend not in _LAUNCHERS:
        raise ValueError(f"backend must be one of {', '.join(_LAUNCHERS)}, got {backend!r}")
    return importlib.import_module(f"{__package__}.{_LAUNCHERS[backend]}")


def _fwd(q: Tensor, k: Tensor, v: Tensor, frames: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    return _launcher(backend).launch_fwd(q, k, v, frames, scale)


def _out(q: Tensor, k: Tensor, v: Tensor, frames: Tensor, scale: float, backend: str, out: Tensor) -> Tensor:
    return _launcher(backend).launch_fwd(q, k, v, frames, scale, out=out)[1]


def _bwd(
    d_o: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    frames: Tensor,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _launcher(backend).launch_bwd(d_o, dlse, q, k, v, o, lse, frames, scale, tuple(needs))


def _bwd_add(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    frames: Tensor,
    scale: float,
    backend: str,
    dq: Tensor,
    dk: Tensor,
) -> Tensor:
    launch = _launcher(backend).launch_bwd
    return launch(d_o, None, q, k, v, o, lse, frames, scale, (True, True, True), into=(dq, dk))[2]


_library.impl("cross_frame_attention_fwd", _fwd, "CompositeExplicitAutograd")
_library.impl("cross_frame_attention_out", _out, "CompositeExplicitAutograd")
_library.impl("cross_frame_attention_bwd", _bwd, "CompositeExplicitAutograd")
_library.impl("cross_frame_attention_bwd_add", _bwd_add, "CompositeExplicitAutograd")


@torch.library.register_fake("zsvr::cross_frame_attention_fwd", lib=_library)
def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, frames: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    check_one_device(q, k, v, frames)
    return q.new_empty(q.shape), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.register_fake("zsvr::cross_frame_attention_out", lib=_library)
def _out_fake(q: Tensor, k: Tensor, v: Tensor, frames: Tensor, scale: float, backend: str, out: Tensor) -> Tensor:
    check_one_device(q, k, v, frames, out)
    return q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.register_fake("zsvr::cross_frame_attention_bwd", lib=_library)
def _bwd_fake(
    d_o: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    frames: Tensor,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    check_one_device(d_o, dlse, q, k, v, o, lse, frames)
    return tuple(q.new_empty(x.shape if n else (0,)) for x, n in zip((q, k, v), needs, strict=True))


@torch.library.register_fake("zsvr::cross_frame_attention_bwd_add", lib=_library)
def _bwd_add_fake(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
    check_one_device(d_o, q, k, v, *(x for x in others if isinstance(x, Tensor)))
    return v.new_empty(v.shape)


class CrossFrameAttentionFunction(torch.autograd.Function):
    """Autograd over the two ops; lse is differentiable when it is returned to the caller."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        frames: Tensor,
        scale: float,
        backend: str,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        o, lse = torch.ops.zsvr.cross_frame_attention_fwd(q, k, v, frames, scale, backend)
        ctx.save_for_backward(q, k, v, o, lse, frames)
        ctx.scale, ctx.backend, ctx.return_lse = scale, backend, return_lse
        if not return_lse:
            ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("cross_frame_attention")
        q, k, v, o, lse, frames = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.zsvr.cross_frame_attention_bwd(
            d_o,
            dlse if ctx.return_lse else None,
            q,
            k,
            v,
            o,
            lse,
            frames,
            ctx.scale,
            needs,
            ctx.backend,
        )
        dq, dk, dv = (g if n else None for g, n in zip(gradients, needs, strict=True))
        return dq, dk, dv, None, None, None, None
