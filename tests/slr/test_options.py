"""SLROptions and CorrectionOptions, the frame tables they name, windows of frames, and hostile values."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zsvr_kernels as zk
from zsvr_kernels.options import stage_of

# ---- frame tables ----


def test_presets_are_the_public_tables():
    for T in (1, 2, 5):
        for name, table in {
            "neighbors": zk.neighbors(T),
            "previous": zk.previous(T),
            "first_and_previous": zk.first_and_previous(T),
            "all_frames": zk.all_frames(T),
        }.items():
            assert torch.equal(zk.SLROptions(frames=name).table(T), table), name
    assert torch.equal(zk.SLROptions().table(5), zk.neighbors(5))
    options = zk.SLROptions(offsets=[-2, 1], include_self=True, border="drop", dedupe=True)
    assert torch.equal(options.table(5), zk.neighbors(5, (-2, 1), True, "drop", dedupe=True))


def test_every_preset_takes_the_border_rule_and_the_own_frame():
    options = zk.SLROptions(frames="previous", include_self=True, border="drop")
    assert options.table(3).tolist() == [[-1, 0], [0, 1], [1, 2]]
    options = zk.SLROptions(frames="first_and_previous", include_self=True, dedupe=True)
    assert options.table(3).tolist() == [[0, -1, -1], [0, -1, 1], [0, 1, 2]]
    assert zk.SLROptions(frames="all_frames", include_self=True, dedupe=True).table(2).tolist() == [
        [0, 1, -1], [0, 1, -1],
    ]  # fmt: skip


def test_items_tensors_and_functions():
    items = zk.SLROptions(frames=[zk.relative(-1), zk.absolute(2)], include_self=True)
    assert torch.equal(items.table(4), zk.index_list(4, [zk.relative(-1), zk.absolute(2)], include_self=True))
    table = zk.neighbors(4, (-3, 1))
    assert zk.SLROptions(frames=table).table(4) is table
    assert torch.equal(zk.SLROptions(frames=zk.all_frames).table(3), zk.all_frames(3))
    for wrong, error, message in (
        (lambda T: zk.neighbors(T + 1), ValueError, "T = 3 rows"),
        (lambda T: [[0]], TypeError, "frames must be a torch.Tensor"),
        (lambda T: zk.neighbors(T).long(), TypeError, "frames must be int32"),
        (lambda T: torch.full((T, 1), T, dtype=torch.int32), ValueError, "frames holds 3"),
        (lambda T: torch.full((T, 1), -2, dtype=torch.int32), ValueError, "frames holds -2"),
        (lambda T: torch.zeros(T, 0, dtype=torch.int32), ValueError, "R >= 1"),
    ):
        with pytest.raises(error, match=message):
            zk.SLROptions(frames=wrong).table(3)


def brute_force(items, ids, include_self, border, dedupe):
    """A frame table by the words of its definition: absolute numbers first, then places in the window."""
    rows = []
    for own in ids:
        row = []
        for kind, number in [*items, *([("rel", 0)] if include_self else [])]:
            wanted = own + number if kind == "rel" else number
            if wanted not in ids:
                mirror = own - number
                if border == "drop":
                    wanted = None
                elif border == "reflect" and kind == "rel" and mirror in ids:
                    wanted = mirror
                else:
                    wanted = own
            row.append(wanted)
        if all(n is None for n in row):
            row[0] = own
        if dedupe or len({n for n in row if n is not None}) == 1:
            row = [n if n not in row[:c] else None for c, n in enumerate(row)]
        rows.append([-1 if n is None else ids.index(n) for n in row])
    return rows


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(["rel", "abs"]), st.integers(-3, 3)), min_size=1, max_size=4),
    st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True).map(sorted),
    st.booleans(),
    st.sampled_from(["replicate", "drop", "reflect"]),
    st.booleans(),
)
def test_items_of_a_window_mean_absolute_frames(items, ids, include_self, border, dedupe):
    items = [(kind, abs(n) if kind == "abs" else n) for kind, n in items]
    made = [zk.relative(n) if kind == "rel" else zk.absolute(n) for kind, n in items]
    options = {"include_self": include_self, "border": border, "dedupe": dedupe}
    expected = brute_force(items, ids, include_self, border, dedupe)
    assert zk.index_list(len(ids), made, ids=ids, **options).tolist() == expected
    assert zk.SLROptions(frames=made, **options).table(len(ids), ids).tolist() == expected


def test_presets_in_a_window():
    ids = [0, 5, 6, 7]
    assert zk.SLROptions().table(4, ids).tolist() == [[0, -1], [1, 2], [1, 3], [2, 3]]
    assert zk.SLROptions(border="reflect").table(4, ids).tolist() == [[0, -1], [2, -1], [1, 3], [2, -1]]
    assert zk.SLROptions(border="drop").table(4, ids).tolist() == [[0, -1], [-1, 2], [1, 3], [2, -1]]
    assert zk.SLROptions(frames="previous").table(4, ids).tolist() == [[0], [1], [1], [2]]
    assert zk.SLROptions(frames="first_and_previous").table(4, ids).tolist() == [[0, -1], [0, 1], [0, 1], [0, 2]]
    assert zk.SLROptions(frames="first_and_previous").table(3, ids[1:]).tolist() == [[0, -1], [1, 0], [2, 1]]
    assert zk.SLROptions(frames="all_frames").table(4, ids).tolist() == [[0, 1, 2, 3]] * 4
    assert torch.equal(zk.index_list(4, [zk.relative(-1)], ids=range(4)), zk.previous(4))


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 1], ValueError, "ids must be T = 3 rising"),
        ([0, 2, 1], ValueError, "ids must be T = 3 rising"),
        ([0, 1, 1], ValueError, "ids must be T = 3 rising"),
        ([-1, 0, 1], ValueError, "ids must be at least 0"),
        ([0, 1, 2.0], TypeError, "ids must be an int"),
        ("012", TypeError, "ids must be an int"),
        (3, TypeError, "not iterable"),
    ],
)
def test_wrong_ids(ids, error, message):
    for attempt in (
        lambda: zk.index_list(3, [zk.relative(-1)], ids=ids),
        lambda: zk.VideoContext(frames=3, ids=ids),
        lambda: zk.VideoContext(frames=3, ids=ids, options=zk.SLROptions(frames=zk.neighbors(3))),
    ):
        with pytest.raises(error, match=message):
            attempt()


def test_a_window_does_not_count_from_the_end():
    with pytest.raises(ValueError, match="a window does not know the clip's end"):
        zk.index_list(3, [zk.absolute(-1)], ids=[4, 5, 6])
    assert zk.index_list(3, [zk.absolute(-1)]).tolist() == [[2], [2], [2]]


# ---- which layers, when ----


def test_stages_are_told_by_names():
    names = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1": "down",
        "mid_block.attentions.0": "mid",
        "unet.up_blocks.3.attentions.2": "up",
        "input_blocks.10.1": "down",
        "middle_block.1": "mid",
        "model.diffusion_model.output_blocks.3.1": "up",
        "blocks.3.attn": None,
        "": None,
    }
    for name, stage in names.items():
        assert stage_of(name) == stage, name


def test_layers_are_taken_by_stage_pattern_predicate_and_size():
    assert zk.SLROptions().takes("anything") is None
    up = zk.SLROptions(stages=["up"])
    assert up.takes("up_blocks.0.attn1") is None and up.takes("blocks.0.attn") is None
    assert "it is in the down part" in up.takes("down_blocks.0.attn1")
    named = zk.SLROptions(layers=["up_blocks.*", "*.7.attn"])
    assert named.takes("up_blocks.0.attn1") is None and named.takes("blocks.7.attn") is None
    assert "matches none of" in named.takes("Up_blocks.0.attn1")
    sized = zk.SLROptions(min_tokens=16, max_tokens=64)
    assert [sized.takes_grid("x", (4, n)) is None for n in (3, 4, 16, 17)] == [False, True, True, False]
    assert "fewer than min_tokens = 16" in sized.takes_grid("x", (3, 5))
    assert "more than max_tokens = 64" in sized.takes_grid("x", (5, 13))
    asked = []
    picky = zk.SLROptions(layers=lambda name, grid: asked.append((name, grid)) or grid == (2, 2))
    assert picky.takes("x") is None and picky.takes_grid("x", (2, 2)) is None
    assert "says no" in picky.takes_grid("y", (2, 3)) and asked == [("x", (2, 2)), ("y", (2, 3))]


def test_active_is_half_open_but_for_the_end():
    def steps(*active):
        options = zk.SLROptions(active=active)
        return [k for k in range(5) if options.is_active(k / 4)]

    assert steps(0, 1) == [0, 1, 2, 3, 4]
    assert steps(0.25, 0.75) == [1, 2]
    assert steps(0.5, 1.0) == [2, 3, 4]
    assert steps(0.5, 0.5) == [] and steps(1, 1) == [4]


def test_with_changes_either_kind():
    options = zk.SLROptions(window=3).with_(combine="joint", correct_radius=1, correct_search_every=2)
    assert (options.window, options.combine) == (3, "joint")
    assert options.correct == zk.CorrectionOptions(radius=1, search_every=2)
    assert options.with_(correct=zk.CorrectionOptions(margin=0.5), correct_radius=4).correct == zk.CorrectionOptions(
        margin=0.5, radius=4
    )
    for unknown in ({"radius": 1}, {"correct_combine": "joint"}):
        with pytest.raises(TypeError, match="unexpected keyword"):
            options.with_(**unknown)


def test_defaults_are_the_methods():
    options = zk.SLROptions()
    expected = {
        "frames": "neighbors", "offsets": (-1, 1), "include_self": False, "border": "replicate", "dedupe": False,
        "combine": "serial", "blend": 0.5, "layers": "all", "active": (0.0, 1.0), "check": "U", "alpha": None,
        "beta": None, "threshold_warped": False, "motion_boundary": False, "resize": "area", "occ_pool": "max",
        "window": None, "rounding": "bilinear", "link_rule": "nearest", "conditional": -1, "prefix": 0,
    }  # fmt: skip
    assert {name: getattr(options, name) for name in expected} == expected
    assert dataclasses.asdict(options.correct) == {
        "enabled": True, "similarity": True, "history": True, "radius": 2, "feature": "tokens",
        "similarity_start": 0.5, "search_every": 1, "margin": 0.0, "history_score": "reevaluate",
        "search_center": "history", "revive_threshold": None, "history_scope": "layer",
    }  # fmt: skip


# ---- wrong and hostile values ----

WRONG = [
    ({"frames": "next"}, ValueError, "frames must be one of neighbors, previous"),
    ({"frames": 3}, TypeError, "frames must be a preset's name"),
    ({"frames": []}, TypeError, "frames must list what relative"),
    ({"frames": [(-1,)]}, TypeError, "frames must list what relative"),
    ({"frames": zk.relative(-1)}, TypeError, "frames must list what relative"),
    ({"offsets": "-1"}, TypeError, "offsets must be a list of ints"),
    ({"offsets": [0.5]}, TypeError, "offsets must be an int"),
    ({"offsets": []}, ValueError, "offsets are empty"),
    ({"include_self": 1}, TypeError, "include_self must be True or False"),
    ({"dedupe": None}, TypeError, "dedupe must be True or False"),
    ({"threshold_warped": "no"}, TypeError, "threshold_warped must be True or False"),
    ({"motion_boundary": 0}, TypeError, "motion_boundary must be True or False"),
    ({"border": "wrap"}, ValueError, "border must be one of"),
    ({"combine": ["serial"]}, ValueError, "combine must be one of"),
    ({"blend": 2}, ValueError, "blend must be within 0..1"),
    ({"layers": "up_blocks.*"}, ValueError, 'layers must be "all", a list'),
    ({"layers": [1]}, TypeError, "patterns of layers must be strings"),
    ({"stages": "up"}, TypeError, "stages must be a list"),
    ({"stages": ["top"]}, ValueError, "stages must be one of down, mid, up"),
    ({"min_tokens": 0}, ValueError, "min_tokens must be at least 1"),
    ({"min_tokens": 9, "max_tokens": 8}, ValueError, "max_tokens must be at least 9"),
    ({"active": 0.5}, TypeError, r"active must be \(start, end\)"),
    ({"active": (0.6, 0.5)}, ValueError, "active must rise"),
    ({"active": (0, 1.5)}, ValueError, "active must be within 0..1"),
    ({"check": "V"}, ValueError, "check must be one of U, S, none"),
    ({"alpha": -1}, ValueError, "alpha must be finite and at least 0"),
    ({"beta": math.inf}, ValueError, "beta must be finite"),
    ({"resize": None}, ValueError, "resize must be one of"),
    ({"occ_pool": "min"}, ValueError, "occ_pool must be one of"),
    ({"window": -1}, ValueError, "window must be at least 0"),
    ({"rounding": "up"}, ValueError, "rounding must be one of"),
    ({"link_rule": "any"}, ValueError, "link_rule must be one of"),
    ({"correct": None}, TypeError, "correct must be zsvr_kernels.CorrectionOptions"),
    ({"conditional": "last"}, TypeError, "conditional must be an int"),
    ({"prefix": -1}, ValueError, "prefix must be at least 0"),
    ({"backend": "fast"}, ValueError, "backend must be one of auto, reference"),
    ({"correct_enabled": "yes"}, TypeError, "correct.enabled must be True or False"),
    ({"correct_radius": -1}, ValueError, "radius must be at least 0"),
    ({"correct_feature": "values"}, ValueError, "correct.feature must be one of tokens, keys"),
    ({"correct_similarity_start": math.nan}, ValueError, "correct.similarity_start must be finite"),
    ({"correct_search_every": 0}, ValueError, "correct.search_every must be at least 1"),
    ({"correct_margin": -0.1}, ValueError, "correct.margin must be finite and at least 0"),
    ({"correct_history_score": 1}, ValueError, "correct.history_score must be one of"),
    ({"correct_search_center": "both"}, ValueError, "correct.search_center must be one of"),
    ({"correct_history_scope": "clip"}, ValueError, "correct.history_scope must be one of"),
    ({"correct_revive_threshold": 1}, ValueError, "correct.revive_threshold must be None or within -1..1"),
    ({"correct_revive_threshold": True}, TypeError, "correct.revive_threshold must be a number"),
    ({"correct_revive_threshold": math.nan}, ValueError, "correct.revive_threshold must be None or within -1..1"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_wrong_values_are_named(change, error, message):
    with pytest.raises(error, match=message):
        zk.SLROptions().with_(**change)


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**63, -(2**70), 10**400, 2**21]),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=2),
    st.lists(st.one_of(st.integers(-2, 3), st.none(), st.text(max_size=2), st.floats()), max_size=3),
    st.tuples(st.integers(-1, 4), st.integers(-1, 4)),
    st.sampled_from(
        [object(), len, {}, {1}, 1j, torch.zeros(0), torch.zeros(2, 2, dtype=torch.int32), torch.tensor(1),
         torch.zeros(1, 2, 2, 4, 4), torch.zeros(1, 2, 2, 4, 4, device="meta"), torch.zeros(1, 2, 4, 4).bool(),
         torch.zeros(1, 0, 2, 4, 4), torch.zeros(0, 2, 2, 4, 4), torch.zeros(1, 2, 2, 0, 4), range(3),
         zk.relative(-1), "cpu", "cuda:x", "meta", "neighbors", "serial", float, torch.float32]
    ),
)  # fmt: skip


def constructed(kind, values):
    try:
        return kind(**values)
    except (TypeError, ValueError):
        return None


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(zk.CorrectionOptions)]), HOSTILE))
def test_hostile_correction_options(values):
    options = constructed(zk.CorrectionOptions, values)
    if options is not None:
        assert 0 <= options.first_admitted(7) <= 7
        hash(dataclasses.astuple(options))  # nothing but plain values is kept


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(zk.SLROptions)]), HOSTILE, max_size=3))
def test_hostile_options(values):
    options = constructed(zk.SLROptions, values)
    if options is not None:
        options.takes("up_blocks.0"), options.is_active(0.5), options.link_options()
        if isinstance(options.frames, (str, tuple)):
            assert options.table(3).shape[0] == 3


CONTEXT = (
    "flow_forward", "flow_backward", "options", "occ_forward", "occ_backward", "frames", "ids", "size", "grids",
    "cache_device",
)  # fmt: skip


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(CONTEXT), HOSTILE, max_size=4), st.booleans())
def test_hostile_contexts(values, has_flow):
    flow = torch.zeros(1, 2, 2, 4, 4)
    context = constructed(zk.VideoContext, ({"flow_forward": flow, "flow_backward": flow} if has_flow else {}) | values)
    if context is not None:
        assert context.frames >= 1 and len(context.ids) == context.frames
        assert context.table().shape[0] == context.frames
        assert "VideoContext(B=" in repr(context)
