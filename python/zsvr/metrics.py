"""Quality of restored clips: per frame (PSNR, SSIM, LPIPS), over time (WE, FS, OFME, tLPIPS), of sets (FID, FVD)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zsvr.flow import DIS, EstimationOptions, Estimator, Flow, Given, estimate
from zsvr.flow.estimators import luma as to_luma
from zsvr_kernels.demo.metrics import occluded, psnr_frames, quantize, ssim_frames, warping_errors

Encoder = Callable[[Tensor], Tensor]  # [N, 3, h, w] in [0, 1] -> [N, D]
Distance = Callable[[Tensor, Tensor], Tensor]  # two of [N, 3, H, W] in [0, 1] -> [N]

SSIM_WINDOW = 11
CLIP_SIZE = 224
FVD_FRAMES = 16
UNITS = {
    "psnr": ("PSNR dB", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "we": ("WE x1e-2", "{:.4f}"),
    "we_static": ("WE static x1e-2", "{:.4f}"),
    "we_dynamic": ("WE dynamic x1e-2", "{:.4f}"),
    "fs": ("FS", "{:.4f}"),
    "ofme": ("OFME px", "{:.3f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "tlpips": ("tLPIPS", "{:.4f}"),
    "fid": ("FID", "{:.2f}"),
    "fvd": ("FVD", "{:.1f}"),
    "seconds_per_frame": ("s/frame", "{:.2f}"),
    "peak_memory_mb": ("peak MB", "{:.0f}"),
}


@dataclass(frozen=True)
class MetricOptions:
    """How metrics are taken.

    Attributes:
        quantize: round frames to the 256 levels of a file first.
        luma: PSNR and SSIM of BT.601 luma only.
        flow_source: whose flow WE uses: "gt" the reference, "input" the degraded clip's preview.
        dynamic_px: pixels that move further are dynamic.
        ofme_norm: "epe" Euclidean, or "l1".
    """

    quantize: bool = True
    luma: bool = False
    flow_source: str = "gt"
    dynamic_px: float = 1.0
    ofme_norm: str = "epe"

    def __post_init__(self) -> None:
        if self.flow_source not in ("gt", "input"):
            raise ValueError(f"flow_source must be gt or input, got {self.flow_source!r}")
        if self.ofme_norm not in ("epe", "l1"):
            raise ValueError(f"ofme_norm must be epe or l1, got {self.ofme_norm!r}")
        if not self.dynamic_px >= 0:
            raise ValueError(f"dynamic_px must be at least 0, got {self.dynamic_px}")


def _check_clips(output: Tensor, other: Tensor, name: str = "reference") -> None:
    for label, x in (("output", output), (name, other)):
        if x.dim() != 4 or x.shape[1] not in (1, 3) or not x.is_floating_point() or len(x) < 1:
            raise ValueError(f"{label} must be floating [T, 3, H, W] in [0, 1], got {tuple(x.shape)} of {x.dtype}")
        broken = (~torch.isfinite(x).flatten(1).all(1)).nonzero().flatten().tolist()
        if broken:
            raise ValueError(f"{label} has values that are not finite in {len(broken)} frames, first in {broken[0]}")
    if output.shape != other.shape:
        sizes = [f"{len(x)} frames of {x.shape[3]}x{x.shape[2]}" for x in (output, other)]
        raise ValueError(f"output has {sizes[0]}, {name} {sizes[1]}: they must be the same")


def psnr(output: Tensor, reference: Tensor, *, luma: bool = False) -> Tensor:
    """Return the PSNR of every frame in dB, at most 100, float64 ``[T]``; clips ``[T, 3, H, W]`` in [0, 1].

    Raises:
        ValueError: clips of different shapes, or with values that are not finite.
    """
    _check_clips(output, reference)
    return psnr_frames(*_channels(output, reference, luma))


def ssim(output: Tensor, reference: Tensor, *, luma: bool = False) -> Tensor:
    """Return the SSIM of every frame, float64 ``[T]``; clips ``[T, 3, H, W]`` in [0, 1].

    Source: Wang et al., IEEE TIP 2004: Gaussian 11 x 11, std 1.5, valid region, population covariance, mean over RGB.

    Raises:
        ValueError: clips of different shapes, smaller than the window, or with values that are not finite.
    """
    _check_clips(output, reference)
    if min(output.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW}, got {tuple(output.shape[2:])}")
    return ssim_frames(*_channels(output, reference, luma))


def _channels(output: Tensor, reference: Tensor, luma: bool) -> tuple[Tensor, Tensor]:
    if not luma:
        return output, reference
    return to_luma(output.double())[:, None], to_luma(reference.double())[:, None]


def warping_error(output: Tensor, flow: Flow, *, dynamic_px: float = 1.0) -> dict[str, Tensor]:
    """Return the warping error of every pair of frames in units of 1e-2: all pixels, static ones, dynamic ones.

    ``100 * mean (W(o_{i+1}, F) - o_i)^2`` over pixels that are not occluded and channels; 0 where there are none.

    Args:
        output: ``[T, 3, H, W]`` in [0, 1].
        flow: of the reference video, on the same canvas.
        dynamic_px: pixels whose flow is longer are dynamic.

    Returns:
        ``we``, ``we_static``, ``we_dynamic``, float64 ``[T-1]``, NaN across cuts; and the shares of pixels that count,
        ``visible`` and ``dynamic``.

    Raises:
        ValueError: flow of another clip.

    Source: Lai et al., Learning Blind Video Temporal Consistency, ECCV 2018, with their occlusion rule (Ruder et al.
    2016) and, as occluded, too, what leaves the frame.
    """
    if flow.frames != len(output) or flow.forward.shape[2:] != output.shape[2:]:
        got = (flow.frames, *flow.forward.shape[2:])
        raise ValueError(f"flow must be of {len(output)} frames of {tuple(output.shape[2:])}, is of {got}")
    parts: dict[str, list[Tensor]] = {name: [] for name in ("we", "we_static", "we_dynamic", "visible", "dynamic")}
    for n in range(flow.frames - 1):
        forward, backward = flow.forward[n : n + 1], flow.backward[n : n + 1]
        visible = ~occluded(forward, backward)
        moving = forward.norm(dim=1) > dynamic_px
        counted = torch.stack((visible, visible & ~moving, visible & moving))
        errors = 100 * warping_errors(output[n : n + 2], forward, counted)
        for name, error in zip(("we", "we_static", "we_dynamic"), errors, strict=True):
            parts[name].append(error)
        parts["visible"].append(visible.double().mean()[None])
        parts["dynamic"].append((visible & moving).double().mean()[None])
    empty = torch.zeros(0, dtype=torch.float64)
    result = {name: torch.cat(values).cpu() if values else empty for name, values in parts.items()}
    return {name: values.masked_fill(flow.cuts.cpu(), math.nan) for name, values in result.items()}


def flow_error(output: Flow, reference: Flow, *, norm: str = "epe") -> Tensor:
    """Return the mean distance of two clips' flows for every pair of frames, in pixels, float64 ``[T-1]``.

    Across cuts of the reference it is NaN.

    Args:
        norm: "epe" Euclidean distance, "l1" sum of absolute differences.
    """
    difference = (output.forward - reference.forward).double()
    distance = difference.norm(dim=1) if norm == "epe" else difference.abs().sum(1)
    return distance.mean((1, 2)).cpu().masked_fill(reference.cuts.cpu(), math.nan)


def clip_crop(u: Tensor, size: int = CLIP_SIZE) -> Tensor:
    """Return frames ``[N, 3, H, W]`` with the shorter side at ``size`` (antialiased bicubic), centre-cropped.

    The longer side is rounded down, as CLIP's own preprocessing does.
    """
    H, W = u.shape[-2:]
    scaled = [side * size // min(H, W) for side in (H, W)]
    u = F.interpolate(u, size=scaled, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    return u[..., top : top + size, left : left + size]


@torch.no_grad()
def frame_similarity(output: Tensor, encoder: Encoder) -> Tensor:
    """Return the cosine of the embeddings of every two neighbouring frames, float64 ``[T-1]``.

    Args:
        output: ``[T, 3, H, W]`` in [0, 1].
        encoder: takes ``[N, 3, 224, 224]`` in [0, 1], see `zsvr.temporal.semantic.open_clip_encoder`.
    """
    embedded = torch.cat([encoder(clip_crop(frame[None].float())).double().cpu() for frame in output])
    return F.cosine_similarity(embedded[:-1], embedded[1:], dim=1, eps=1e-12)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to features ``[N, D]``; NaN with fewer than two of either.

    ``|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))``. Source: Heusel et al., NeurIPS 2017.

    Raises:
        ValueError: features that are not finite, as a network with broken weights gives.
    """
    if min(len(a), len(b)) < 2:
        return math.nan
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError("features are not finite: check the frames and the weights of the network")
    a, b = a.double().cpu(), b.double().cpu()
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance.clamp(min=0))


