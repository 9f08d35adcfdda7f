"""How far links lie from ground truth before and after correction, on two real pairs with known flow.

``python -m bench.link_correction [--data FOLDER] [--steps K]``

The ground-truth flow is made wrong by smooth noise of a given standard deviation (pixels of the canvas), links are
built from it on a token grid, and `correct_links` runs over K steps with its history committed after each, as while
sampling. Features are what the frames give without a network: RGB patches of 3x3 tokens at 4x4 area-averaged samples a
token, less their mean per colour (so the cosine is a normalised cross-correlation), ``C = 432``. Errors are mean
Euclidean distances to the true links over tokens that are not occluded, whose truth is known and ends inside the grid.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import zsvr_kernels as zk
from zsvr_kernels.options import CorrectionOptions
from zsvr_kernels.sampling import Grid, is_inside, nearest_site, sites

DATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
NOISE = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # pixels of the canvas
SAMPLES = 4  # of a token's side
RULES = {
    "default": CorrectionOptions(),
    "margin 0.05": CorrectionOptions(margin=0.05),
    "no history": CorrectionOptions(history=False),
}


@dataclass(frozen=True)
class Pair:
    """Two frames, the true flow from the first to the second, and where it is unknown or occluded."""

    name: str
    frames: Tensor  # fp32 [2, 3, Hc, Wc] in 0..1
    flow: Tensor  # fp32 [2, Hc, Wc], pixels
    hidden: Tensor  # bool [Hc, Wc]


def _picture(path: pathlib.Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255


def _mask(path: pathlib.Path) -> Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("L"))) > 127


def _flow(path: pathlib.Path) -> Tensor:
    raw = path.read_bytes()
    width, height = np.frombuffer(raw, "<i4", 2, 4)
    return torch.from_numpy(np.frombuffer(raw, "<f4", height * width * 2, 12).reshape(height, width, 2).copy()).permute(
        2, 0, 1
    )


def load(folder: pathlib.Path) -> list[Pair]:
    """Return the pairs that lie in the folder; none where it lacks them."""
    pairs = []
    for name, first, second, flow in (
        ("gt_rubberwhale", "frame10", "frame11", "flow10.flo"),
        ("gt_sintel_alley1_final", "frame_0002", "frame_0003", "frame_0002.flo"),
    ):
        source = folder / name
        if not (source / flow).is_file():
            continue
        truth = _flow(source / flow)
        hidden = (truth.abs() > 1e9).any(0)
        for mask in ("occlusion_0002.png", "invalid_0002.png"):
            if (source / mask).is_file():
                hidden |= _mask(source / mask)
        frames = torch.stack([_picture(source / "frames" / f"{n}.png") for n in (first, second)])
        pairs.append(Pair(name, frames, truth.masked_fill(hidden, 0.0), hidden))
    return pairs


def grid_of(pair: Pair, side: int) -> Grid:
    """Return the grid of about ``side * side`` tokens with the canvas's aspect."""
    stretch = math.sqrt(pair.flow.shape[2] / pair.flow.shape[1])
    return round(side / stretch), round(side * stretch)


def features(frames: Tensor, grid: Grid) -> Tensor:
    """Return normalised patches ``[1, T, P, 432]``."""
    size = (grid[0] * SAMPLES, grid[1] * SAMPLES)
    small = F.interpolate(frames, size=size, mode="area")
    padded = F.pad(small, (SAMPLES,) * 4, mode="replicate")
    patches = F.unfold(padded, 3 * SAMPLES, stride=SAMPLES).mT  # [T, P, 3 * 144]
    colours = patches.unflatten(-1, (3, -1))
    colours = colours - colours.mean(-1, keepdim=True)
    return colours.flatten(-2)[None].contiguous()


def smooth_noise(shape: tuple[int, int], std: float, generator: torch.Generator) -> Tensor:
    """Return a random displacement ``[2, Hc, Wc]`` that varies over an eighth of the canvas."""
    coarse = torch.randn(1, 2, 9, 9, generator=generator)
    field = F.interpolate(coarse, size=shape, mode="bicubic", align_corners=True)[0]
    return field * (std / field.std())


def _links(flow: Tensor, hidden: Tensor, grid: Grid) -> zk.Links:
    occluded = hidden[None, None]
    return zk.Links.from_flow(
        flow[None, None], -flow[None, None], grid=grid, occ_forward=occluded, occ_backward=occluded
    )


def corrected(links: zk.Links, tokens: Tensor, steps: int, options: CorrectionOptions) -> zk.Links:
    """Return the links of the last step; history is committed after every one."""
    history, latest = None, links
    for k in range(steps):
        latest, history = zk.correct_links(links, tokens, history, k=k, K=steps, options=options)
    return latest


def rows(pair: Pair, side: int, steps: int, seed: int = 0) -> list[list[str]]:
    """Return the table's rows of one pair on one grid."""
    grid = grid_of(pair, side)
    shape = (pair.flow.shape[1], pair.flow.shape[2])
    cell = torch.tensor((shape[1] / grid[1], shape[0] / grid[0]))
    truth = _links(pair.flow, pair.hidden, grid)
    counted = truth.valid_forward[0, 0] & is_inside(truth.forward[0, 0], grid)
    tokens = features(pair.frames, grid)

    def error(links: Tensor) -> str:
        away = (links - truth.forward[0, 0])[counted]
        return f"{away.norm(dim=-1).mean():.3f} / {(away * cell).norm(dim=-1).mean():.2f}"

    nearest = sites(grid)[nearest_site(truth.forward[0, 0], grid)]
    table = []
    for std in NOISE:
        generator = torch.Generator().manual_seed(seed)
        flow = pair.flow + (smooth_noise(shape, std, generator) if std else 0.0)
        links = _links(flow, pair.hidden, grid)
        row = [pair.name, f"{grid[0]}x{grid[1]}", f"{std:g}", error(links.forward[0, 0])]
        for options in RULES.values():
            after = corrected(links, tokens, steps, options).forward[0, 0]
            moved = (after != links.forward[0, 0]).any(-1)[counted].float().mean()
            row.append(f"{error(after)} ({moved:.0%})")
        table.append([*row, error(nearest)])
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.link_correction", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, default=DATA)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args(arguments)
    pairs = load(options.data)
    if not pairs:
        print(f"no pair with ground-truth flow in {options.data}: nothing was measured")
        return 0
    head = ["pair", "grid", "noise px", "before", *(f"after, {name}" for name in RULES), "truth at the nearest site"]
    print("Mean endpoint error in token pixels / canvas pixels, and in brackets the share of links that moved.\n")
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for pair in pairs:
        for side in (64, 32):
            for row in rows(pair, side, options.steps):
                print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
