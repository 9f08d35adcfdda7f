"""VideoContext: what it builds and when, links of one's own, windows, devices, memory."""

from __future__ import annotations

import copy
import dataclasses
import doctest

import pytest
import torch
from clips import NOW, layers, same, snapshot, some_context, some_flow

import zsvr_kernels as zk
from zsvr_kernels.sampling import sites

# ---- what is built, and when ----


def test_everything_is_built_once_and_only_when_asked_for(counter, generator):
    context = some_context(generator)
    assert counter.take() == (0, 0, 0)
    first = context.trajectories((4, 6))
    assert counter.take() == (1, 1, 0)
    assert context.trajectories((4, 6)) is first and context.trajectories([4, 6]) is first
    context.links((4, 6))
    assert counter.take() == (0, 0, 0)
    context.links((8, 12))
    assert counter.take() == (1, 0, 0)
    context.trajectories((8, 12))
    assert counter.take() == (0, 1, 0)


def test_links_and_trajectories_are_those_of_the_parts(generator):
    forward, backward = some_flow(2, 4, (32, 48), generator)
    options = zk.SLROptions(
        check="S", alpha=0.1, beta=0.5, motion_boundary=True, resize="antialias", occ_pool="mean",
        window=2, rounding="nearest", link_rule="corners",
    )  # fmt: skip
    context = zk.VideoContext(forward, backward, options=options)
    links = zk.Links.from_flow(
        forward, backward, grid=(4, 6), check="S", alpha=0.1, beta=0.5, motion_boundary=True,
        resize="antialias", occ_pool="mean", rounding="nearest",
    )  # fmt: skip
    assert same(context.links((4, 6)).tensors(), links.tensors())
    expected = zk.chain_links(links, window=2, rounding="nearest", link_rule="corners")
    got = context.trajectories((4, 6))
    assert torch.equal(got.positions, expected.positions) and torch.equal(got.valid, expected.valid)
    assert 0.1 < float(got.valid.float().mean()) < 0.9


def test_given_occlusion_replaces_the_check(generator):
    flow = some_flow(1, 3, (8, 8), generator)
    occ = [torch.rand(1, 2, 8, 8, generator=generator) < 0.3 for _ in range(2)]
    context = zk.VideoContext(*flow, occ_forward=occ[0], occ_backward=occ[1])
    links = context.links((8, 8))
    assert torch.equal(links.valid_forward, ~occ[0].flatten(2)) and torch.equal(
        links.valid_backward, ~occ[1].flatten(2)
    )


def test_layers_and_steps_share_what_is_built(counter, generator, search):
    context = some_context(generator, options=zk.SLROptions(correct=zk.CorrectionOptions(similarity_start=0.5)))
    x = torch.randn(4, 16, 4, 6, generator=generator)
    for k in range(4):
        with context.step(k, 4), torch.no_grad():
            for layer in layers(2):
                layer(x, context)
        assert counter.take() == ((1 if k == 0 else 0), (1 if k == 0 else 0 if k < 2 else 2), (0 if k < 2 else 2))


CHANGES = [
    ({"combine": "joint", "blend": 0.1, "backend": "reference", "frames": "previous"}, (0, 0), True),
    ({"correct_radius": 1, "correct_margin": 0.2, "correct_enabled": False}, (0, 0), True),
    ({"window": 1}, (0, 1), True),
    ({"link_rule": "corners"}, (0, 1), True),
    ({"rounding": "nearest"}, (1, 1), False),
    ({"alpha": 0.3}, (1, 1), False),
    ({"occ_pool": "mean"}, (1, 1), False),
    ({"correct_feature": "keys"}, (0, 0), False),
    ({"correct_history_scope": "grid"}, (0, 0), False),
]


@pytest.mark.parametrize(("changes", "built", "keeps_history"), CHANGES, ids=lambda x: str(x))
def test_configure_builds_anew_what_depends_on_a_change_and_only_that(
    changes, built, keeps_history, counter, generator, search
):
    context = some_context(generator, options=zk.SLROptions(correct=NOW))
    (layer,) = layers(1)
    x = torch.randn(4, 16, 4, 6, generator=generator)
    with context.step(3, 4):
        layer(x, context)
    before = snapshot(context)
    assert len(before) == 6
    context.begin_step(2, 4)
    context.trajectories((4, 6))
    counter.take()
    context.configure(context.options.with_(**changes))
    context.trajectories((4, 6))
    assert counter.take()[:2] == built
    assert same(snapshot(context), before if keeps_history else {})
    assert context.progress == 0.5  # where sampling is does not depend on options
    if "combine" in changes:
        assert torch.equal(context.table(), zk.previous(4))