def _windows(clip: Tensor, length: int) -> Tensor:
    """Return the windows ``[N, 3, length, H, W]`` of a clip ``[T, 3, H, W]`` that do not overlap."""
    count = len(clip) // length
    return clip[: count * length].unflatten(0, (count, length)).transpose(1, 2)


def _clipped(clip: Tensor) -> Tensor:
    return clip.to(torch.promote_types(clip.dtype, torch.float32)).clamp(0, 1)


def _mean(values: Tensor) -> float:
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else math.nan


@torch.no_grad()
def evaluate(
    output: Tensor,
    reference: Tensor | None = None,
    *,
    options: MetricOptions | None = None,
    estimator: Estimator | None = None,
    flow_options: EstimationOptions | None = None,
    flow: Flow | None = None,
    preview: Tensor | None = None,
    encoder: Encoder | None = None,
    lpips: Distance | None = None,
    inception: Encoder | None = None,
    i3d: Encoder | None = None,
    seconds_per_frame: float = math.nan,
    peak_memory_mb: float = math.nan,
) -> dict[str, Any]:
    """Measure a restored clip.

    Args:
        output: floating ``[T, 3, H, W]``, clipped to [0, 1].
        reference: the clean clip, of the same shape. Without it only WE (on ``preview``'s flow) and FS are known.
        options: see `MetricOptions`.
        estimator, flow_options: of WE and OFME; None: DIS. Files (`zsvr.flow.Given`) give no OFME.
        flow: the source's flow if it is known already, for WE and OFME; ``options.flow_source`` says of what.
        preview: the degraded clip as a picture, ``[T, 3, H, W]``: its flow is WE's with flow_source "input".
        encoder: for FS, see `zsvr.temporal.semantic.open_clip_encoder`.
        lpips: for LPIPS and tLPIPS, see `zsvr.encoders.LPIPS`.
        inception: features ``[N, D]`` of frames ``[N, 3, H, W]``, for FID, see `zsvr.encoders.inception`.
        i3d: features ``[N, D]`` of clips ``[N, 3, 16, H, W]``, for FVD, see `zsvr.i3d.i3d`.
        seconds_per_frame, peak_memory_mb: passed through to the result.

    Returns:
        The means by name (`UNITS`), NaN where there is nothing to measure (times with T = 1); ``frames``; ``per_frame``
        and ``per_pair`` with all values; ``cuts``, the numbers of pairs left out of temporal metrics; ``flow``, whose
        flow and from which estimator; ``notes``, why a value is missing.

    Raises:
        ValueError: clips that do not fit each other, or with values that are not finite.
    """
    options = MetricOptions() if options is None else options
    estimator = DIS() if estimator is None else estimator
    flow_options = EstimationOptions() if flow_options is None else flow_options
    for name, other in (("output", output), ("reference", reference), ("preview", preview)):
        if other is not None:
            _check_clips(output, other, name)
    clip = quantize if options.quantize else _clipped
    device, output = output.device, clip(output)
    reference = None if reference is None else clip(reference).to(device)
    preview = None if preview is None else _clipped(preview).to(device)
    T, notes, cuts = len(output), [], torch.zeros(len(output) - 1, dtype=torch.bool)
    frame: dict[str, Tensor] = {}
    pair: dict[str, Tensor] = {}
    result: dict[str, Any] = dict.fromkeys(UNITS, math.nan)

    if reference is None:
        notes.append("psnr, ssim, ofme, fid, fvd, lpips: no reference given")
    else:
        frame["psnr"] = psnr(output, reference, luma=options.luma)
        frame["ssim"] = ssim(output, reference, luma=options.luma)
    source = reference if options.flow_source == "gt" else preview
    described: dict[str, Any] | None = None
    if T == 1:
        notes.append("temporal metrics: there is one frame")
    elif source is None and flow is None:
        need = "reference" if options.flow_source == "gt" else "preview of the input"
        notes.append(f"we: no {need} given to take flow from")
    else:
        described = {"source": options.flow_source, "given": True}
        if flow is None and source is not None:
            flow = estimate(source, estimator, flow_options)
            described = {"source": options.flow_source, "estimator": estimator.describe()}
        assert flow is not None
        flow = flow.to(device)
        cuts = flow.cuts.cpu()
        pair |= warping_error(output, flow, dynamic_px=options.dynamic_px)
    if isinstance(estimator, Given):
        notes.append("ofme: the estimator reads files, which do not depend on the output")
    elif T > 1 and reference is not None:
        whole = replace(flow_options, cut_threshold=1.0)
        if flow is None:
            flow = estimate(reference, estimator, flow_options)
            own, cuts = flow, flow.cuts.cpu()
        elif options.flow_source == "gt" and described is not None and "estimator" in described:
            own = flow
        else:
            own = estimate(reference, estimator, whole)
        moved = estimate(output, estimator, whole)
        pair["ofme"] = flow_error(moved, own, norm=options.ofme_norm).masked_fill(cuts, math.nan)
    if encoder is None:
        notes.append("fs: no encoder given, such as CLIP from a local folder")
    elif T > 1:
        pair["fs"] = frame_similarity(output, encoder).masked_fill(cuts, math.nan)
    if lpips is None:
        notes.append("lpips, tlpips: no weights given")
    elif reference is not None:
        frame["lpips"] = _each(lpips, output, reference)
        steps = [_each(lpips, clip[:-1], clip[1:]) for clip in (output, reference)]
        pair["tlpips"] = (steps[0] - steps[1]).abs().masked_fill(cuts, math.nan)
    for name, features, clips in (
        ("fid", inception, lambda x: x),
        ("fvd", i3d, lambda x: _windows(x, FVD_FRAMES)),
    ):
        if features is None:
            notes.append(f"{name}: no features given")
        elif reference is not None:
            seen = [clips(x) for x in (output, reference)]
            result[name] = frechet_distance(*(_embed(features, x) for x in seen)) if len(seen[0]) > 1 else math.nan
            if len(seen[0]) < 2:
                notes.append(f"{name}: too few frames ({T}) to fit a Gaussian to")

    result |= {name: _mean(values) for name, values in (frame | pair).items()}
    result |= {"seconds_per_frame": seconds_per_frame, "peak_memory_mb": peak_memory_mb}
    return result | {
        "frames": T,
        "cuts": cuts.nonzero().flatten().tolist(),
        "flow": described,
        "per_frame": {name: values.tolist() for name, values in frame.items()},
        "per_pair": {name: values.tolist() for name, values in pair.items()},
        "notes": notes,
    }


