"""The shapes that are measured, by the names of the networks they come from, and which of them a run covers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Level:
    """An attention resolution of a denoising network."""

    grid: tuple[int, int]
    H: int
    D: int
    radius: int = 2  # of correspondence search's window


# ADM at 256x256 (guided diffusion), Stable Diffusion 1.x at 512x512. "adm-8-half" has half of ADM's heads,
# "narrow-32" tokens of 64 channels, and "-r4" the wider search window.
LEVELS = {
    "adm-32": Level((32, 32), 8, 64),
    "adm-16": Level((16, 16), 16, 64),
    "adm-8": Level((8, 8), 16, 64),
    "adm-8-half": Level((8, 8), 8, 64),
    "sd-64": Level((64, 64), 8, 40),
    "sd-32": Level((32, 32), 8, 80),
    "sd-16": Level((16, 16), 8, 160),
    "narrow-32": Level((32, 32), 1, 64),
    "narrow-32-r4": Level((32, 32), 1, 64, radius=4),
    "tiny": Level((8, 8), 2, 16),
}
SEARCHES = ("correspondence_search", "link_score")  # on T - 1 pairs of adjacent frames
WINDOW = 2  # frames on either side that trajectories reach, so L = 5


@dataclass(frozen=True)
class Case:
    """One measurement: an operator at a shape, in a dtype and a direction, with a number of threads.

    Directions: ``"fwd"``; ``"bwd"``: the backward alone, on a retained graph; ``"step"``: forward and backward.
    Variants, of the whole layer: ``"neighbors"`` (R = 2), ``"previous"`` (R = 1), ``"corrected"``: neighbors with
    links corrected, at a step that admits it. Of trajectories: ``"full"`` (L = T) instead of a window.
    On a GPU there are no threads to count: 0.
    """

    op: str
    level: str
    T: int
    dtype: str
    direction: str
    threads: int
    variant: str = ""
    device: str = "cpu"
    backend: str = "auto"  # of ours

    @property
    def shape(self) -> Level:
        return LEVELS[self.level]

    @property
    def P(self) -> int:
        return self.shape.grid[0] * self.shape.grid[1]

    @property
    def C(self) -> int:
        return self.shape.H * self.shape.D

    @property
    def window(self) -> int | None:
        """Frames on either side that trajectories reach; None: all."""
        return None if self.variant == "full" else WINDOW

    @property
    def name(self) -> str:
        parts = [self.level, f"T{self.T}", self.dtype, self.direction, self.variant]
        return "-".join(part for part in (*parts, f"{self.threads}t" if self.threads else "") if part)

    def describe(self) -> dict[str, object]:
        """Return the fields that identify the case in a result file."""
        fields = dataclasses.asdict(self)
        fields.update(name=self.name, grid=list(self.shape.grid), H=self.shape.H, D=self.shape.D)
        if self.op in SEARCHES:
            fields["radius"] = self.shape.radius
        elif self.op != "cross_frame_attention":
            fields["L"] = self.T if self.window is None else 2 * self.window + 1
        if self.op == "slr_attention":
            fields["R"] = 1 if self.variant == "previous" else 2
        return fields


# (level, T, dtype, direction, threads[, variant]). The first lines are the shapes that the targets name.
_CROSS_FRAME = [
    ("adm-32", 16, "fp32", "fwd", (1, 2)),
    ("adm-32", 16, "bf16", "fwd", (1, 2)),
    ("sd-64", 8, "fp32", "fwd", (2,)),
    ("sd-64", 8, "bf16", "fwd", (2,)),
    ("sd-16", 16, "fp32", "fwd", (1, 2)),
    ("adm-8-half", 16, "fp32", "fwd", (1, 2)),
    ("adm-32", 16, "fp32", "bwd", (1, 2)),
    ("adm-32", 16, "bf16", "bwd", (2,)),
    ("adm-16", 16, "fp32", "fwd", (1, 2)),
    ("adm-16", 16, "bf16", "fwd", (2,)),
    ("adm-16", 16, "fp32", "bwd", (2,)),
    ("adm-16", 32, "fp32", "fwd", (2,)),
    ("adm-8", 32, "fp32", "fwd", (2,)),
    ("sd-32", 8, "fp32", "fwd", (2,)),
]
_TRAJECTORY = [
    ("adm-32", 16, "fp32", "fwd", (1, 2)),
    ("adm-32", 16, "bf16", "fwd", (1, 2)),
    ("adm-32", 16, "fp32", "step", (1, 2)),
    ("adm-32", 16, "fp32", "bwd", (1, 2)),
    ("adm-32", 16, "bf16", "step", (2,)),
    ("sd-64", 8, "fp32", "fwd", (1, 2)),
    ("sd-64", 8, "bf16", "fwd", (2,)),
    ("adm-8-half", 16, "fp32", "fwd", (1, 2)),
    ("adm-8", 32, "fp32", "fwd", (2,)),
    ("adm-8", 16, "fp32", "bwd", (2,)),
    ("adm-16", 8, "fp32", "fwd", (2,)),
    ("adm-16", 32, "fp32", "fwd", (2,)),
    ("sd-16", 16, "fp32", "fwd", (2,)),
]
_CHAIN = [
    ("adm-32", 16, "fp32", "fwd", (1, 2)),
    ("adm-16", 32, "fp32", "fwd", (2,)),
    ("sd-64", 8, "fp32", "fwd", (2,)),
]
_SLR = [
    *[
        (level, T, "fp32", direction, (2,), "neighbors")
        for level, T in [("adm-32", 16), ("sd-64", 8), ("sd-32", 16), ("sd-32", 8), ("adm-32", 8), ("adm-16", 16),
                         ("adm-16", 8), ("adm-8", 16), ("adm-8", 8)]
        for direction in ("fwd", "step")
    ],
    *[
        (level, T, "fp32", direction, (2,), "previous")
        for level, T in [("adm-32", 16), ("sd-64", 8), ("sd-32", 16), ("adm-16", 16), ("adm-8", 16)]
        for direction in ("fwd", "step")
    ],
    ("adm-32", 16, "bf16", "fwd", (2,), "neighbors"),
    ("adm-32", 16, "fp32", "fwd", (2,), "corrected"),
]  # fmt: skip
_SEARCH = [
    ("narrow-32", 16, "fp32", "fwd", (1, 2)),
    ("narrow-32-r4", 16, "fp32", "fwd", (1, 2)),
    ("narrow-32", 16, "bf16", "fwd", (2,)),
    ("adm-32", 16, "fp32", "fwd", (1, 2)),
    ("adm-32", 16, "bf16", "fwd", (2,)),
    ("adm-16", 16, "fp32", "fwd", (1, 2)),
    ("sd-64", 8, "fp32", "fwd", (2,)),
]
_SCORE = [
    ("narrow-32", 16, "fp32", "fwd", (1, 2)),
    ("adm-32", 16, "fp32", "fwd", (1, 2)),
]
FULL = {
    "cross_frame_attention": _CROSS_FRAME,
    "trajectory_attention": _TRAJECTORY,
    "chain_links": _CHAIN,
    "slr_attention": _SLR,
    "correspondence_search": _SEARCH,
    "link_score": _SCORE,
}
QUICK = {
    "cross_frame_attention": [
        ("adm-16", 8, "fp32", "fwd", (2,)),
        ("adm-16", 8, "bf16", "fwd", (2,)),
        ("adm-8-half", 16, "fp32", "bwd", (2,)),
    ],
    "trajectory_attention": [
        ("adm-16", 8, "fp32", "fwd", (2,)),
        ("adm-8-half", 16, "fp32", "bwd", (2,)),
    ],
    "chain_links": [("adm-16", 8, "fp32", "fwd", (2,))],
    "slr_attention": [
        ("adm-16", 8, "fp32", "fwd", (2,), "neighbors"),
        ("adm-16", 8, "fp32", "step", (2,), "previous"),
    ],
    "correspondence_search": [("narrow-32", 8, "fp32", "fwd", (2,))],
    "link_score": [("narrow-32", 8, "fp32", "fwd", (2,))],
}
SMOKE = {op: [("tiny", 3, "fp32", "fwd", (1,))] for op in FULL} | {
    "slr_attention": [("tiny", 3, "fp32", d, (1,), v) for d, v in [("fwd", "neighbors"), ("step", "previous"),
                                                                  ("fwd", "corrected")]]
}  # fmt: skip
SUITES = {"full": FULL, "quick": QUICK, "smoke": SMOKE}


def cases(suite: str, op: str, threads: int, select: str = "") -> list[Case]:
    """Return the cases of one operator for a number of threads whose ``op-name`` contains ``select``.

    Several texts, separated by commas, select what any of them selects.
    """
    found = [
        Case(op, level, T, dtype, direction, threads, *variant)
        for level, T, dtype, direction, counts, *variant in SUITES[suite][op]
        if threads in counts
    ]
    return [case for case in found if any(text in f"{op}-{case.name}" for text in select.split(","))]


def thread_counts(suite: str) -> list[int]:
    """Return the numbers of threads that a suite asks for, ascending."""
    return sorted({n for lines in SUITES[suite].values() for line in lines for n in line[4]})
