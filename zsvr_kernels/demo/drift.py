"""How far features drift along the paths of what the clip shows: spatial self-attention beside SLR attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zsvr_kernels as zk
from zsvr_kernels.demo.clip import Clip
from zsvr_kernels.demo.denoise import optical_flow
from zsvr_kernels.demo.network import STRIDE, SmallUNet
from zsvr_kernels.sampling import Grid

LONGEST, FRAMES = 96, 8  # of what is measured; larger clips are reduced
SEEDS = 3  # networks measured; the table gives their mean
Flows = tuple[Tensor, Tensor]

# row -> how the layers combine, whose flow they follow, and whether they correct it
ROWS: dict[str, tuple[str, str, bool]] = {
    "spatial": ("spatial", "true", False),
    "cross": ("cross", "true", False),
    "serial": ("serial", "true", False),
    "parallel": ("parallel", "true", False),
    "joint": ("joint", "true", False),
    "serial, DIS on noisy": ("serial", "noisy", False),
    "the same, corrected": ("serial", "noisy", True),
}


def along_trajectories(features: Tensor, trajectories: zk.Trajectories) -> float:
    """Return the variance of features along trajectories, divided by their total variance.

    Per token with at least two live slots: the unbiased variance over them, mean over channels; then the mean over
    tokens, divided by the mean over channels of the variance over all tokens of all frames. 0: features move with what
    they describe; 1: a token's path is as mixed as the whole clip.

    Args:
        features: ``[T, P, C]``.
        trajectories: for one clip of T frames on a grid of P sites.

    Returns:
        The ratio; NaN where no token is live in two frames, or nothing varies.
    """
    Hg, Wg = trajectories.grid
    size = torch.tensor((max(Wg - 1, 1), max(Hg - 1, 1)))
    images = features.detach().mT.unflatten(2, (Hg, Wg))  # [T, C, Hg, Wg]
    total = float(images.double().var((0, 2, 3)).mean())
    amount, tokens = 0.0, 0
    for i, row in enumerate(trajectories.frames.long()):
        slots = (row >= 0).nonzero()[:, 0]
        where = (2 * trajectories.positions[0, i, slots] / size - 1).unflatten(1, (Hg, Wg))
        sampled = F.grid_sample(images[row[slots]], where, padding_mode="border", align_corners=True)  # [n, C, Hg, Wg]
        live = trajectories.valid[0, i, slots].unflatten(1, (1, Hg, Wg))
        count = live.sum(0)  # [1, Hg, Wg]
        mean = (sampled * live).sum(0) / count.clamp(min=1)
        variance = ((sampled - mean).square() * live).sum(0).mean(0) / (count[0] - 1)
        usable = count[0] > 1
        amount += float(variance[usable].double().sum())
        tokens += int(usable.sum())
    return amount / tokens / total if tokens and total > 0 else math.nan


def reduced(frames: Tensor) -> Tensor:
    """Return the first frames, area-averaged to at most `LONGEST` pixels and cut to sides that are multiples of 8."""
    frames = frames[:FRAMES]
    H, W = frames.shape[2:]
    if max(H, W) > LONGEST:
        size = tuple(max(STRIDE, round(side * LONGEST / max(H, W))) for side in (H, W))
        frames = F.interpolate(frames, size=size, mode="area")
    return frames[..., : frames.shape[2] // STRIDE * STRIDE, : frames.shape[3] // STRIDE * STRIDE]


def features(network: SmallUNet, frames: Tensor, context: zk.VideoContext) -> dict[Grid, list[Tensor]]:
    """Return what every attention layer adds to its input, and the network's output, ``[T, P, C]`` by token grid."""
    found: dict[Grid, list[Tensor]] = {}

    def keep(_: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.setdefault((output.shape[2], output.shape[3]), []).append((output - inputs[0]).flatten(2).mT)

    handles = [layer.register_forward_hook(keep) for layer in network.attentions()]
    try:
        # Step 0 of 1, with correction admitted from the start where it is on.
        with torch.no_grad(), context.step(0, 1):
            output = network(2 * frames - 1, context)
    finally:
        for handle in handles:
            handle.remove()
    found[output.shape[2], output.shape[3]] = [output.flatten(2).mT]
    return found


def measure(clip: Clip, noisy: Tensor, truth: Tensor, backend: str = "auto") -> dict[str, Any]:
    """Measure the drift of a random network's features with each way of attending.

    Args:
        clip: for its exact flow, where it has one.
        noisy: ``[T, 3, H, W]``, what the network sees.
        truth: ``[T, 3, H, W]``, the frames whose motion counts where the clip's is not known exactly.
        backend: of the attention operators.

    Returns:
        ``size``: ``[T, H, W]`` of what was measured; ``grids``: names of the columns; ``rows``: name -> one number per
        column, the mean over layers and over `SEEDS` networks, or None where no path could be followed.
        Empty for fewer than two frames.
    """
    noisy, truth = reduced(noisy), reduced(truth)
    if len(noisy) < 2:
        return {}
    if clip.flow_forward is not None and clip.flow_backward is not None:
        flows = {"true": (clip.flow_forward, clip.flow_backward)}
    else:
        flows = {"true": _flow(truth)}
    flows["noisy"] = _flow(noisy)
    H, W = noisy.shape[2:]
    if flows["true"][0].shape[2:] != noisy.shape[2:]:
        raise ValueError(f"exact flow is {tuple(flows['true'][0].shape)}, but what is measured is {H}x{W} pixels")

    contexts = {source: zk.VideoContext(*(x[None] for x in pair)) for source, pair in flows.items()}
    judge = zk.VideoContext(*(x[None] for x in flows["true"]))
    sums: dict[str, dict[Grid, list[float]]] = {row: {} for row in ROWS}
    for seed in range(SEEDS):
        network = SmallUNet(seed)
        for row, (combine, source, corrects) in ROWS.items():
            correct = zk.CorrectionOptions(enabled=corrects, similarity_start=0.0)
            contexts[source].configure(zk.SLROptions(combine=combine, correct=correct, backend=backend))
            contexts[source].reset()
            for grid, tensors in features(network, noisy, contexts[source]).items():
                paths = judge.trajectories(grid)
                sums[row].setdefault(grid, []).extend(along_trajectories(x, paths) for x in tensors)
    order = sorted(sums["spatial"], reverse=True)
    names = [f"output {H}x{W}" if grid == (H, W) else f"{grid[0]}x{grid[1]}" for grid in order]
    return {
        "size": [len(noisy), H, W],
        "grids": names,
        "rows": {row: [_mean(v[g]) for g in order] for row, v in sums.items()},
    }


def _mean(values: list[float]) -> float | None:
    mean = sum(values) / len(values)
    return None if math.isnan(mean) else mean


def _flow(frames: Tensor) -> Flows:
    """Return DIS flow of frames of any size; to reach the 16 pixels it needs, borders are repeated."""
    H, W = frames.shape[2:]
    more = (0, max(0, 16 - W), 0, max(0, 16 - H))
    forward, backward = optical_flow(F.pad(frames, more, mode="replicate"))
    return forward[..., :H, :W].contiguous(), backward[..., :H, :W].contiguous()


def text(found: dict[str, Any], flow_name: str) -> str:
    """Return the result of `measure` as a table and how to read it; ``flow_name`` says whose flow counts."""
    from zsvr_kernels.demo import report

    rows = [[name, *("-" if x is None else f"{x:.3f}" for x in values)] for name, values in found["rows"].items()]
    T, H, W = found["size"]
    return (
        f"Drift of features in a U-Net with random weights that sees the noisy clip ({T} frames of {W}x{H}):\n"
        f"variance of what attention adds, along trajectories of the flow ({flow_name}), over its total variance.\n"
        f"0: features move with the picture; 1: they do not. Mean of {SEEDS} networks.\n\n"
        + report.table(["attention", *found["grids"]], rows)
        + "\n\nTrajectory attention follows the same flow, except in the last two rows, which follow DIS flow of the\n"
        "noisy clip: uncorrected, and with links corrected by the layer's own features.\n"
    )
