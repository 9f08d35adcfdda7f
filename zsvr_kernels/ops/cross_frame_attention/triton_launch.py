"""Launches the Triton kernels of cross-frame attention. `plan_fwd` and `plan_bwd` read metadata alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zsvr_kernels import _triton, validation
from zsvr_kernels.ops.cross_frame_attention.triton_bwd import (
    _cross_frame_attention_bwd_dkv_kernel,
    _cross_frame_attention_bwd_dq_kernel,
    _inverse_frames_kernel,
)
from zsvr_kernels.ops.cross_frame_attention.triton_configs import Tiles, is_packed, split, tiles
from zsvr_kernels.ops.cross_frame_attention.triton_fwd import _cross_frame_attention_fwd_kernel

# Frame tables on a GPU whose values were read, with the version and number of frames they were good for.
_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _check(q: Tensor, k: Tensor, v: Tensor, frames: Tensor) -> None:
    """Raise unless a kernel may follow these tensors' addresses; metadata only."""
    D = validation.check_qkv(q, k, v).D
    validation.check_dtype("q", q, *_triton.DTYPES)
    validation.check_frames(frames, q)
    if D % 8 or D > 256:
        raise ValueError(f"D must be a multiple of 8 up to 256, got {D}")
    if (reason := _triton.refusal(q.device.type, q.dtype)) is not None:
        raise RuntimeError(f"cross_frame_attention: backend 'triton' cannot run this call: {reason}")
    if q.device.type == "cpu":
        validation.check_on_cpu(q=q, k=k, v=v, frames=frames)


def _check_frame_values(frames: Tensor, Tk: int) -> None:
    """Raise for a frame table with impossible entries; on a GPU once per table and never while a graph is captured.

    Reading values there waits for the device, and kernels take such entries as absent anyway.
    """
    if frames.device.type == "cpu":
        validation.check_frame_values(frames, Tk)
        return
    state = (0 if frames.is_inference() else frames._version, Tk)
    if _seen.get(frames) == state or torch.cuda.is_current_stream_capturing():
        return
    validation.check_frame_values(frames, Tk)
    _seen[frames] = state


