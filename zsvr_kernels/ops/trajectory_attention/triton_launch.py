"""Plans and launches the Triton kernels of trajectory attention. Plans read metadata alone."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import _triton, records, validation
from zsvr_kernels.inverse_index import Index, inverse
from zsvr_kernels.ops.trajectory_attention.triton_configs import power_of_two, tile_of
from zsvr_kernels.records import Records

# Clips of a backward are taken in turn where their pairs (p and ds of every sample and head) would exceed this.
PAIR_BYTES = 1 << 28
_BELOW = 1 << 31
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _module(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{name}")


def _check(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, valid: Tensor, frames: Tensor, grid: tuple[int, int]
) -> None:
    """Raise unless the kernels may follow these tensors' addresses; metadata only."""
    sizes = validation.check_qkv(q, k, v)
    if (reason := _triton.refusal(q.device.type, q.dtype)) is not None:
        raise ValueError(f"backend 'triton' cannot take these tensors: {reason}")
    if sizes.D % 8 or sizes.D > 256:
        raise ValueError(f"head dim must be a multiple of 8 up to 256, got {sizes.D}")
    validation.check_trajectories(positions, valid, frames, grid, q)
    T, L, P = valid.shape[1:]
    if 2 * L * P >= _BELOW or T * L * P >= _BELOW:
        raise ValueError(f"T*L*P must be below 2^31 and L*P below 2^30, got T={T}, L={L}, P={P}")
    if P * sizes.H * sizes.D >= _BELOW:  # whatever the inputs' strides: gradients and copies are contiguous
        raise ValueError(f"P*H*D must be below 2^31, got P={P}, H={sizes.H}, D={sizes.D}")


def _is_dense(x: Tensor) -> bool:
    """Return whether all rows begin at multiples of 16 bytes and 8 numbers, and frames span less than 2^31 numbers."""
    P, H, D = x.shape[2:]
    is_aligned = x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:4])
    return is_aligned and x.stride(4) == 1 and (P - 1) * x.stride(2) + (H - 1) * x.stride(3) + D < _BELOW


def _dense(x: Tensor) -> Tensor:
    """Return ``x``, or a copy if its rows cannot be loaded 16 bytes at a time: each is read many times."""
    return x if _is_dense(x) else x.clone(memory_format=torch.contiguous_format)


def _is_flat(x: Tensor) -> bool:
    """Return whether a clip's sites follow one another at one distance, within 2^31 numbers."""
    T, P = x.shape[1:3]
    return (T == 1 or x.stride(1) == P * x.stride(2)) and T * P * x.stride(2) + x.shape[3] * x.stride(3) < _BELOW


