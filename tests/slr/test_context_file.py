"""Saving and loading a VideoContext."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import sys

import pytest
import torch
from clips import NOW, layers, same, snapshot, some_context, some_flow

import zsvr_kernels as zk
from zsvr_kernels import context_file

safetensors_torch = pytest.importorskip("safetensors.torch")


def step_once(context, k=0, K=2):
    (layer,) = layers(1)
    x = torch.randn(context.clips * context.frames, 16, 4, 6, generator=torch.Generator().manual_seed(k))
    with context.step(k, K), torch.no_grad():
        return layer(x, context)


def settings(options):
    values, groups = context_file.options_to_json(options)
    return json.loads(json.dumps(values)), {n: x.tolist() for g in groups.values() for n, x in g.items()}


OPTIONS = {
    "defaults": zk.SLROptions(),
    "all others": zk.SLROptions(
        offsets=[-2, -1, 1], include_self=True, border="drop", dedupe=True, combine="joint", blend=0.25,
        layers=["up_blocks.*", "mid*"], stages=["up"], min_tokens=4, max_tokens=999, active=(0.25, 0.75), check="S",
        alpha=0.5, beta=2, threshold_warped=True, motion_boundary=True, resize="nearest", occ_pool="mean", window=2,
        rounding="nearest", link_rule="corners", conditional=0, prefix=1, backend="reference",
        correct=zk.CorrectionOptions(
            enabled=False, similarity=False, history=False, radius=3, feature="keys", similarity_start=0.1,
            search_every=2, margin=0.1, history_score="stored", search_center="flow", revive_threshold=0.5,
            history_scope="grid",
        ),
    ),
    "items": zk.SLROptions(frames=[zk.relative(-1), zk.absolute(0), zk.relative(2)]),
    "table": zk.SLROptions(frames=zk.neighbors(4, (-2, 2))),
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_and_clip_come_back(options, tmp_path, generator):
    flow = some_flow(2, 4, (16, 24), generator)
    occ = [torch.rand(2, 3, 16, 24, generator=generator) < 0.1 for _ in range(2)]
    context = zk.VideoContext(
        flow[0].half(), flow[1].half(), occ_forward=occ[0], occ_backward=occ[1], options=options, size=(8, 12),
        grids=[(3, 2)],
    )  # fmt: skip
    context.save(tmp_path / "clip.safetensors")
    loaded = zk.VideoContext.load(tmp_path / "clip.safetensors")
    assert settings(loaded.options) == settings(options)
    assert (loaded.frames, loaded.clips, loaded.ids, loaded.progress) == (4, 2, [0, 1, 2, 3], 0)
    assert torch.equal(loaded.table(), context.table())
    assert loaded.grid_of(6) == (3, 2) and loaded.grid_of(24) == (4, 6)
    for grid in ((4, 6), (3, 2)):
        assert same(loaded.links(grid).tensors(), context.links(grid).tensors())
    assert loaded.nbytes["flow"] == context.nbytes["flow"]


def test_history_and_given_links_come_back_and_sampling_goes_on(tmp_path, generator, search):
    context = some_context(generator, 2, 3, options=zk.SLROptions(correct=NOW))
    context.set_links(zk.Links.from_flow(*some_flow(2, 3, (8, 8), generator), grid=(4, 6)))
    step_once(context)
    context.save(tmp_path / "clip.safetensors")
    loaded = zk.VideoContext.load(str(tmp_path / "clip.safetensors"), cache_device="cpu")
    assert list(loaded.history()) == ["layer0/4x6"] and same(snapshot(loaded), snapshot(context))
    assert same(loaded.links((4, 6)).tensors(), context.links((4, 6)).tensors())
    assert loaded.progress == context.progress and not loaded.uses_features()
    assert torch.equal(step_once(loaded, 1), step_once(context, 1))
    assert same(snapshot(loaded), snapshot(context))


def test_windows_and_contexts_without_flow_come_back(tmp_path, generator):
    path = tmp_path / "clip"
    window = some_context(generator, T=6, options=zk.SLROptions(frames="first_and_previous")).window(2, 5)
    window.save(path)
    loaded = zk.VideoContext.load(path)
    assert loaded.ids == [2, 3, 4] and torch.equal(loaded.table(), window.table())
    assert same(loaded.links((4, 6)).tensors(), window.links((4, 6)).tensors())
    bare = zk.VideoContext(frames=5, size=(8, 8), options=zk.SLROptions(combine="cross"))
    bare.save(path)
    loaded = zk.VideoContext.load(path)
    assert (loaded.frames, loaded.has_flow, loaded.grid_of(16)) == (5, False, (4, 4))
    with_links = zk.VideoContext(frames=3)
    with_links.set_links(zk.Links.from_flow(*some_flow(2, 3, (8, 8), generator), grid=(4, 6)))
    with_links.save(path)
    assert zk.VideoContext.load(path).clips == 2


def test_flow_that_shares_memory_is_saved(tmp_path):
    flow = torch.arange(2.0 * 3 * 2 * 8 * 8).reshape(2, 1, 3, 2, 8, 8)
    for forward, backward in ((flow[0], flow[0]), (flow[0], flow[1]), (flow[0], flow[0].flip(-1).flip(-1))):
        zk.VideoContext(forward, backward).save(tmp_path / "clip")
        loaded = zk.VideoContext.load(tmp_path / "clip")
        assert torch.equal(loaded._flow["flow_forward"], forward)
        assert torch.equal(loaded._flow["flow_backward"], backward)


def test_pending_links_are_not_saved(tmp_path, generator, search):
    context = some_context(generator, options=zk.SLROptions(correct=NOW))
    context.begin_step(0, 2)
    (layer,) = layers(1)
    layer(torch.randn(4, 16, 4, 6), context)
    context.save(tmp_path / "clip")
    loaded = zk.VideoContext.load(tmp_path / "clip")
    loaded.commit()
    assert loaded.history() == {}


@pytest.mark.parametrize("where", ["before the file", "half way", "at the move"])
def test_a_failure_leaves_the_earlier_file_whole(where, tmp_path, generator, monkeypatch):
    path = tmp_path / "clip.safetensors"
    context = some_context(generator)
    context.save(path)
    before = path.read_bytes()

    def save_file(tensors, name, metadata):
        if where == "half way":
            pathlib.Path(name).write_bytes(before[:100])
        raise OSError("no space left on device")

    def replace(*_):
        raise OSError("no space left on device")

    if where == "at the move":
        monkeypatch.setattr(os, "replace", replace)
    else:
        monkeypatch.setattr(safetensors_torch, "save_file", save_file)
    with pytest.raises(OSError, match="no space left"):
        some_context(generator).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    assert zk.VideoContext.load(path).frames == 4
    some_context(generator, T=5).save(path)
    assert zk.VideoContext.load(path).frames == 5 and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("name", ["layers", "frames"])
def test_functions_cannot_be_saved(name, tmp_path, generator):
    functions = {"layers": lambda name, grid: True, "frames": zk.neighbors}
    context = some_context(generator, options=zk.SLROptions(**{name: functions[name]}))
    with pytest.raises(ValueError, match=f"options.{name} is a function, which cannot be saved"):
        context.save(tmp_path / "clip")
    assert os.listdir(tmp_path) == []


def rewrite(path, change_facts=None, change_tensors=None, form=context_file.FORMAT):
    """Write a file as `save` does, but for a change."""
    groups, facts = context_file.read(path, "cpu")
    tensors = {f"{g}/{n}": x for g, parts in groups.items() for n, x in parts.items()}
    for change, target in ((change_facts, facts), (change_tensors, tensors)):
        if change is not None:
            change(target)
    safetensors_torch.save_file(tensors, str(path), {"format": form, "facts": json.dumps(facts)})


DAMAGES = {
    "a fact is missing": {"change_facts": lambda f: f.pop("frames")},
    "an unknown option": {"change_facts": lambda f: f["options"].update(spin=1)},
    "a wrong option": {"change_facts": lambda f: f["options"].update(combine="both")},
    "wrong ids": {"change_facts": lambda f: f.update(ids=[3, 2, 1, 0])},
    "a wrong step": {"change_facts": lambda f: f.update(k=5, K=2)},
    "half the flow": {"change_tensors": lambda t: t.pop("flow/flow_backward")},
    "a history of another size": {
        "change_tensors": lambda t: t.update({"history/layer0/4x6/forward": torch.zeros(1, 3, 23, 2)})
    },
    "half a history": {"change_tensors": lambda t: t.pop("history/layer0/4x6/has_forward")},
    "a history of no grid": {"change_tensors": lambda t: t.update({"history/layer0/four/forward": torch.zeros(1)})},
    "a stray tensor of flow": {"change_tensors": lambda t: t.update({"flow/extra": torch.zeros(1)})},
    "another format": {"form": "zsvr_kernels.VideoContext 2"},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(damage, tmp_path, generator, monkeypatch, search):
    path = tmp_path / "clip"
    context = some_context(generator, options=zk.SLROptions(correct=NOW))
    step_once(context)
    context.save(path)
    rewrite(path)
    zk.VideoContext.load(path)
    rewrite(path, **DAMAGES[damage])
    with pytest.raises(ValueError, match=f"{path} (does not hold a whole VideoContext|holds '.* 2', expected)"):
        zk.VideoContext.load(path)


def test_other_files_are_refused_and_nothing_is_unpickled(tmp_path, monkeypatch):
    opened = []

    class Bomb:
        def __reduce__(self):
            return (opened.append, ("executed",))

    monkeypatch.setattr(torch, "load", lambda *a, **k: opened.append("torch.load"))
    monkeypatch.setattr(pickle, "load", lambda *a, **k: opened.append("pickle.load"))
    files = {
        "pickle": pickle.dumps(Bomb()),
        "text": b"hello",
        "empty": b"",
        "no header": (2**40).to_bytes(8, "little") + b"{}",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is no file of VideoContext.save, or it is damaged"):
            zk.VideoContext.load(tmp_path / name)
    safetensors_torch.save_file({"x": torch.zeros(1)}, str(tmp_path / "weights"))
    with pytest.raises(ValueError, match="weights holds 'no format', expected"):
        zk.VideoContext.load(tmp_path / "weights")
    safetensors_torch.save_file({"x": torch.zeros(1)}, str(tmp_path / "bare"), {"format": context_file.FORMAT})
    with pytest.raises(ValueError, match=r"bare is no file of VideoContext.save, or it is damaged"):
        zk.VideoContext.load(tmp_path / "bare")
    for missing in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match="is no file"):
            zk.VideoContext.load(missing)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        zk.VideoContext(frames=1).save(tmp_path / "nowhere" / "clip")
    assert not opened


def test_without_safetensors_the_error_says_what_to_install(tmp_path, generator, monkeypatch):
    context = some_context(generator)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for attempt in (lambda: context.save(tmp_path / "clip"), lambda: zk.VideoContext.load(tmp_path / "clip")):
        with pytest.raises(ModuleNotFoundError, match="needs safetensors: pip install safetensors"):
            attempt()
    assert context.trajectories((4, 6)).grid == (4, 6)