def _strides(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return kernel arguments for the strides of tokens ``[B, T, P, H, D]`` by name.

    Those between sites and heads are constants; those between frames and clips count units of ALIGN elements, so that
    the compiler knows what divides them whatever their value.
    """
    outer: dict[str, int] = {}
    inner: dict[str, int] = {}
    is_wide = False
    for name, x in tensors.items():
        P, D = x.shape[2], x.shape[4]
        batch, frame, site, head = (st if n > 1 else 0 for st, n in zip(x.stride()[:4], x.shape[:4], strict=True))
        outer |= {f"{name}_batch": batch, f"{name}_frame": frame}
        inner |= {f"{name.upper()}_SITE": site, f"{name.upper()}_HEAD": head}
        is_wide |= P * max(site, x.shape[3] * D) >= 2**31
    align = math.gcd(16, *outer.values())
    return {name: stride // align for name, stride in outer.items()} | inner | {"ALIGN": align, "WIDE": is_wide}


def _constants(q: Tensor, scale: float, chosen: Tiles) -> dict[str, Any]:
    P, D = q.shape[2], q.shape[4]
    D1, D2 = split(D)
    return {
        # Not zero, so that -inf times it stays what it is; scores as small as that make no difference.
        "scale_log2": max(abs(scale) * math.log2(math.e), 1e-30),
        "P": P,
        "D": D,
        "D1": D1,
        "D2": D2,
        "NEGATIVE": scale < 0,
        "PRECISION": _triton.input_precision(q.dtype),
        "BLOCK_M": chosen.BLOCK_M,
        "BLOCK_N": chosen.BLOCK_N,
    }


def _steps(entries: int, P: int, block: int) -> int:
    return math.ceil(entries * P / block) if is_packed(P, block) else entries * math.ceil(P / block)


def plan_fwd(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,  # [B, Tk, P, H, D]
    v: Tensor,  # [B, Tk, P, H, D]
    frames: Tensor,  # int32 [T, R], contiguous
    scale: float,
    out: Tensor | None,  # [B, T, P, H, D]
    target: str,
) -> tuple[list[_triton.Launch], Tensor, Tensor]:  # launches, out, lse fp32 [B, T, P, H]
    B, T, P, H, D = q.shape
    R = frames.shape[1]
    out = q.new_empty(q.shape) if out is None else out
    lse = q.new_empty(q.shape[:4], dtype=torch.float32)
    chosen = tiles("fwd", target, q.element_size(), _triton.input_precision(q.dtype), D, P)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "o": out,
        "lse": lse,
        "frames": frames,
        "T": T,
        "Tk": k.shape[1],
        "H": H,
        "R": R,
        "steps": _steps(R, P, chosen.BLOCK_N),
        "PACKED": is_packed(P, chosen.BLOCK_N),
        **_strides({"q": q, "k": k, "v": v, "o": out}),
        **_constants(q, scale, chosen),
    }
    grid = (math.ceil(P / chosen.BLOCK_M) * T * H * B,)
    return [_triton.Launch(_cross_frame_attention_fwd_kernel, grid, arguments, chosen.options)], out, lse


def plan_bwd(
    d_o: Tensor,  # [B, T, P, H, D]
    dlse: Tensor | None,  # fp32 [B, T, P, H], contiguous
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,  # [B, T, P, H, D]
    lse: Tensor,  # fp32 [B, T, P, H], contiguous
    frames: Tensor,  # int32 [T, R], contiguous
    scale: float,
    needs: tuple[bool, bool, bool],
    into: tuple[Tensor, Tensor] | None,
    target: str,
) -> tuple[list[_triton.Launch], tuple[Tensor, Tensor, Tensor]]:  # launches, (dq, dk, dv)
    B, T, P, H, D = q.shape
    Tk, R = k.shape[1], frames.shape[1]
    dq, dk = into or (q.new_empty(x.shape if n else (0,)) for x, n in zip((q, k), needs, strict=False))
    dv = q.new_empty(v.shape if needs[2] else (0,))
    if not any(needs):
        return [], (dq, dk, dv)
    exact = q.dtype == torch.float32
    rows = q.new_empty((3 if exact else 2, B, H, T, P), dtype=torch.float32)
    common = {
        "q": q,
        "k": k,
        "v": v,
        "d_o": d_o,
        "rows": rows,
        "scale": scale,
        "plane": B * H * T * P,
        "T": T,
        "Tk": Tk,
        "H": H,
        "EXACT": exact,
        "ADDS": into is not None,
    }
    tokens = {"q": q, "k": k, "v": v}
    chosen = tiles("dq", target, q.element_size(), _triton.input_precision(q.dtype), D, P)
    launches = [
        _triton.Launch(
            _cross_frame_attention_bwd_dq_kernel,
            (math.ceil(P / chosen.BLOCK_M) * T * H * B,),
            {
                **common,
                "o": o,
                "lse": lse,
                "dlse": lse if dlse is None else dlse,
                "frames": frames,
                "dq": dq,
                "R": R,
                "steps": _steps(R, P, chosen.BLOCK_N),
                "HAS_DLSE": dlse is not None,
                "NEEDS_DQ": needs[0],
                "PACKED": is_packed(P, chosen.BLOCK_N),
                **_strides(tokens | {"o": o, "do": d_o}),
                **_constants(q, scale, chosen),
            },
            chosen.options,
        )
    ]
    if needs[1] or needs[2]:
        inverse = frames.new_empty((2, Tk))
        users = frames.new_empty(T * R)
        chosen = tiles("dkv", target, q.element_size(), _triton.input_precision(q.dtype), D, P)
        launches += [
            _triton.Launch(
                _inverse_frames_kernel,
                (Tk,),
                {
                    "frames": frames,
                    "inverse": inverse,
                    "users": users,
                    "Tk": Tk,
                    "R": R,
                    "total": T * R,
                    "BLOCK": min(1024, max(16, 1 << (T * R - 1).bit_length())),
                },
                {"num_warps": 1 if T * R <= 256 else 4},
            ),
            _triton.Launch(
                _cross_frame_attention_bwd_dkv_kernel,
                (math.ceil(P / chosen.BLOCK_N) * Tk * H * B,),
                {
                    **common,
                    "inverse": inverse,
                    "users": users,
                    "dk": dk,
                    "dv": dv,
                    "NEEDS_DK": needs[1],
                    "NEEDS_DV": needs[2],
                    "PACKED": is_packed(P, chosen.BLOCK_M),
                    **_strides(tokens | {"do": d_o}),
                    **_constants(q, scale, chosen),
                },
                chosen.options,
            ),
        ]
    return launches, (dq, dk, dv)


def launch_fwd(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,  # [B, Tk, P, H, D]
    v: Tensor,  # [B, Tk, P, H, D]
    frames: Tensor,  # int32 [T, R]
    scale: float,
    out: Tensor | None = None,  # [B, T, P, H, D], written in place if given
) -> tuple[Tensor, Tensor]:  # out, lse fp32 [B, T, P, H]
    _check(q, k, v, frames)
    _check_frame_values(frames, k.shape[1])
    if out is not None:
        validation.check_out(out, q, False, {"q": q, "k": k, "v": v, "frames": frames})
    launches, out, lse = plan_fwd(q, k, v, frames.contiguous(), scale, out, _triton.target(q.device))
    _triton.run(launches)
    return out, lse


def launch_bwd(
    d_o: Tensor,  # [B, T, P, H, D]
    dlse: Tensor | None,  # fp32 [B, T, P, H]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,  # [B, T, P, H, D]
    lse: Tensor,  # fp32 [B, T, P, H]
    frames: Tensor,  # int32 [T, R]
    scale: float,
    needs: tuple[bool, bool, bool],  # dq, dk, dv
    into: tuple[Tensor, Tensor] | None = None,  # dq, dk to add to, instead of new ones
) -> tuple[Tensor, Tensor, Tensor]:  # an empty tensor where not needed
    _check(q, k, v, frames)
    if frames.device.type == "cpu":
        validation.check_frame_values(frames, k.shape[1])
    validation.check_gradients(q, d_o, dlse, lse, needs, 3)
    validation.check_tensor("o", o, 5, "[B, T, P, H, D]")
    validation.check_dtype("o", o, q.dtype)
    validation.check_shape("o", o, tuple(q.shape), "the shape of q")
    validation.check_device("o", o, q)
    if into is not None:
        for name, x, target in zip(("dq", "dk"), (q, k), into, strict=True):
            validation.check_sum(name, target, x)
    launches, gradients = plan_bwd(
        d_o if d_o.stride(-1) == 1 else d_o.contiguous(),
        None if dlse is None else dlse.to(torch.float32).contiguous(),
        q,
        k,
        v,
        o if o.stride(-1) == 1 else o.contiguous(),
        lse.contiguous(),
        frames.contiguous(),
        scale,
        needs,
        into,
        _triton.target(q.device),
    )
    _triton.run(launches)
    return gradients
