"""Which temporal parts a restoration uses, with all their options: one frozen value that a run records and repeats."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zsvr.flow import EstimationOptions
from zsvr.noise import NoiseOptions
from zsvr_kernels import CorrectionOptions, SLROptions, validation
from zsvr_kernels import frames as tables

ESTIMATORS = ("dis", "raft_large", "zero", "given")
SOURCES = ("preview", "clean", "given")
NORMS = ("l2", "l1", "charbonnier")
TARGETS = ("x0", "x")


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


def _range(name: str, value: object) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be (start, end), got {value!r}")
    start, end = (_fraction(name, x) for x in value)
    if start > end:
        raise ValueError(f"{name} must rise, got {value!r}")
    return start, end


def _keep(options: object, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(options, name, value)


@dataclasses.dataclass(frozen=True)
class FlowOptions(EstimationOptions):
    """Where optical flow comes from, what is believed of it, and how it gets to a smaller grid.

    Attributes, beside those of `zsvr.flow.EstimationOptions`:
        estimator: ``"dis"``, ``"raft_large"`` (local weights), ``"zero"``, ``"given"``.
        source: frames it is estimated from: the ``"preview"`` of the degraded input, ``"clean"`` frames (studies), or
            ``"given"``.
        resize, occ_pool: see `zsvr_kernels.Links.from_flow`.
        refresh_every: estimate links' and guidance's flow again from the clean estimate at each n-th step of the second
            half of sampling; 0: never.
    """

    estimator: str = "dis"
    source: str = "preview"
    resize: str = "area"
    occ_pool: str = "max"
    refresh_every: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("flow.estimator", self.estimator, ESTIMATORS)
        _choice("flow.source", self.source, SOURCES)
        if (self.estimator == "given") != (self.source == "given"):
            raise ValueError(
                'flow.estimator and flow.source are both "given" or neither, '
                f"got {self.estimator!r} and {self.source!r}"
            )
        _choice("flow.resize", self.resize, ("area", "antialias", "nearest"))
        _choice("flow.occ_pool", self.occ_pool, ("max", "mean"))
        _keep(self, refresh_every=validation.check_int("flow.refresh_every", self.refresh_every, 0))
        if self.refresh_every and self.estimator == "given":
            raise ValueError("flow.refresh_every estimates flow again, which given flow cannot be: set it to 0")

    def link_options(self) -> dict[str, Any]:
        """Return the fields that `zsvr_kernels.SLROptions` has too."""
        names = ("check", "alpha", "beta", "threshold_warped", "motion_boundary", "resize", "occ_pool")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class GuidanceOptions:
    """How far frames are shifted towards their warped neighbours; see `zsvr.temporal.guidance`.

    Attributes:
        gain: of the pixel level, for 1000 sampling steps; fewer steps are longer. 0: off.
        neighbors: ``(-1, 1)``, ``(-1,)`` or ``(1,)``.
        norm: ``"l2"``, ``"l1"`` or ``"charbonnier"`` of what differs.
        detach_neighbor: only the frame itself is shifted, not the neighbour it is compared with.
        target: shift the clean estimate (``"x0"``) or, through the network, the sample (``"x"``).
        scale_by_variance: the shift is multiplied by the step's posterior variance.
        active: range of progress (start, end); end 1 includes all.
        x0_blend: share of sampling at whose beginning clean estimates are replaced by the warped previous one.
        clip: folder of a CLIP model for the semantic level, None: off.
        sem_gain: of the semantic level; 0: off.
        sem_every: the semantic level acts at each n-th step.
        sem_normalize: its gradient is scaled to unit root mean square and by the pairs' distance.
    """

    gain: float = 0.01
    neighbors: tuple[int, ...] = (-1, 1)
    norm: str = "l2"
    detach_neighbor: bool = False
    target: str = "x0"
    scale_by_variance: bool = False
    active: tuple[float, float] = (0.0, 1.0)
    x0_blend: float = 0.0
    clip: str | None = None
    sem_gain: float = 0.02
    sem_every: int = 5
    sem_normalize: bool = True

    def __post_init__(self) -> None:
        _choice("guidance.norm", self.norm, NORMS)
        _choice("guidance.target", self.target, TARGETS)
        for name in ("detach_neighbor", "scale_by_variance", "sem_normalize"):
            _flag(f"guidance.{name}", getattr(self, name))
        if not isinstance(self.neighbors, (tuple, list)) or not all(o in (-1, 1) for o in self.neighbors):
            raise ValueError(f"guidance.neighbors must be of -1 and 1, got {self.neighbors!r}")
        if self.clip is not None and not isinstance(self.clip, str):
            raise TypeError(f"guidance.clip must be the path of a folder or None, got {self.clip!r}")
        neighbors = tuple(sorted({validation.check_int("guidance.neighbors", o) for o in self.neighbors}))
        if not neighbors:
            raise ValueError("guidance.neighbors is empty: name one, or set guidance.gain = 0")
        _keep(
            self,
            neighbors=neighbors,
            gain=validation.check_bound("guidance.gain", self.gain),
            active=_range("guidance.active", self.active),
            x0_blend=_fraction("guidance.x0_blend", self.x0_blend),
            sem_gain=validation.check_bound("guidance.sem_gain", self.sem_gain),
            sem_every=validation.check_int("guidance.sem_every", self.sem_every, 1),
        )

    @property
    def is_pixel_on(self) -> bool:
        """Whether the pixel level acts at all."""
        return self.gain > 0

    @property
    def is_semantic_on(self) -> bool:
        """Whether the semantic level acts at all."""
        return self.clip is not None and self.sem_gain > 0

    def is_active(self, progress: float) -> bool:
        """Return whether ``progress`` k/K lies within ``active``."""
        start, end = self.active
        return start <= progress and (progress < end or end >= 1)


_ATTENTION = (
    *("frames", "offsets", "include_self", "border", "dedupe", "combine", "blend", "layers", "active", "stages"),
    *("min_tokens", "max_tokens", "conditional", "prefix", "backend"),
)
_TRAJECTORY = ("window", "rounding", "link_rule")
_CORRECTION = tuple(f.name for f in dataclasses.fields(CorrectionOptions))


@dataclasses.dataclass(frozen=True)
class Temporal:
    """The temporal parts of a restoration, each of which can be off.

    Attributes:
        slr: short-long-range attention; None: every frame attends to itself.
        flow: optical flow and its check, for all parts. What `SLROptions` says of the check must not contradict it.
        guidance: temporal consistency guidance; None: off.
        noise: sharing of noise.
        stop_step: stop at the first step of the schedule that is at most this training step, 0..999; 0: run all.

    Source: the parts are those of Cao et al. 2024, "Zero-Shot Video Restoration and Enhancement Using Pre-Trained
    Image Diffusion Model"; their formulas are this project's own.

    Example:
        >>> temporal = Temporal.preset("paper", {"noise.sharing": "warp_blend", "guidance.gain": 0.02})
        >>> Temporal.from_dict(temporal.to_dict()) == temporal
        True
    """

    slr: SLROptions | None = dataclasses.field(default_factory=SLROptions)
    flow: FlowOptions = dataclasses.field(default_factory=FlowOptions)
    guidance: GuidanceOptions | None = dataclasses.field(default_factory=GuidanceOptions)
    noise: NoiseOptions = dataclasses.field(default_factory=NoiseOptions)
    stop_step: int = 0

    def __post_init__(self) -> None:
        kinds = {"slr": SLROptions, "flow": FlowOptions, "guidance": GuidanceOptions, "noise": NoiseOptions}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and not (value is None and name in ("slr", "guidance")):
                raise TypeError(f"{name} must be {kind.__name__}, got {type(value).__name__}")
        if validation.check_int("stop_step", self.stop_step, 0) > 999:
            raise ValueError(f"stop_step must be within 0..999, got {self.stop_step}")
        if self.slr is None:
            return
        default, ours = SLROptions(), self.flow.link_options()
        for name, value in ours.items():
            given = getattr(self.slr, name)
            if given not in (getattr(default, name), value):
                raise ValueError(
                    f"slr says {name} = {given!r}, flow says {value!r}: set it in flow, which holds for all parts"
                )
        _keep(self, slr=self.slr.with_(**ours))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Temporal):
            return NotImplemented
        mine, theirs = ((x.flow, x.guidance, x.noise, x.stop_step) for x in (self, other))
        if mine != theirs or self.slr is other.slr:
            return mine == theirs
        try:
            return self.to_dict() == other.to_dict()
        except ValueError:  # frames or layers that are not recorded
            return False

    def __hash__(self) -> int:
        return hash((self.flow, self.guidance, self.noise, self.stop_step))

    @property
    def needs_flow(self) -> bool:
        """Whether any part that is on asks for optical flow."""
        walks = self.slr is not None and self.slr.combine in ("serial", "parallel", "joint", "trajectory")
        guides = self.guidance is not None and (self.guidance.is_pixel_on or self.guidance.x0_blend > 0)
        return walks or guides or self.noise.sharing in ("warp_blend", "static_mask")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as dotted names and values that JSON can hold; a part that is off is ``name: None``.

        Raises:
            ValueError: ``slr.frames`` or ``slr.layers`` is a function or a tensor.
        """
        result: dict[str, Any] = {}
        if self.slr is None:
            result["attention"] = None
        else:
            slr = self.slr
            result |= {f"attention.{name}": _plain(f"attention.{name}", getattr(slr, name)) for name in _ATTENTION}
            result |= {f"traj.{name}": getattr(slr, name) for name in _TRAJECTORY}
            result |= {f"correct.{name}": getattr(slr.correct, name) for name in _CORRECTION}
        result |= {f"flow.{name}": value for name, value in dataclasses.asdict(self.flow).items()}
        if self.guidance is None:
            result["guidance"] = None
        else:
            result |= {f"guidance.{n}": _plain(n, value) for n, value in dataclasses.asdict(self.guidance).items()}
        result |= {f"noise.{name}": value for name, value in dataclasses.asdict(self.noise).items()}
        return result | {"sampler.stop_step": self.stop_step}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Temporal:
        """Return the settings that `to_dict` took apart; names that are not given have their defaults.

        Raises:
            ValueError: unknown names, all listed, or values out of range. TypeError: values of a wrong type.
        """
        return cls().with_(values)

    @classmethod
    def preset(cls, name: str, changes: Mapping[str, Any] | None = None) -> Temporal:
        """Return a preset by name, see `presets`, with changes as in `with_`."""
        known = presets()
        if name not in known:
            raise ValueError(f"preset must be one of {', '.join(known)}, got {name!r}")
        return known[name].with_(changes or {})

    def with_(self, changes: Mapping[str, Any]) -> Temporal:
        """Return a copy with changes by dotted name (``"attention.combine"``, ``"guidance.gain"``, ...).

        ``"attention": None`` and ``"guidance": None`` turn a part off; any option of it turns it on again, and
        ``"attention": True`` does so with its defaults.
        """
        groups: dict[str, dict[str, Any]] = {}
        unknown = []
        for name, value in changes.items():
            group, _, field = name.partition(".")
            if field in option_names().get(group, ()):
                groups.setdefault(group, {})[field] = value
            elif not (name in ("attention", "guidance") and (value is None or isinstance(value, bool))):
                unknown.append(name if name not in ("attention", "guidance") else f"{name} = {value!r}")
        if unknown:
            raise ValueError(f"unknown options: {', '.join(sorted(unknown))}; known are {', '.join(_all_names())}")
        return Temporal(
            slr=self._changed_slr(changes, groups),
            flow=dataclasses.replace(self.flow, **groups.get("flow", {})),
            guidance=self._changed_guidance(changes, groups.get("guidance", {})),
            noise=dataclasses.replace(self.noise, **groups.get("noise", {})),
            stop_step=groups.get("sampler", {}).get("stop_step", self.stop_step),
        )

    def _changed_slr(self, changes: Mapping[str, Any], groups: dict[str, dict[str, Any]]) -> SLROptions | None:
        inner = {name: value for group in ("attention", "traj") for name, value in groups.get(group, {}).items()}
        correct = {f"correct_{name}": value for name, value in groups.get("correct", {}).items()}
        if "attention" in changes and not changes["attention"]:
            if inner or correct:
                raise ValueError(f"attention is off, so it has no options: got {sorted([*inner, *correct])}")
            return None
        if self.slr is None and not (inner or correct or changes.get("attention")):
            return None
        if "frames" in inner:
            inner["frames"] = _items(inner["frames"])
        defaults = {name: getattr(SLROptions(), name) for name in self.flow.link_options()}
        return (SLROptions() if self.slr is None else self.slr).with_(**defaults, **inner, **correct)

    def _changed_guidance(self, changes: Mapping[str, Any], inner: dict[str, Any]) -> GuidanceOptions | None:
        if "guidance" in changes and not changes["guidance"]:
            if inner:
                raise ValueError(f"guidance is off, so it has no options: got {sorted(inner)}")
            return None
        if self.guidance is None and not (inner or changes.get("guidance")):
            return None
        return dataclasses.replace(self.guidance or GuidanceOptions(), **inner)


