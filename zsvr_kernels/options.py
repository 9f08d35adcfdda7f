"""Options of SLR attention: which frames, how the two ranges combine, where it acts, how links are corrected."""

from __future__ import annotations

import bisect
import fnmatch
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import backends, validation
from zsvr_kernels import frames as tables
from zsvr_kernels.links import CHECKS, LINK_RULES, ROUNDINGS
from zsvr_kernels.sampling import Grid

COMBINES = ("serial", "parallel", "joint", "cross", "trajectory", "spatial")
PRESETS = ("neighbors", "previous", "first_and_previous", "all_frames")
STAGES = ("down", "mid", "up")


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _fraction(name: str, value: object) -> float:
    number = validation.check_bound(name, value)
    if number > 1:
        raise ValueError(f"{name} must be within 0..1, got {value!r}")
    return number


def _keep(options: object, **values: object) -> None:
    """Set fields of a frozen instance while it is made: numbers of any kind become Python's, sequences tuples."""
    for name, value in values.items():
        object.__setattr__(options, name, value)


@dataclass(frozen=True)
class CorrectionOptions:
    """How links are corrected while sampling goes on; see `correct_links`.

    Attributes:
        enabled: False: links stay those of the optical flow, and trajectories are chained once per token grid.
        similarity, history: which candidates compete with the flow's link.
        radius: of the search window, ``(2r+1)^2`` sites.
        feature: what is compared: ``"tokens"``, the layer's normalised input, or ``"keys"``.
        similarity_start: share of sampling done (k/K) from which on candidates are admitted.
        search_every: search at each n-th admitted step.
        margin: gain in cosine that a searched link must bring.
        history_score: ``"reevaluate"`` scores the remembered link on today's features, ``"stored"`` does not.
        search_center: the window follows the best link so far (``"history"``) or stays at the ``"flow"``'s target.
        revive_threshold: cosine above which an occluded link is revived; None: never.
        history_scope: ``"layer"``: every layer corrects for itself; ``"grid"``: the first layer of each token grid
            corrects once per step, and all layers of that grid use its links.
    """

    enabled: bool = True
    similarity: bool = True
    history: bool = True
    radius: int = 2
    feature: str = "tokens"
    similarity_start: float = 0.5
    search_every: int = 1
    margin: float = 0.0
    history_score: str = "reevaluate"
    search_center: str = "history"
    revive_threshold: float | None = None
    history_scope: str = "layer"

    def __post_init__(self) -> None:
        for name in ("enabled", "similarity", "history"):
            _flag(f"correct.{name}", getattr(self, name))
        _choice("correct.feature", self.feature, ("tokens", "keys"))
        _choice("correct.history_score", self.history_score, ("reevaluate", "stored"))
        _choice("correct.search_center", self.search_center, ("history", "flow"))
        _choice("correct.history_scope", self.history_scope, ("layer", "grid"))
        threshold = self.revive_threshold
        if threshold is not None:
            if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real):
                raise TypeError(f"correct.revive_threshold must be a number or None, got {threshold!r}")
            if not -1 < threshold < 1:
                raise ValueError(f"correct.revive_threshold must be None or within -1..1, got {threshold!r}")
        _keep(
            self,
            radius=validation.check_radius(self.radius),
            similarity_start=_fraction("correct.similarity_start", self.similarity_start),
            search_every=validation.check_int("correct.search_every", self.search_every, 1),
            margin=validation.check_bound("correct.margin", self.margin),
            revive_threshold=None if threshold is None else float(threshold),
        )

    def first_admitted(self, K: int) -> int:
        """Return the first loop index k of ``K`` whose progress k/K admits candidates; K if none does."""
        return bisect.bisect_left(range(K), self.similarity_start, key=lambda k: k / K)

    def is_admitted(self, k: int, K: int) -> bool:
        """Return whether links are corrected at step k of K."""
        return self.enabled and (self.similarity or self.history) and k / K >= self.similarity_start


Layers = str | Sequence[str] | Callable[[str, Grid], bool]
Item = tables.Relative | tables.Absolute
Frames = str | Tensor | Sequence[Item] | Callable[[int], Tensor]