def test_a_failing_configure_changes_nothing(generator):
    context = some_context(generator)
    before = context.options
    with pytest.raises(ValueError, match="T = 4 rows"):
        context.configure(zk.SLROptions(frames=zk.neighbors(5)))
    with pytest.raises(TypeError, match=r"options must be zsvr_kernels.SLROptions"):
        context.configure("default")
    assert context.options is before and torch.equal(context.table(), zk.neighbors(4))


@pytest.mark.parametrize("is_corrected", [False, True])
def test_what_inference_mode_builds_serves_a_later_backward(is_corrected, generator, search):
    options = zk.SLROptions(combine="joint", correct=dataclasses.replace(NOW, enabled=is_corrected))
    context = some_context(generator, options=options)
    (layer,) = layers(1)
    x = torch.randn(4, 16, 4, 6, generator=generator)
    with torch.inference_mode(), context.step(0, 2):
        first = layer(x, context)
    assert first.is_inference() and bool(context.history()) == is_corrected
    with context.step(1, 2):
        layer(x.requires_grad_(), context).sum().backward()
    assert float(x.grad.abs().max()) > 0
    kept = [*context.links((4, 6)).tensors().values(), context.trajectories((4, 6)).positions]
    kept += [x for h in context.history().values() for x in h.tensors().values()]
    assert not any(x.is_inference() for x in kept)


# ---- links of one's own, grids ----


def test_set_links_replaces_the_flows(counter, generator, search):
    context = some_context(generator, options=zk.SLROptions(correct=NOW))
    (layer,) = layers(1)
    x = torch.randn(4, 16, 4, 6, generator=generator)
    with context.step(1, 2):
        layer(x, context)
    context.trajectories((8, 12))
    other = zk.Links.from_flow(*some_flow(1, 4, (32, 48), generator), grid=(4, 6))
    counter.take()
    context.set_links(other)
    assert context.history() == {} and context.progress == 0.5
    assert context.links((4, 6)).forward is other.forward
    expected = zk.chain_links(other)
    assert torch.equal(context.trajectories((4, 6)).positions, expected.positions)
    context.trajectories((8, 12))
    assert counter.take() == (0, 1, 0)
    context.configure(context.options.with_(alpha=0.5))  # of the flow's check; these links are not from the flow
    assert context.links((4, 6)).forward is other.forward
    for wrong, error in ((other.forward, TypeError), (zk.Links.from_flow(*some_flow(1, 5, (8, 8), generator),
                         grid=(4, 6)), ValueError), (zk.Links.from_flow(*some_flow(2, 4, (8, 8), generator),
                         grid=(4, 6)), ValueError)):  # fmt: skip
        with pytest.raises(error, match="links must be"):
            context.set_links(wrong)
    assert context.links((4, 6)).forward is other.forward and context.clips == 1


def test_links_alone_make_a_context(generator):
    context = zk.VideoContext(frames=3, grids=[(4, 6)])
    assert not context.has_flow and context.clips == 1 and context.device.type == "cpu"
    with pytest.raises(ValueError, match="this context has no flow"):
        context.trajectories((4, 6))
    with pytest.raises(ValueError, match=r"links must be for \[B, T-1\] = \[B, 2\], got \[1, 3\]"):
        context.set_links(zk.Links.from_flow(*some_flow(1, 4, (8, 8), generator), grid=(4, 6)))
    context.set_links(zk.Links.from_flow(*some_flow(2, 3, (8, 8), generator), grid=(4, 6)))
    assert context.has_flow and context.clips == 2
    (layer,) = layers(1)
    assert layer(torch.randn(6, 24, 16), context).shape == (6, 24, 16)


def test_without_flow_cross_and_spatial_run(generator):
    (layer,) = layers(1)
    x = torch.randn(3, 24, 16, generator=generator)
    context = zk.VideoContext(frames=3, options=zk.SLROptions(combine="cross"))
    assert not torch.equal(layer(x, context), layer(x))
    context.configure(zk.SLROptions(combine="spatial"))
    assert torch.allclose(layer(x, context), layer(x), atol=1e-6)
    context.configure(zk.SLROptions())
    with pytest.raises(ValueError, match="no flow"):
        layer(x, context, grid=(4, 6))