def _each(distance: Distance, a: Tensor, b: Tensor) -> Tensor:
    """Return the distance of every two frames, float64 ``[T]``, one at a time."""
    values = [distance(x[None], y[None]).double().cpu().flatten() for x, y in zip(a, b, strict=True)]
    return torch.cat(values) if values else torch.zeros(0, dtype=torch.float64)


def _embed(encoder: Encoder, x: Tensor) -> Tensor:
    return torch.cat([encoder(x[n : n + 1]).double().cpu() for n in range(len(x))])


def peak_memory_mb(device: torch.device | str = "cpu") -> float:
    """Return the most memory this process has held on a device so far, in MB (2^20 bytes)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def mean_over_videos(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the mean of each metric over videos, leaving out those where it is NaN."""
    table = {name: torch.tensor([float(r[name]) for r in results], dtype=torch.float64) for name in UNITS}
    return {name: _mean(values) for name, values in table.items()}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return results by name of method or video as a text table; metrics that none of them has are left out.

    Below it stands whose flow the temporal metrics used, and from which estimator.
    """
    names = [m for m in UNITS if any(not math.isnan(float(r.get(m, math.nan))) for r in results.values())]
    rows = [["", *(UNITS[m][0] for m in names)]]
    for label, result in results.items():
        cells = [float(result.get(m, math.nan)) for m in names]
        rows.append(
            [label, *("-" if math.isnan(x) else UNITS[m][1].format(x) for m, x in zip(names, cells, strict=True))]
        )
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = []
    for label, *texts in rows:
        padded = [cell.rjust(width) for cell, width in zip(texts, widths[1:], strict=True)]
        lines.append("  ".join([label.ljust(widths[0]), *padded]).rstrip())
    flows = {_flow_text(result["flow"]) for result in results.values() if result.get("flow")}
    return "\n".join([*lines, *(f"flow: {text}" for text in sorted(flows))])


def _flow_text(flow: dict[str, Any]) -> str:
    whose = {"gt": "the reference", "input": "the input's preview"}[flow["source"]]
    return f"of {whose}, {flow['estimator']['name'] if 'estimator' in flow else 'given'}"