@dataclass(frozen=True)
class _Rows:
    """How a kernel reads rows of numbers.

    Attributes:
        kind: 0: numbers one by one; 1, 2: words of two bfloat16, float16. float16 gains nothing from words; they are
            for the interpreter, which computes bfloat16 wrongly, to run what bfloat16 does.
        unit: words that strides are counted in, 8 numbers: so the compiler knows that loads of 16 bytes are aligned
            also where a stride is no multiple of 16.
        per_word: numbers of a word.
    """

    kind: int
    unit: int
    per_word: int

    @classmethod
    def of(cls, dtype: torch.dtype, target: str) -> _Rows:
        kinds = {torch.bfloat16: 1, torch.float16: 2} if target == "cpu" else {torch.bfloat16: 1}
        kind = kinds.get(dtype, 0)
        return cls(kind, 4 if kind else 8, 2 if kind else 1)

    def strides(self, axes: str, **tokens: Tensor) -> dict[str, int]:
        """Return strides of the given axes in units, by the kernels' names."""
        size = self.unit * self.per_word
        return {f"{name}_{a}": x.stride("btph".index(a)) // size for name, x in tokens.items() for a in axes}

    def constants(self, **tokens: Tensor) -> dict[str, int]:
        """Return the strides within a frame of what is gathered, in words, as K_P and K_H for ``K=``."""
        pairs = {f"{name}_{a}": x.stride(axis) for name, x in tokens.items() for axis, a in ((2, "P"), (3, "H"))}
        return {name: s // self.per_word for name, s in pairs.items()}

    def sizes(self, D: int) -> dict[str, int]:
        """Return what a kernel must know of a row of D numbers."""
        words = D // self.per_word
        block = power_of_two(words)
        return {"D": D, "WORDS": words, "BLOCK": block, "UNIT": self.unit, "KIND": self.kind}


def _constants(kernel: str, target: str, q: Tensor, grid: tuple[int, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a kernel is compiled for, and its options."""
    H, D = q.shape[3:]
    tile = tile_of(kernel, target, _NAMES[q.dtype], D, H, grid)
    constants = {
        "H": H,
        "HEIGHT": grid[0],
        "WIDTH": grid[1],
        "HEADS": tile.heads,
        "TILE_H": tile.height,
        "TILE_W": tile.width,
    }
    if kernel == "sites":
        constants["ENTRIES"] = tile.entries
    options = {"num_warps": tile.num_warps, "num_stages": 1}
    if tile.registers is not None:
        options["maxnreg"] = tile.registers
    return constants, options


def _tiles(constants: dict[str, Any]) -> int:
    return -(-constants["HEIGHT"] // constants["TILE_H"]) * -(-constants["WIDTH"] // constants["TILE_W"])


def plan_fwd(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,  # [B, Tk, P, H, D]
    v: Tensor,  # [B, Tk, P, H, D]
    made: Records,
    frames: Tensor,  # int32 [T, L]
    grid: tuple[int, int],
    scale: float,
    out: Tensor,  # [B, T, P, H, D]
    lse: Tensor,  # fp32 [B, T, P, H]
    target: str,
) -> list[_triton.Launch]:
    """Return the launch of the forward."""
    B, T, _, H, _ = q.shape
    base, fractions = made
    q, k, v = _dense(q), _dense(k), _dense(v)
    rows = _Rows.of(q.dtype, target)
    out_rows = _Rows(0, 8 if _is_dense(out) else 1, 1)
    constants, options = _constants("fwd", target, q, grid)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "base": base,
        "fractions": fractions,
        "frames": frames.contiguous(),
        "out": out,
        "lse": lse,
        **rows.strides("btph", q=q),
        **rows.strides("bt", k=k, v=v),
        **out_rows.strides("btph", out=out),
        "scale_log2": scale * 1.4426950408889634,
        "Bp": base.shape[0],
        "T": T,
        "Tk": k.shape[1],
        "L": frames.shape[1],
        **rows.constants(K=k, V=v),
        **rows.sizes(q.shape[4]),
        **constants,
        "OUT_UNIT": out_rows.unit,
        "EXACT": fractions.dtype == torch.float32,
    }
    programs = B * T * (H // constants["HEADS"]) * _tiles(constants)
    return [_triton.Launch(_module("triton_fwd")._trajectory_attention_fwd_kernel, (programs,), arguments, options)]


def plan_bwd(
    d_o: Tensor,  # [B, T, P, H, D]
    dlse: Tensor | None,  # fp32 [B, T, P, H]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,  # fp32 [B, T, P, H]
    positions: Tensor,  # fp32 [Bp, T, L, P, 2]
    made: Records,
    frames: Tensor,  # int32 [T, L]
    index: Index | None,
    grid: tuple[int, int],
    scale: float,
    needs: tuple[bool, bool, bool, bool],
    target: str,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], list[_triton.Launch]]:
    """Return the gradients, empty where not needed, and the launches that fill them; ``index`` for dk and dv."""
    B, T, P, H, D = q.shape
    Tk, L = k.shape[1], frames.shape[1]
    base, fractions = made
    Bp = base.shape[0]
    d_o, q, k, v = (_dense(x) for x in (d_o, q, k, v))
    rows, single = _Rows.of(q.dtype, target), _Rows(0, 8, 1)
    lse, frames, positions = lse.contiguous(), frames.contiguous(), positions.detach().contiguous()
    gradients = tuple(
        x.new_empty(x.shape if needed else (0,)) for x, needed in zip((q, k, v, positions), needs, strict=True)
    )
    dq, dk, dv, dpositions = gradients
    needs_pairs = any(needs[1:])
    clips = max(1, min(B, PAIR_BYTES // (8 * T * L * P * H)) if needs_pairs else B)
    n = clips if needs_pairs else 0
    pairs = lse.new_empty((n, T, L, P, H), dtype=torch.int64)
    query, site, sample = (_constants(name, target, q, grid) for name in ("queries", "sites", "samples"))
    common = {"Bp": Bp, "T": T, "Tk": Tk, "L": L}
    launches = []
    for first in range(0, B, clips):
        count = min(clips, B - first)
        arguments = {
            "d_o": d_o,
            "dlse": lse if dlse is None else dlse.to(torch.float32).contiguous(),
            "q": q,
            "k": k,
            "v": v,
            "lse": lse,
            "base": base,
            "fractions": fractions,
            "frames": frames,
            "dq": dq,
            "pairs": pairs,
            **rows.strides("btph", d_o=d_o, q=q),
            **rows.strides("bt", k=k, v=v),
            **common,
            "scale": scale,
            "first_clip": first,
            **rows.constants(K=k, V=v),
            **rows.sizes(D),
            **query[0],
            "EXACT": fractions.dtype == torch.float32,
            "HAS_DLSE": dlse is not None,
            "NEEDS_DQ": needs[0],
            "NEEDS_PAIRS": needs_pairs,
        }
        programs = count * T * (H // query[0]["HEADS"]) * _tiles(query[0])
        launches.append(
            _triton.Launch(
                _module("triton_bwd_queries")._trajectory_attention_bwd_queries_kernel, (programs,), arguments, query[1]
            )
        )
        if index is not None and (needs[1] or needs[2]):
            arguments = {
                "d_o": d_o,
                "q": q,
                "pairs": pairs,
                **dict(zip(("offsets", "samples", "weights"), index, strict=True)),
                "dk": dk,
                "dv": dv,
                **rows.strides("bt", d_o=d_o, q=q),
                **rows.constants(DO=d_o, Q=q),
                **common,
                "inverse_L": 1.0 / L,
                "N": index[1].numel(),
                "first_clip": first,
                **rows.sizes(D),
                **site[0],
                "IS_SHORT": T * L < 1 << 21,
                "IS_FLAT": T * L * P * H < _BELOW and all(_is_flat(x) for x in (q, d_o)),
                "NEEDS_DK": needs[1],
                "NEEDS_DV": needs[2],
            }
            programs = count * Tk * (H // site[0]["HEADS"]) * _tiles(site[0])
            launches.append(
                _triton.Launch(
                    _module("triton_bwd_sites")._trajectory_attention_bwd_sites_kernel, (programs,), arguments, site[1]
                )
            )
        if needs[3]:
            arguments = {
                "d_o": d_o,
                "q": q,
                "k": k,
                "v": v,
                "pairs": pairs,
                "base": base,
                "positions": positions,
                "frames": frames,
                "dpositions": dpositions,
                **single.strides("btph", d_o=d_o, q=q, k=k, v=v),
                **common,
                "first_clip": first,
                "stop_clip": first + count,
                "D": D,
                "BLOCK_D": power_of_two(D),
                "UNIT": single.unit,
                **sample[0],
                "IS_FIRST": first == 0,
            }
            programs = Bp * T * L * _tiles(sample[0])
            launches.append(
                _triton.Launch(
                    _module("triton_bwd_samples")._trajectory_attention_bwd_samples_kernel,
                    (programs,),
                    arguments,
                    sample[1],
                )
            )
    return (dq, dk, dv, dpositions), launches


def _records(q: Tensor, positions: Tensor, valid: Tensor, grid: tuple[int, int], made: Records | None) -> Records:
    if made is None:
        return records.records(positions, valid, grid, records.is_exact(q.dtype))
    records.check_records(*made, valid, q.dtype)
    return made


def launch_fwd(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,  # [B, Tk, P, H, D]
    v: Tensor,  # [B, Tk, P, H, D]
    positions: Tensor,  # fp32 [Bp, T, L, P, 2]
    valid: Tensor,  # bool [Bp, T, L, P]
    frames: Tensor,  # int32 [T, L]
    grid: tuple[int, int],
    scale: float,
    out: Tensor | None = None,  # [B, T, P, H, D], written in place if given
    made: Records | None = None,  # of these trajectories; None: made here
) -> tuple[Tensor, Tensor]:  # out, lse fp32 [B, T, P, H]
    _check(q, k, v, positions, valid, frames, grid)
    if out is None:
        result = q.new_empty(q.shape)
    else:
        inputs = {"q": q, "k": k, "v": v, "positions": positions, "valid": valid, "frames": frames}
        validation.check_out(out, q, False, inputs)
        P, H, D = out.shape[2:]
        result = out if (P - 1) * out.stride(2) + (H - 1) * out.stride(3) + D < _BELOW else q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:4], dtype=torch.float32)
    if q.shape[0]:
        made = _records(q, positions, valid, grid, made)
        _triton.run(plan_fwd(q, k, v, made, frames, grid, scale, result, lse, _triton.target(q.device)))
    if out is not None and result is not out:
        out.copy_(result)
    return (result if out is None else out), lse


def launch_bwd(
    d_o: Tensor,  # [B, T, P, H, D]
    dlse: Tensor | None,  # fp32 [B, T, P, H]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,  # fp32 [B, T, P, H]
    positions: Tensor,  # fp32 [Bp, T, L, P, 2]
    valid: Tensor,  # bool [Bp, T, L, P]
    frames: Tensor,  # int32 [T, L]
    index: Index | None,  # from inverse(); None: built here if needed
    grid: tuple[int, int],
    scale: float,
    needs: tuple[bool, bool, bool, bool],  # dq, dk, dv, dpositions
    made: Records | None = None,  # of these trajectories; None: made here
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # an empty tensor where not needed
    _check(q, k, v, positions, valid, frames, grid)
    validation.check_gradients(q, d_o, dlse, lse, needs, 4)
    Tk = k.shape[1]
    if needs[1] or needs[2]:
        if index is None:
            index = inverse(positions.detach(), valid, frames, grid, Tk)
        else:
            validation.check_inverse(index, valid, Tk)
    made = _records(q, positions, valid, grid, made)
    gradients, launches = plan_bwd(
        d_o, dlse, q, k, v, lse, positions, made, frames, index, grid, scale, needs, _triton.target(q.device)
    )
    _triton.run(launches)
    if not q.shape[0]:
        gradients[3].zero_()
    return gradients