def test_grid_of():
    context = zk.VideoContext(frames=1, size=(33, 50), grids=[(2, 7), (5, 5)])
    halvings = [(33, 50), (17, 25), (9, 13), (5, 7), (3, 4), (2, 2), (1, 1)]
    for grid in halvings:
        assert context.grid_of(grid[0] * grid[1]) == grid
    assert zk.VideoContext(frames=1, size=(2, 64)).grid_of(4) == (1, 4)
    assert context.grid_of(14) == (2, 7) and context.grid_of(25) == (5, 5)
    for tokens in (0, -3, 2, 24, 1649, 10**12):
        with pytest.raises(ValueError, match=rf"no token grid has {tokens} sites; tried 2x7, 5x5, 33x50"):
            context.grid_of(tokens)
    with pytest.raises(ValueError, match="tried none"):
        zk.VideoContext(frames=1).grid_of(4)
    flow = torch.zeros(1, 1, 2, 24, 16)
    assert zk.VideoContext(flow, flow).grid_of(96) == (12, 8)
    assert zk.VideoContext(flow, flow, size=(8, 12)).grid_of(96) == (8, 12)
    assert zk.VideoContext(flow, flow, grids=[(4, 24)]).grid_of(96) == (4, 24)


def test_prefix_tokens_are_counted_out_of_the_grid(generator, search):
    context = some_context(generator, size=(8, 12), options=zk.SLROptions(prefix=2, correct=NOW))
    x = torch.randn(4, 26, 16, generator=generator)
    (layer,) = layers(1)
    with context.step(0, 1), torch.no_grad():
        assert layer(x, context).shape == x.shape
    assert list(context.history()) == ["layer0/4x6"]
    with pytest.raises(ValueError, match="no token grid has 25 sites"):
        layer(torch.randn(4, 27, 16), context)
    with pytest.raises(ValueError, match="grid 4x7 has 28 sites, but x has 24 tokens"):
        layer(x, context, grid=(4, 7))


# ---- windows, devices, memory ----


def test_a_window_is_the_matching_part_of_the_clip(generator):
    flow = some_flow(2, 6, (16, 24), generator)
    occ = {f"occ_{n}": torch.rand(2, 5, 16, 24, generator=generator) < 0.02 for n in ("forward", "backward")}
    whole = zk.VideoContext(*flow, **occ, options=zk.SLROptions(frames="first_and_previous"), grids=[(2, 12)])
    given = zk.Links.from_flow(*some_flow(2, 6, (8, 8), generator), grid=(2, 3))
    whole.set_links(given)
    part = whole.window(2, 5)
    assert (part.frames, part.clips, part.ids) == (3, 2, [2, 3, 4]) and part.grid_of(24) == (2, 12)
    for grid in ((4, 6), (2, 3)):
        assert same(part.links(grid).tensors(), {n: x[:, 2:4] for n, x in whole.links(grid).tensors().items()})
        inside, all_ = part.trajectories(grid), whole.trajectories(grid)
        assert torch.equal(inside.positions, all_.positions[:, 2:5, 2:5])
        assert torch.equal(inside.valid, all_.valid[:, 2:5, 2:5])
    assert part.table().tolist() == [[0, -1], [1, 0], [2, 1]]  # frame 0 is not here: the frame itself instead
    assert whole.window(0, 3).table().tolist() == [[0, -1], [0, -1], [0, 1]]
    again = part.window(1, 3)
    assert again.ids == [3, 4] and same(again.links((4, 6)).tensors(), {
        n: x[:, 3:4] for n, x in whole.links((4, 6)).tensors().items()})  # fmt: skip
    single = whole.window(5, 6)
    assert single.trajectories((4, 6)).positions.shape == (2, 1, 1, 24, 2)
    assert part._flow["flow_forward"].untyped_storage().data_ptr() == flow[0].untyped_storage().data_ptr()
    with pytest.raises(ValueError, match="with T = 2 rows"):
        zk.VideoContext(*flow, options=zk.SLROptions(frames=zk.previous(6))).window(0, 2)
    for start, stop in ((3, 3), (4, 2), (0, 7), (-1, 2)):
        with pytest.raises(ValueError, match="must be"):
            whole.window(start, stop)


def test_history_of_a_window_is_its_own(generator, search):
    whole = some_context(generator, options=zk.SLROptions(correct=NOW))
    part = whole.window(1, 3)
    (layer,) = layers(1)
    with part.step(0, 1):
        layer(torch.randn(2, 16, 4, 6), part)
    assert part.history() and not whole.history() and whole.progress == 0


def test_pairs_that_are_not_adjacent_have_no_links(generator, search):
    flow = some_flow(1, 4, (16, 24), generator)
    context = zk.VideoContext(*flow, ids=[0, 5, 6, 9], options=zk.SLROptions(frames="first_and_previous", correct=NOW))
    plain = zk.VideoContext(*flow).links((4, 6))
    links = context.links((4, 6))
    for name in ("forward", "backward"):
        assert torch.equal(getattr(links, name)[:, 1], getattr(plain, name)[:, 1])
        assert torch.equal(getattr(links, f"valid_{name}")[:, 1], getattr(plain, f"valid_{name}")[:, 1])
        for pair in (0, 2):
            assert torch.equal(getattr(links, name)[0, pair], sites((4, 6)))
            assert not bool(getattr(links, f"valid_{name}")[:, pair].any())
    assert context.table().tolist() == [[0, -1], [0, 1], [0, 1], [0, 3]]
    trajectories = context.trajectories((4, 6))
    assert bool(trajectories.isolated()[:, [0, 3]].all()) and not bool(trajectories.isolated()[:, 1:3].all())
    (layer,) = layers(1)
    with context.step(0, 1):
        layer(torch.randn(4, 16, 4, 6), context)
    (history,) = context.history().values()
    assert not bool(history.has_forward[:, [0, 2]].any()) and bool(history.has_forward[:, 1].any())


