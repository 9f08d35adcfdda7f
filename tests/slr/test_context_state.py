"""The state machine of VideoContext: steps, pending and committed history, layers, branches, clips, checkpointing."""

from __future__ import annotations

import pytest
import torch
from clips import NOW, layers, same, snapshot, some_context, some_flow
from torch.utils.checkpoint import checkpoint

import zsvr_kernels as zk


def test_a_forward_reads_committed_history_only(generator, search):
    context = some_context(generator, options=zk.SLROptions(correct=NOW))
    x = [torch.randn(4, 16, 4, 6, generator=generator) for _ in range(2)]
    (layer,) = layers(1)
    with torch.no_grad():
        context.begin_step(0, 2)
        first = layer(x[0], context)
        assert context.history() == {}
        assert torch.equal(layer(x[0], context), first)
        context.commit()
        assert list(context.history()) == ["layer0/4x6"]
        after_one = snapshot(context)
        context.begin_step(1, 2)
        second = layer(x[1], context)
        layer(x[0], context)  # overwrites what was pending
        assert torch.equal(layer(x[1], context), second)
        assert same(snapshot(context), after_one)
        context.begin_step(1, 2)  # time travel: the step begins again, and what was pending is gone
        context.commit()
        assert same(snapshot(context), after_one)
        with context.step(1, 2):
            assert torch.equal(layer(x[1], context), second)
        assert not same(snapshot(context), after_one)
        context.reset()
        assert context.history() == {} and context.progress == 0


def test_history_reaches_the_next_step(generator, search):
    """With the same features, a second step around the first one's links must go further than a single one."""
    options = zk.SLROptions(correct=zk.CorrectionOptions(similarity_start=0.0, radius=1))
    x = [torch.randn(4, 16, 4, 6, generator=generator) for _ in range(2)]
    flow = some_flow(1, 4, (32, 48), generator)
    (layer,) = layers(1)
    outputs = []
    for warm in (False, True):
        context = zk.VideoContext(*flow, options=options)
        with torch.no_grad():
            if warm:
                with context.step(0, 2):
                    layer(x[0], context)
            with context.step(1, 2):
                outputs.append(layer(x[1], context))
    assert not torch.equal(*outputs)


def test_an_exception_drops_what_was_pending(generator, search):
    context = some_context(generator, options=zk.SLROptions(correct=NOW))
    (layer,) = layers(1)
    x = torch.randn(4, 16, 4, 6, generator=generator)
    with pytest.raises(KeyError), context.step(0, 2):
        layer(x, context)
        raise KeyError
    assert context.history() == {} and not context.uses_features()
    context.commit()
    assert context.history() == {}


def test_outside_steps_and_before_admission_nothing_is_corrected(counter, generator, search):
    context = some_context(generator)
    (layer,) = layers(1)
    x = torch.randn(4, 16, 4, 6, generator=generator)
    with torch.no_grad():
        outside = layer(x, context)
        with context.step(4, 10):
            assert not context.uses_features()
            assert torch.equal(layer(x, context), outside)
        assert counter.take()[2] == 0 and context.history() == {}
        with context.step(5, 10):
            assert context.uses_features()
            assert not torch.equal(layer(x, context), outside)
        assert counter.take()[2] == 1
        context.configure(context.options.with_(correct_similarity=False, correct_history=False))
        with context.step(5, 10):
            assert not context.uses_features() and torch.equal(layer(x, context), outside)


@pytest.mark.parametrize("scope", ["layer", "grid"])
def test_several_layers(scope, counter, generator, search):
    context = some_context(generator, options=zk.SLROptions(correct=zk.CorrectionOptions(
        similarity_start=0.0, history_scope=scope)))  # fmt: skip
    first, second = layers(2)
    small = torch.randn(4, 16, 4, 6, generator=generator)
    large = torch.randn(4, 16, 8, 12, generator=generator)
    with context.step(0, 1), torch.no_grad():
        outputs = [first(small, context), second(small, context), first(large, context)]
        corrected = [context.corrected(n, (4, 6), torch.randn(1, 4, 24, 16)) for n in ("layer0", "layer1")]
    if scope == "layer":
        assert list(context.history()) == ["layer0/4x6", "layer1/4x6", "layer0/8x12"]
        assert counter.take()[2] == 5
        assert not torch.equal(corrected[0].positions, corrected[1].positions)
    else:
        assert list(context.history()) == ["4x6", "8x12"]
        assert counter.take()[2] == 3  # the second layer of a grid takes what the first one found
        assert corrected[0] is corrected[1]
    assert all(y.shape == x.shape for x, y in zip((small, small, large), outputs, strict=True))
    with context.step(0, 1), torch.no_grad():
        second(small, context)
    assert counter.take()[2] == 1  # the next step has a first layer of its own


