"""The steps of a run, what matters most first, and how long each may take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.shapes import Case

LEVELS = ("adm-32", "sd-64", "adm-16", "sd-32", "sd-16", "adm-8")
TESTS = ("tests/gpu", "tests/triton")
DRY_TESTS = ["tests/gpu/test_device.py"]  # which skips without a GPU


@dataclass(frozen=True)
class Step:
    """Something that is done once and recorded.

    Attributes:
        name: unique; what its record is filed under.
        kind: ``"facts"``, ``"ceilings"``, ``"case"``, ``"windows"``, ``"gather"`` or ``"atomics"``.
        seconds: it does not begin with less time left than this.
        limit: after so many seconds it counts as failed, and its process is ended.
        case: of kind "case".
        group: of its contestants; see `bench.gpu.race`.
        arguments: of the other kinds.
    """

    name: str
    kind: str
    seconds: float = 10.0
    limit: float = 90.0
    case: Case | None = None
    group: str = ""
    arguments: tuple[str | int, ...] = ()


def _case(group: str, op: str, level: str, T: int, dtype: str, direction: str, variant: str = "") -> Step:
    case = Case(op, level, T, dtype, direction, 0, variant, "cuda", "triton")
    slow = group == "compiled"
    return Step(f"{group} {op} {case.name}", "case", 30.0 if slow else 10.0, 180.0 if slow else 120.0, case, group)


def _cases() -> list[list[Step]]:
    """Return the cases in blocks of falling importance."""
    cross, trajectory = "cross_frame_attention", "trajectory_attention"
    first = [
        _case("core", op, level, 16, "bf16", direction)
        for level in LEVELS for op in (cross, trajectory) for direction in ("fwd", "bwd")
    ]  # fmt: skip
    support = [
        _case("core", "chain_links", "adm-32", 16, "fp32", "fwd"),
        _case("core", "chain_links", "sd-64", 16, "fp32", "fwd", "full"),
        _case("core", "correspondence_search", "adm-32", 16, "bf16", "fwd"),
        _case("core", "correspondence_search", "sd-64", 16, "bf16", "fwd"),
        _case("core", "correspondence_search", "narrow-32-r4", 16, "fp32", "fwd"),
        _case("core", "link_score", "adm-32", 16, "bf16", "fwd"),
        *[
            _case("core", "slr_attention", level, 16, "bf16", direction, "neighbors")
            for level in LEVELS
            for direction in ("fwd", "step")
            if (level, direction) != ("sd-64", "step")  # its oracle takes more than a GPU's memory
        ],
        _case("core", "slr_attention", "adm-32", 16, "bf16", "fwd", "corrected"),
    ]
    long = [
        *[_case("core", cross, level, 64, "bf16", "fwd") for level in ("adm-32", "adm-16", "adm-8", "sd-16", "sd-64")],
        _case("core", cross, "adm-32", 64, "bf16", "bwd"),
        _case("core", trajectory, "adm-32", 16, "bf16", "fwd", "full"),
        _case("core", trajectory, "adm-32", 16, "bf16", "bwd", "full"),
        _case("core", trajectory, "sd-64", 16, "bf16", "fwd", "full"),
        _case("core", trajectory, "adm-16", 64, "bf16", "fwd", "full"),
        _case("core", trajectory, "adm-16", 64, "bf16", "bwd", "full"),
        *[
            _case("core", op, level, 16, dtype, direction)
            for dtype in ("fp16", "fp32") for op in (cross, trajectory) for level in ("adm-32", "sd-64")
            for direction in ("fwd", "bwd")
        ],
        *[_case("core", op, level, 16, "bf16", "step") for op in (cross, trajectory) for level in ("adm-32", "sd-64")],
    ]  # fmt: skip
    compiled = [
        _case("compiled", op, level, 16, "bf16", direction)
        for level in LEVELS for direction in ("fwd", "bwd") for op in (cross, trajectory)
    ]  # fmt: skip
    return [first, support, long, compiled]


def steps(dry: bool = False) -> list[Step]:
    """Return every step of a measuring process in order."""
    if dry:
        return _dry()
    first, support, long, compiled = _cases()
    windows = [
        Step(f"windows {level} {dtype}", "windows", 8.0, 60.0, arguments=(level, dtype, 16))
        for level in LEVELS for dtype in ("bf16", "fp16")
    ]  # fmt: skip
    gathers = [
        Step(f"gather {size}", "gather", 10.0, 60.0, arguments=(size,)) for size in (128, 80, 1024, 320, 160, 2048)
    ]
    return [
        Step("facts", "facts", 5.0),
        Step("ceilings", "ceilings", 15.0),
        *first,
        *windows,
        *gathers[:1],
        Step("atomics", "atomics", 10.0, 60.0),
        *support,
        *gathers[1:],
        *compiled[:8],
        *long,
        *compiled[8:],
    ]


def _dry() -> list[Step]:
    """Return one tiny step of every kind, and a case of every operator and direction."""
    cases = [
        Case(op, "tiny", 2, "fp32", direction, 0, variant, "cpu", "reference")
        for op, direction, variant in [
            ("cross_frame_attention", "fwd", ""),
            ("cross_frame_attention", "bwd", ""),
            ("trajectory_attention", "step", "full"),
            ("chain_links", "fwd", ""),
            ("correspondence_search", "fwd", ""),
            ("link_score", "fwd", ""),
            ("slr_attention", "fwd", "neighbors"),
        ]
    ]
    made = [Step(f"core {c.op} {c.name}", "case", 1.0, 300.0, c, "core") for c in cases]
    return [
        Step("facts", "facts", 1.0, 300.0),
        Step("ceilings", "ceilings", 1.0, 300.0),
        *made,
        Step("windows tiny bf16", "windows", 1.0, 300.0, arguments=("tiny", "bf16", 3)),
        Step("gather 80", "gather", 1.0, 300.0, arguments=(80,)),
        Step("atomics", "atomics", 1.0, 300.0),
    ]


def on(step: Step, device: str, backend: str) -> Step:
    """Return the step for a machine: its case on that device, ours by that backend."""
    return step if step.case is None else replace(step, case=replace(step.case, device=device, backend=backend))