def test_memory_is_the_documented_formula(generator, search):
    B, T, size, grid = 2, 4, (32, 48), (4, 6)
    P, pairs = 24, 2 * 3
    context = some_context(generator, B, T, size, options=zk.SLROptions(correct=NOW, window=1))
    flow = 2 * 8 * pairs * size[0] * size[1]
    assert context.nbytes == {"flow": flow, "links": 0, "trajectories": 0, "history": 0}
    context.links(grid)
    assert context.nbytes["links"] == 18 * pairs * P
    trajectories = context.trajectories(grid)
    chained = 9 * B * T * 3 * P + 4 * T * 3
    assert context.nbytes["trajectories"] == chained
    pair = layers(2)
    x = torch.randn(B * T, 16, *grid, generator=generator)
    context.begin_step(0, 1)
    for layer in pair:
        layer(x, context)
    context.commit()
    assert context.nbytes == {
        "flow": flow, "links": 18 * pairs * P, "trajectories": chained, "history": 2 * 26 * pairs * P,
    }  # fmt: skip
    context.set_links(context.links(grid))
    context.links(grid)
    assert context.nbytes["links"] == 18 * pairs * P  # held twice, counted once
    if zk.build_info()["native"].startswith("yes"):
        trajectories = context.trajectories(grid)
        index = trajectories.inverse(T)
        assert context.nbytes["trajectories"] == chained + sum(t.numel() * t.element_size() for t in index)
    occ = torch.zeros(B, T - 1, *size, dtype=torch.bool)
    whole = zk.VideoContext(*some_flow(B, T, size, generator), occ_forward=occ, occ_backward=occ.clone())
    assert whole.nbytes["flow"] == flow + 2 * pairs * size[0] * size[1]
    assert "B=2, T=4, k=0/1, grids: 4x6; flow 0.1 MB" in repr(context)


def test_to_and_cache_device(generator, search):
    context = some_context(generator, options=zk.SLROptions(correct=NOW))
    (layer,) = layers(1)
    x = torch.randn(4, 16, 4, 6, generator=generator)
    with context.step(0, 1):
        layer(x, context)
    before = snapshot(context)
    assert context.to("cpu") is context and same(snapshot(context), before) and context.device.type == "cpu"
    assert len(context.to("meta").history()) == 1 and context.device.type == "meta"
    assert context.table("meta").device.type == "meta"
    assert {x.device.type for h in context.history().values() for x in h.tensors().values()} == {"meta"}
    assert context.links((4, 6)).forward.device.type == "meta"
    assert context.trajectories((4, 6)).positions.device.type == "meta"

    resting = some_context(generator, cache_device="cpu")
    resting.links((4, 6)), resting.trajectories((4, 6))
    held = resting._links[(4, 6)].forward
    resting.to("meta")
    assert resting._links[(4, 6)].forward is held  # rests where it was told to
    assert resting.links((4, 6)).forward.device.type == "meta"
    assert resting.trajectories((4, 6), "cpu").positions.device.type == "cpu"


def test_features_are_let_go(generator, search):
    """The context keeps links, not what they were found by."""
    context = some_context(generator, options=zk.SLROptions(correct=NOW))
    (layer,) = layers(1)
    with context.step(0, 1):
        layer(torch.randn(4, 16, 4, 6).requires_grad_(), context)
    assert not any(x.requires_grad for h in context.history().values() for x in h.tensors().values())


def test_a_copy_has_a_state_of_its_own(generator, search):
    context = some_context(generator, options=zk.SLROptions(correct=NOW))
    other = copy.deepcopy(context)
    (layer,) = layers(1)
    with other.step(0, 1):
        layer(torch.randn(4, 16, 4, 6), other)
    assert other.history() and not context.history()


def test_examples_of_the_docstrings_run():
    runner = doctest.DocTestRunner()
    for thing in (zk.VideoContext, zk.slr_attention, zk.SLRAttention):
        (test,) = doctest.DocTestFinder(recurse=False).find(thing, globs={"torch": torch, "zsvr_kernels": zk})
        assert test.examples
        runner.run(test)
    assert runner.failures == 0