@pytest.mark.parametrize("scope", ["layer", "grid"])
def test_checkpointing_gives_the_same_gradients_and_history(scope, generator, search):
    options = zk.SLROptions(correct=zk.CorrectionOptions(similarity_start=0.0, history_scope=scope))
    flow = some_flow(1, 4, (32, 48), generator)
    inputs = [torch.randn(4, 16, 4, 6, generator=generator) for _ in range(2)]
    results = []
    for is_checkpointed in (False, True):
        context = zk.VideoContext(*flow, options=options)
        pair = layers(2)
        gradients = []
        for k, x in enumerate(inputs):
            y = x = x.clone().requires_grad_()
            with context.step(k, 2):
                for layer in pair:
                    y = checkpoint(layer, y, context, use_reentrant=False) if is_checkpointed else layer(y, context)
                y.square().sum().backward()
            gradients.append(x.grad)
        weights = {f"{n}.{name}": p.grad for n, layer in enumerate(pair) for name, p in layer.named_parameters()}
        results.append({"x0": gradients[0], "x1": gradients[1], **weights, **snapshot(context)})
    assert len(results[0]) == 2 + 12 + (12 if scope == "layer" else 6)
    assert same(*results)


@pytest.mark.parametrize("feature", ["tokens", "keys"])
@pytest.mark.parametrize(("conditional", "branch"), [(-1, 2), (0, 0), (1, 1)])
def test_links_are_corrected_by_the_conditional_branch(conditional, branch, feature, generator, search):
    B, T, G = 2, 3, 3
    options = zk.SLROptions(
        correct=zk.CorrectionOptions(similarity_start=0.0, feature=feature), conditional=conditional
    )
    flow = some_flow(B, T, (16, 24), generator)
    x = torch.randn(G * B * T, 16, 4, 6, generator=generator)
    (layer,) = layers(1)
    histories, outputs = [], []
    for batch, which in ((x, conditional), (x.unflatten(0, (G, B * T))[branch], -1)):
        context = zk.VideoContext(*flow, options=options.with_(conditional=which))
        with context.step(0, 1), torch.no_grad():
            outputs.append(layer(batch, context))
        histories.append(snapshot(context))
    assert same(*histories) and histories[0]["layer0/4x6.forward"].shape == (B, T - 1, 24, 2)
    torch.testing.assert_close(outputs[0].unflatten(0, (G, B * T))[branch], outputs[1])
    context.configure(options.with_(conditional=3))
    with pytest.raises(ValueError, match="conditional = 3, but the batch has 3 branches"), context.step(0, 1):
        layer(x, context)


def test_clips_do_not_mix(generator, search):
    B, T = 2, 3
    options = zk.SLROptions(correct=NOW)
    forward, backward = some_flow(B, T, (16, 24), generator)
    x = torch.randn(B * T, 16, 4, 6, generator=generator)
    (layer,) = layers(1)
    both = zk.VideoContext(forward, backward, options=options)
    with both.step(0, 1), torch.no_grad():
        together = layer(x, both)
    for b in range(B):
        one = zk.VideoContext(forward[b : b + 1], backward[b : b + 1], options=options)
        with one.step(0, 1), torch.no_grad():
            torch.testing.assert_close(layer(x[b * T : (b + 1) * T], one), together[b * T : (b + 1) * T])
        expected = {name: v[b : b + 1] for name, v in snapshot(both).items()}
        assert same({k: v for k, v in snapshot(one).items() if "score" not in k},
                    {k: v for k, v in expected.items() if "score" not in k})  # fmt: skip