def option_names() -> dict[str, tuple[str, ...]]:
    """Return the names of all options by group, as `Temporal.with_` takes them."""

    def names(kind: Any) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(kind))

    return {
        "attention": _ATTENTION,
        "traj": _TRAJECTORY,
        "correct": _CORRECTION,
        "flow": names(FlowOptions),
        "guidance": names(GuidanceOptions),
        "noise": names(NoiseOptions),
        "sampler": ("stop_step",),
    }


def _all_names() -> list[str]:
    return [f"{group}.{name}" for group, names in option_names().items() for name in names]


def _plain(name: str, value: Any) -> Any:
    """Return an option as JSON holds it."""
    if callable(value) or isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, which cannot be recorded: use a name, items or patterns")
    if isinstance(value, tuple):
        return [[type(x).__name__.lower(), *x] if isinstance(x, tuple) else x for x in value]
    return value


def _items(value: Any) -> Any:
    """Return the items of a frame table from their recorded form."""
    kinds = {"relative": tables.relative, "absolute": tables.absolute}
    if not isinstance(value, (list, tuple)):
        return value
    result = []
    for item in value:
        is_recorded = isinstance(item, list) and len(item) == 2 and isinstance(item[1], numbers.Integral)
        result.append(kinds[item[0]](item[1]) if is_recorded and item[0] in kinds else item)
    return result


def presets() -> dict[str, Temporal]:
    """Return the presets by name.

    * ``none`` (``host_only``): frames are independent.
    * ``batch_consistent`` (``noise_only``): shared noise alone, as in the batch-consistent sampling of video inverse
      problem solvers.
    * ``paper`` (``zvrd``): every part with its defaults.
    * ``zvrd_v1``: the first version of the paper: attention to the previous frame, guidance towards it.
    * ``best``: the paper's parts, with noise that follows the flow, so that texture does not stick to the screen, and
      a norm that does not pull at occlusions the check has missed.
    """
    independent = Temporal(slr=None, guidance=None, noise=NoiseOptions(sharing="none"))
    shared = Temporal(slr=None, guidance=None)
    whole = Temporal()
    first = Temporal(
        slr=SLROptions(frames="previous", combine="cross"),
        guidance=GuidanceOptions(neighbors=(-1,)),
    )
    best = Temporal(guidance=GuidanceOptions(norm="charbonnier"), noise=NoiseOptions(sharing="warp_blend"))
    return {
        "none": independent,
        "host_only": independent,
        "batch_consistent": shared,
        "noise_only": shared,
        "paper": whole,
        "zvrd": whole,
        "zvrd_v1": first,
        "best": best,
    }