@dataclass(frozen=True, eq=False)
class SLROptions:
    """Options of short-long-range attention. Everything has the default of the published method.

    Attributes:
        frames: frame table of the short range: ``"neighbors"``, ``"previous"``, ``"first_and_previous"``,
            ``"all_frames"``, a list of `relative` and `absolute` items, an int32 ``[T, R]`` tensor, or a function of T
            that returns one. In a window of a longer clip names and items mean absolute frames; tensors and functions
            count within the window.
        offsets: of ``"neighbors"``.
        include_self, border, dedupe: of every frame table given by name or items; see `index_list`.
        combine: ``"serial"``: trajectory attention whose values are the cross-frame output; ``"parallel"``:
            ``blend`` times the cross-frame output plus ``1 - blend`` times the trajectory output; ``"joint"``: one
            softmax over both sets of keys; ``"cross"``, ``"trajectory"``, ``"spatial"``: one of them alone.
        blend: share of the short range in ``"parallel"``, 0..1.
        layers: which self-attentions are replaced: ``"all"``, patterns of names as in ``fnmatch`` (``"up_blocks.*"``),
            or a predicate of (name, grid).
        stages: of ``"down"``, ``"mid"``, ``"up"``: parts of a U-Net, told by the layer's name; a layer whose name
            tells nothing belongs to all.
        min_tokens, max_tokens: token grids of P sites are left alone unless ``min_tokens <= P <= max_tokens``.
        active: range of progress k/K, ``(start, end)``, outside which layers run as they were; end 1 includes all.
        check, alpha, beta, threshold_warped, motion_boundary, resize, occ_pool: see `Links.from_flow`.
        window, rounding, link_rule: see `chain_links`. Trajectories take ``9 T L P`` bytes per clip and grid.
        correct: how links are corrected.
        conditional: the branch of a classifier-free-guidance batch whose features are compared; branches are
            outermost in the batch (``[G*B*T, ...]``). -1: the last, where diffusers puts the conditional one.
        prefix: tokens before the image tokens of a sequence (class and register tokens of a vision transformer).
            They attend, and are attended to, across frames, but have no trajectory.
        backend: of the attention operators; see `explain`.
    """

    frames: Frames = "neighbors"
    offsets: Sequence[int] = (-1, 1)
    include_self: bool = False
    border: str = "replicate"
    dedupe: bool = False
    combine: str = "serial"
    blend: float = 0.5
    layers: Layers = "all"
    stages: Sequence[str] = STAGES
    min_tokens: int = 1
    max_tokens: int | None = None
    active: tuple[float, float] = (0.0, 1.0)
    check: str = "U"
    alpha: float | None = None
    beta: float | None = None
    threshold_warped: bool = False
    motion_boundary: bool = False
    resize: str = "area"
    occ_pool: str = "max"
    window: int | None = None
    rounding: str = "bilinear"
    link_rule: str = "nearest"
    correct: CorrectionOptions = field(default_factory=CorrectionOptions)
    conditional: int = -1
    prefix: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        frames = self.frames
        if isinstance(frames, str):
            _choice("frames", frames, PRESETS)
        elif isinstance(frames, (tuple, list)):
            if not frames or not all(isinstance(item, (tables.Relative, tables.Absolute)) for item in frames):
                raise TypeError(f"frames must list what relative() and absolute() return, got {frames!r}")
            frames = tuple(frames)
        elif not isinstance(frames, Tensor) and not callable(frames):
            raise TypeError(f"frames must be a preset's name, items, a tensor or a function of T, got {frames!r}")
        for name in ("include_self", "dedupe", "threshold_warped", "motion_boundary"):
            _flag(name, getattr(self, name))
        _choice("border", self.border, tables.BORDERS)
        _choice("combine", self.combine, COMBINES)
        _choice("check", self.check, tuple(CHECKS))
        _choice("resize", self.resize, ("area", "antialias", "nearest"))
        _choice("occ_pool", self.occ_pool, ("max", "mean"))
        _choice("rounding", self.rounding, ROUNDINGS)
        _choice("link_rule", self.link_rule, LINK_RULES)
        _choice("backend", self.backend, backends.BACKENDS)
        if isinstance(self.offsets, str):
            raise TypeError(f"offsets must be a list of ints, got {self.offsets!r}")
        offsets = tuple(validation.check_int("offsets", o) for o in self.offsets)
        if isinstance(frames, str) and frames == "neighbors" and not offsets and not self.include_self:
            raise ValueError("offsets are empty: a frame table needs at least one frame")
        layers = self.layers
        if isinstance(layers, str):
            if layers != "all":
                raise ValueError(f'layers must be "all", a list of patterns or a predicate, got {layers!r}')
        elif not callable(layers):
            layers = tuple(layers)
            if not all(isinstance(pattern, str) for pattern in layers):
                raise TypeError(f"patterns of layers must be strings, got {layers!r}")
        if isinstance(self.stages, str):
            raise TypeError(f"stages must be a list of {', '.join(STAGES)}, got {self.stages!r}")
        stages = tuple(self.stages)
        for stage in stages:
            _choice("stages", stage, STAGES)
        if not isinstance(self.active, (tuple, list)) or len(self.active) != 2:
            raise TypeError(f"active must be (start, end), got {self.active!r}")
        start, end = (_fraction("active", x) for x in self.active)
        if start > end:
            raise ValueError(f"active must rise, got {self.active!r}")
        if not isinstance(self.correct, CorrectionOptions):
            raise TypeError(f"correct must be zsvr_kernels.CorrectionOptions, got {type(self.correct).__name__}")
        least = validation.check_int("min_tokens", self.min_tokens, 1)
        _keep(
            self,
            frames=frames,
            offsets=offsets,
            layers=layers,
            stages=stages,
            active=(start, end),
            blend=_fraction("blend", self.blend),
            min_tokens=least,
            max_tokens=None if self.max_tokens is None else validation.check_int("max_tokens", self.max_tokens, least),
            alpha=None if self.alpha is None else validation.check_bound("alpha", self.alpha),
            beta=None if self.beta is None else validation.check_bound("beta", self.beta),
            window=validation.check_window(self.window),
            conditional=validation.check_int("conditional", self.conditional),
            prefix=validation.check_int("prefix", self.prefix, 0),
        )

    def table(self, T: int, ids: Sequence[int] | None = None) -> Tensor:
        """Return the frame table ``int32 [T, R]`` of a clip of T frames with absolute numbers ``ids``."""
        if isinstance(self.frames, Tensor):
            result = self.frames
        elif callable(self.frames):
            result = self.frames(T)
        else:
            return tables.index_list(
                T,
                self._items(T, ids),
                include_self=self.include_self,
                border=self.border,
                dedupe=self.dedupe,
                ids=ids,
            )
        validation.check_tensor("frames", result, 2, "[T, R]")
        validation.check_dtype("frames", result, torch.int32)
        if result.shape[0] != T or result.shape[1] < 1:
            raise ValueError(f"frames must be [T, R] with T = {T} rows and R >= 1, got {tuple(result.shape)}")
        validation.check_frame_values(result, T)
        return result

    def _items(self, T: int, ids: Sequence[int] | None) -> Sequence[Item]:
        if not isinstance(self.frames, str):
            assert isinstance(self.frames, tuple)
            return self.frames
        if self.frames == "neighbors":
            return [tables.relative(o) for o in self.offsets]
        if self.frames == "previous":
            return [tables.relative(-1)]
        if self.frames == "first_and_previous":
            return [tables.absolute(0), tables.relative(-1)]
        return [tables.absolute(f) for f in (range(T) if ids is None else ids)]

    def takes(self, name: str) -> str | None:
        """Return why the layer of that name is left alone, or None if these options take it."""
        stage = stage_of(name)
        if stage is not None and stage not in self.stages:
            return f"it is in the {stage} part, and stages = {tuple(self.stages)}"
        if isinstance(self.layers, str) or callable(self.layers):
            return None
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.layers):
            return None
        return f"its name matches none of {list(self.layers)}"

    def takes_grid(self, name: str, grid: Grid) -> str | None:
        """Return why a layer is left alone on a token grid, or None."""
        P = grid[0] * grid[1]
        if self.min_tokens > P:
            return f"{P} tokens are fewer than min_tokens = {self.min_tokens}"
        if self.max_tokens is not None and self.max_tokens < P:
            return f"{P} tokens are more than max_tokens = {self.max_tokens}"
        if callable(self.layers) and not self.layers(name, grid):
            return "the predicate layers(name, grid) says no"
        return None

    def is_active(self, progress: float) -> bool:
        """Return whether ``progress`` k/K lies within ``active``."""
        start, end = self.active
        return start <= progress and (progress < end or end >= 1)

    def link_options(self) -> dict[str, Any]:
        """Return the keywords for `Links.from_flow`."""
        names = ("check", "alpha", "beta", "threshold_warped", "motion_boundary", "resize", "occ_pool", "rounding")
        return {name: getattr(self, name) for name in names}

    def chain_options(self) -> dict[str, Any]:
        """Return the keywords for `chain_links`."""
        return {name: getattr(self, name) for name in ("window", "rounding", "link_rule")}

    def with_(self, **changes: Any) -> SLROptions:
        """Return a copy with changes; names of `CorrectionOptions` go there with the prefix ``correct_``."""
        own = {f.name for f in fields(self)}
        inner = {n.removeprefix("correct_"): v for n, v in changes.items() if n not in own and n.startswith("correct_")}
        outer = {n: v for n, v in changes.items() if n in own or not n.startswith("correct_")}
        if inner:
            outer["correct"] = replace(outer.get("correct", self.correct), **inner)
        return replace(self, **outer)


def stage_of(name: str) -> str | None:
    """Return the part of a U-Net a layer's name tells: ``"down"``, ``"mid"``, ``"up"``, or None."""
    for part in name.lower().split("."):
        if part.startswith(("down", "input_block", "encoder")):
            return "down"
        if part.startswith(("mid", "bottleneck")):
            return "mid"
        if part.startswith(("up", "output_block", "decoder")):
            return "up"
    return None
