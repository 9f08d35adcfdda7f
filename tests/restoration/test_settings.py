"""Settings of the temporal parts: presets, every option by name, recording and reading back."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from zsvr.temporal import FlowOptions, GuidanceOptions, NoiseOptions, Temporal, presets
from zsvr.temporal.settings import option_names
from zsvr_kernels import CorrectionOptions, SLROptions, absolute, relative

# Another valid value for every option.
CHANGES = {
    "attention.frames": "first_and_previous",
    "attention.offsets": [-2, 2],
    "attention.include_self": True,
    "attention.border": "drop",
    "attention.dedupe": True,
    "attention.combine": "joint",
    "attention.blend": 0.25,
    "attention.layers": ["up_blocks.*"],
    "attention.active": [0.25, 0.75],
    "attention.stages": ["up"],
    "attention.min_tokens": 4,
    "attention.max_tokens": 1024,
    "attention.conditional": 0,
    "attention.prefix": 1,
    "attention.backend": "reference",
    "traj.window": 3,
    "traj.rounding": "nearest",
    "traj.link_rule": "corners",
    "correct.enabled": False,
    "correct.similarity": False,
    "correct.history": False,
    "correct.radius": 3,
    "correct.feature": "keys",
    "correct.similarity_start": 0.25,
    "correct.search_every": 2,
    "correct.margin": 0.125,
    "correct.history_score": "stored",
    "correct.search_center": "flow",
    "correct.revive_threshold": 0.5,
    "correct.history_scope": "grid",
    "flow.estimator": "raft_large",
    "flow.source": "clean",
    "flow.max_side": 256,
    "flow.cut_threshold": 0.9,
    "flow.cut_difference": 0.5,
    "flow.check": "S",
    "flow.alpha": 0.5,
    "flow.beta": 0.25,
    "flow.threshold_warped": True,
    "flow.motion_boundary": True,
    "flow.resize": "antialias",
    "flow.occ_pool": "mean",
    "flow.refresh_every": 4,
    "guidance.gain": 0.5,
    "guidance.neighbors": [-1],
    "guidance.norm": "l1",
    "guidance.detach_neighbor": True,
    "guidance.target": "x",
    "guidance.scale_by_variance": True,
    "guidance.active": [0.0, 0.5],
    "guidance.x0_blend": 0.125,
    "guidance.clip": "models/clip",
    "guidance.sem_gain": 0.25,
    "guidance.sem_every": 1,
    "guidance.sem_normalize": False,
    "noise.sharing": "rho",
    "noise.fill": "fresh",
    "noise.static_px": 1.5,
    "noise.soft": True,
    "noise.rho": 0.5,
    "sampler.stop_step": 50,
}

# METHOD's defaults, beside those of SLROptions and CorrectionOptions, which are tested with the kernels.
DEFAULTS = {
    "attention.frames": "neighbors",
    "attention.offsets": [-1, 1],
    "attention.combine": "serial",
    "traj.window": None,
    "correct.similarity_start": 0.5,
    "flow.estimator": "dis",
    "flow.source": "preview",
    "flow.max_side": 512,
    "flow.cut_threshold": 0.8,
    "flow.cut_difference": 0.25,
    "flow.check": "U",
    "flow.resize": "area",
    "flow.occ_pool": "max",
    "flow.refresh_every": 0,
    "guidance.gain": 0.01,
    "guidance.neighbors": [-1, 1],
    "guidance.norm": "l2",
    "guidance.detach_neighbor": False,
    "guidance.target": "x0",
    "guidance.scale_by_variance": False,
    "guidance.active": [0.0, 1.0],
    "guidance.x0_blend": 0.0,
    "guidance.clip": None,
    "guidance.sem_gain": 0.02,
    "guidance.sem_every": 5,
    "guidance.sem_normalize": True,
    "noise.sharing": "share",
    "noise.fill": "shared",
    "noise.static_px": 0.5,
    "noise.soft": False,
    "noise.rho": 0.9,
    "sampler.stop_step": 0,
}


def recorded(temporal: Temporal) -> dict:
    return json.loads(json.dumps(temporal.to_dict()))


def test_defaults_are_the_documented_ones():
    values = recorded(Temporal())
    assert {name: values[name] for name in DEFAULTS} == DEFAULTS
    assert set(values) == set(CHANGES)


def test_every_option_of_the_parts_has_a_name():
    named = {f"{group}.{name}" for group, names in option_names().items() for name in names}
    assert named == set(CHANGES)
    fields = {f.name for kind in (SLROptions, CorrectionOptions) for f in dataclasses.fields(kind)} - {"correct"}
    assert fields <= {name.partition(".")[2] for name in named}


@pytest.mark.parametrize("name", list(CHANGES))
def test_every_option_is_settable_recorded_and_read_back(name):
    value = CHANGES[name]
    changed = Temporal().with_({name: value})
    assert changed != Temporal()
    values = recorded(changed)
    assert values[name] == value
    others = {n: v for n, v in values.items() if n != name}
    assert others == {n: v for n, v in recorded(Temporal()).items() if n in others}
    assert Temporal.from_dict(values) == changed


def test_all_of_them_together():
    changed = Temporal().with_(CHANGES)
    assert recorded(changed) == CHANGES
    again = Temporal.from_dict(CHANGES)
    assert again == changed and hash(again) == hash(changed)
    assert changed.slr is not None and changed.slr.check == "S" and changed.slr.alpha == 0.5
    assert changed.slr.correct.radius == 3
    assert changed.with_({"flow.check": "none", "flow.alpha": None}).slr.link_options()["check"] == "none"


def test_items_of_a_frame_table_are_recorded():
    temporal = Temporal(slr=SLROptions(frames=[absolute(0), relative(-1)]))
    values = recorded(temporal)
    assert values["attention.frames"] == [["absolute", 0], ["relative", -1]]
    assert Temporal.from_dict(values) == temporal
    again = temporal.with_({"attention.frames": (relative(1),)})
    assert again.slr.frames == (relative(1),)


@pytest.mark.parametrize("options", [{"frames": lambda T: None}, {"layers": lambda n, g: True}])
def test_functions_cannot_be_recorded(options):
    temporal = Temporal(slr=SLROptions(**options))
    with pytest.raises(ValueError, match="cannot be recorded"):
        temporal.to_dict()
    assert temporal == temporal
    assert temporal != Temporal() and temporal != 1


def test_tensors_cannot_be_recorded():
    with pytest.raises(ValueError, match="is a Tensor"):
        Temporal(slr=SLROptions(frames=torch.zeros(2, 1, dtype=torch.int32))).to_dict()


@pytest.mark.parametrize("name", list(presets()))
def test_presets_come_back_from_their_record(name):
    temporal = Temporal.preset(name)
    assert Temporal.from_dict(recorded(temporal)) == temporal


def test_presets_are_what_their_names_say():
    known = presets()
    assert known["none"] == known["host_only"] and known["batch_consistent"] == known["noise_only"]
    assert known["paper"] == known["zvrd"] == Temporal()
    none = known["none"]
    assert none.slr is None and none.guidance is None and none.noise.sharing == "none" and not none.needs_flow
    shared = known["batch_consistent"]
    assert shared.slr is None and shared.guidance is None and shared.noise.sharing == "share" and not shared.needs_flow
    first = known["zvrd_v1"]
    assert first.slr.frames == "previous" and first.slr.combine == "cross" and first.guidance.neighbors == (-1,)
    assert first.noise == NoiseOptions()
    best = known["best"]
    assert best.slr is not None and best.guidance is not None and best != known["paper"]
    different = {tuple(sorted(map(str, recorded(t).items()))) for t in known.values()}
    assert len(different) == 5
    with pytest.raises(ValueError, match="none, host_only"):
        Temporal.preset("zvrd2")


def test_parts_are_switched_off_and_on():
    whole = Temporal()
    off = whole.with_({"attention": None, "guidance": None})
    assert off.slr is None and off.guidance is None
    assert off.with_({"guidance.gain": 0.5}).guidance == GuidanceOptions(gain=0.5)
    assert off.with_({"noise.rho": 0.5}).slr is None
    assert off.with_({"attention": True, "guidance": True}) == whole
    assert off.with_({"correct.radius": 1}).slr.correct.radius == 1
    with pytest.raises(ValueError, match="attention is off"):
        whole.with_({"attention": None, "attention.border": "drop"})
    with pytest.raises(ValueError, match="guidance is off"):
        whole.with_({"guidance": False, "guidance.gain": 1})


@pytest.mark.parametrize(
    ("changes", "needs"),
    [
        ({}, False),
        ({"attention.combine": "cross"}, False),
        ({"attention.combine": "serial"}, True),
        ({"guidance.gain": 0.1}, True),
        ({"guidance.gain": 0.0}, False),
        ({"guidance.gain": 0.0, "guidance.x0_blend": 0.1}, True),
        ({"noise.sharing": "warp_blend"}, True),
        ({"noise.sharing": "rho"}, False),
    ],
)
def test_flow_is_asked_for_where_it_is_used(changes, needs):
    assert Temporal.preset("none", changes).needs_flow == needs


def test_unknown_names_are_all_listed():
    names = ["attention.combined", "noise", "guidance.", "gain", "flow.window", "noise.sharing"]
    with pytest.raises(ValueError) as caught:
        Temporal().with_(dict.fromkeys(names, "share"))
    message = str(caught.value)
    assert message.startswith("unknown options: attention.combined, flow.window, gain, guidance., noise;")
    assert "guidance.sem_every" in message
    with pytest.raises(ValueError, match="attention = 'on'"):
        Temporal().with_({"attention": "on"})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("attention.combine", "serially", ValueError),
        ("attention.include_self", 1, TypeError),
        ("traj.window", -1, ValueError),
        ("correct.radius", 1.5, TypeError),
        ("flow.estimator", "given", ValueError),
        ("flow.check", "V", ValueError),
        ("flow.max_side", 8, ValueError),
        ("flow.alpha", -1, ValueError),
        ("flow.motion_boundary", None, TypeError),
        ("guidance.gain", float("inf"), ValueError),
        ("guidance.gain", "0.1", TypeError),
        ("guidance.neighbors", [2], ValueError),
        ("guidance.neighbors", [], ValueError),
        ("guidance.neighbors", 1, ValueError),
        ("guidance.active", [0.5, 0.25], ValueError),
        ("guidance.active", 0.5, TypeError),
        ("guidance.x0_blend", 1.5, ValueError),
        ("guidance.clip", 3, TypeError),
        ("guidance.sem_every", 0, ValueError),
        ("guidance.sem_normalize", 0, TypeError),
        ("noise.sharing", "shared", ValueError),
        ("noise.rho", 1.5, ValueError),
        ("noise.soft", "yes", TypeError),
        ("sampler.stop_step", 1000, ValueError),
        ("sampler.stop_step", -1, ValueError),
        ("sampler.stop_step", True, TypeError),
    ],
)
def test_wrong_values_are_refused_by_name(name, value, error):
    with pytest.raises(error, match=name.partition(".")[2]):
        Temporal().with_({name: value})


def test_parts_of_a_wrong_kind_and_contradictions_are_refused():
    with pytest.raises(TypeError, match="slr must be SLROptions"):
        Temporal(slr=GuidanceOptions())
    with pytest.raises(TypeError, match="noise must be NoiseOptions"):
        Temporal(noise=None)
    with pytest.raises(ValueError, match="slr says check = 'S', flow says 'U'"):
        Temporal(slr=SLROptions(check="S"))
    assert Temporal(slr=SLROptions(check="S"), flow=FlowOptions(check="S")).slr.check == "S"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Temporal().stop_step = 3
