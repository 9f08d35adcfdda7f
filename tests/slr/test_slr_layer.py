"""SLRAttention as a module: its plain self, inputs, contexts, copies, dtypes, gradients, compilation."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from clips import NOW, some_context, some_flow

import zsvr_kernels as zk
from zsvr_kernels import testing
from zsvr_kernels.plain import PlainAttention

KINDS = {
    "group norm": {"groups": 4},
    "layer norm": {"norm": "layer", "residual": False},
    "no norm": {"norm": None, "qkv_bias": False, "out_bias": False},
    "head dim": {"groups": 2, "head_dim": 24, "eps": 1e-3},
}


def some_layer(**arguments):
    torch.manual_seed(5)
    layer = zk.SLRAttention(16, 2, **{"groups": 4, **arguments})
    for p in layer.parameters():  # norms are not born as the identity
        torch.nn.init.normal_(p, std=0.4)
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 16, 3, 7), (3, 21, 16)], ids=["image", "tokens"])
def test_without_a_context_it_is_the_plain_layer(kind, shape, generator):
    layer = some_layer(**KINDS[kind])
    x = torch.randn(shape, generator=generator)
    assert isinstance(layer.attention, PlainAttention)
    exact = copy.deepcopy(layer.attention).double()(x.double())
    testing.assert_within_budget(layer(x), exact, layer.attention(x), kind)


def test_tokens_and_images_agree_on_grids_that_are_not_square(generator, search):
    layer = some_layer()
    outputs = {}
    for grid in ((3, 7), (7, 3)):
        flow = some_flow(1, 3, (8 * grid[0], 8 * grid[1]), generator)
        x = torch.randn(3, 16, *grid, generator=generator)
        results = []
        for given in (x, x.flatten(2).mT, x.flatten(2).mT.contiguous()):
            context = zk.VideoContext(*flow, options=zk.SLROptions(correct=NOW))
            with context.step(0, 1), torch.no_grad():
                y = layer(given, context)
            results.append(y if given.dim() == 4 else y.mT.reshape(x.shape))
        torch.testing.assert_close(results[0], results[1])
        torch.testing.assert_close(results[0], results[2])
        outputs[grid] = results[0]
        assert not torch.allclose(results[0], layer(x), atol=1e-3)
    tokens = torch.randn(3, 21, 16, generator=generator)
    context = zk.VideoContext(*some_flow(1, 3, (24, 56), generator))
    wide, tall = layer(tokens, context), layer(tokens, context, grid=(7, 3))
    assert torch.equal(wide, layer(tokens, context, grid=(3, 7))) and not torch.equal(wide, tall)


@pytest.mark.parametrize("combine", ["serial", "parallel", "joint", "cross", "trajectory", "spatial"])
def test_with_a_context_it_is_slr_attention_between_its_projections(combine, generator):
    B, T, grid = 2, 3, (4, 6)
    layer = some_layer()
    options = zk.SLROptions(combine=combine, blend=0.3, frames="first_and_previous", window=1)
    context = some_context(generator, B, T, options=options)
    x = torch.randn(2 * B * T, 16, *grid, generator=generator)  # two guidance branches

    def composed(module, x):
        tokens = x.flatten(2).mT
        normed = module.norm(x).flatten(2).mT
        q, k, v = module.qkv(normed).unflatten(-1, (3, 2, 8)).unflatten(0, (2 * B, T)).unbind(3)
        trajectories = zk.chain_links(context.links(grid), window=1)
        y = zk.slr_attention(
            q, k, v, zk.first_and_previous(T), trajectories, combine=combine, blend=0.3, backend="reference"
        )
        return (tokens + module.proj(y.flatten(0, 1).flatten(2))).mT.reshape(x.shape)

    exact = composed(copy.deepcopy(layer.attention).double(), x.double())
    testing.assert_within_budget(layer(x, context), exact, composed(layer.attention, x), combine)


def test_gradients_of_input_and_weights(generator, search):
    layer = some_layer()
    flow = some_flow(1, 3, (32, 48), generator)
    x = torch.randn(3, 16, 4, 6, generator=generator)
    weight = torch.randn(x.shape, generator=generator)

    def gradients(dtype, backend):
        module = copy.deepcopy(layer).to(dtype)
        context = zk.VideoContext(*flow, options=zk.SLROptions(combine="joint", backend=backend))
        leaf = x.to(dtype).requires_grad_()
        y = module(leaf, context)
        names = [name for name, _ in module.named_parameters()]
        found = torch.autograd.grad(y, [leaf, *module.parameters()], weight.to(dtype))
        return dict(zip(("x", *names), found, strict=True))

    ours, exact, plain = (
        gradients(*kind)
        for kind in ((torch.float32, "auto"), (torch.float64, "reference"), (torch.float32, "reference"))
    )
    assert len(ours) == 7
    for name, got in ours.items():
        if name == "attention.qkv.bias":  # a bias of k shifts all logits alike: its gradient is nothing but rounding
            got, exact[name], plain[name] = (torch.cat((g[:16], g[32:])) for g in (got, exact[name], plain[name]))
        testing.assert_within_budget(got, exact[name], plain[name], name, gradient=True)


@pytest.mark.parametrize("combine", ["serial", "parallel", "joint", "cross"])
@pytest.mark.parametrize("frames", ["neighbors", "previous", "first_and_previous", "all_frames"])
def test_one_frame_is_the_layer_without_a_context(frames, combine, generator):
    layer = some_layer()
    x = torch.randn(2, 16, 3, 5, generator=generator)
    flow = torch.zeros(2, 0, 2, 24, 40)
    options = zk.SLROptions(frames=frames, combine=combine, include_self=True)
    for context in (zk.VideoContext(flow, flow, options=options), zk.VideoContext(frames=1, options=options)):
        assert torch.equal(layer(x, context), layer(x))
        assert torch.equal(layer(x.flatten(2).mT, context).mT.reshape(x.shape), layer(x))  # of a grid nobody named


def test_outside_the_active_range_it_is_the_layer_without_a_context(generator, search):
    layer = some_layer()
    x = torch.randn(4, 16, 4, 6, generator=generator)
    context = some_context(generator, options=zk.SLROptions(active=(0.25, 0.75)))
    for k in range(4):
        with context.step(k, 4):
            assert torch.equal(layer(x, context), layer(x)) == (k in (0, 3)), k


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, generator, search):
    layer = some_layer()
    x = torch.randn(3, 16, 4, 6, generator=generator).to(dtype)
    flow = some_flow(1, 3, (32, 48), generator)

    def run(module, x, backend):
        context = zk.VideoContext(*flow, options=zk.SLROptions(correct=NOW, backend=backend))
        with context.step(0, 1), torch.no_grad():
            y = module(x, context)
        assert [h.forward.dtype for h in context.history().values()] == [torch.float32]
        return y

    low = layer.to(dtype)
    got = run(low, x, "auto")
    assert got.dtype == dtype and low.attention.qkv.weight.dtype == dtype
    exact = run(copy.deepcopy(low).double(), x.double(), "reference")
    torch.testing.assert_close(got.double(), exact, rtol=0.05, atol=0.1 * float(exact.abs().max()))


def test_autocast_is_half_precision_inside(generator, search):
    layer = some_layer()
    x = torch.randn(3, 16, 4, 6, generator=generator)
    context = some_context(generator, T=3, options=zk.SLROptions(correct=NOW))
    with torch.autocast("cpu", dtype=torch.bfloat16), context.step(0, 1):
        y = layer(x.requires_grad_(), context)
        y.float().square().sum().backward()
    assert y.dtype == torch.float32  # the residual's
    assert layer.attention.qkv.weight.grad.dtype == torch.float32
    y, plain = y.detach(), layer(x, context).detach()
    assert 0 < float((y - plain).abs().max()) < 0.2 * float(plain.abs().max())


# ---- weights and copies ----


def test_parameters_have_the_plain_layers_names():
    layer = some_layer()
    assert list(layer.state_dict()) == [f"attention.{name}" for name in layer.attention.state_dict()]
    names = ["norm.weight", "norm.bias", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    assert [name for name, _ in layer.named_parameters()] == [f"attention.{name}" for name in names]
    assert layer.training and not layer.eval().attention.training and layer.train().attention.training
    assert "PlainAttention, channels=16, heads=2, head_dim=8, name=" in repr(layer)


def copied_by(how, layer):
    if how == "deepcopy":
        return copy.deepcopy(layer)
    if how == "whole file":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    if how == "deepcopy of a parent":
        return copy.deepcopy(torch.nn.Sequential(layer))[0]
    other = zk.SLRAttention(16, 2, groups=4)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize("how", ["deepcopy", "deepcopy of a parent", "whole file", "state dict"])
def test_a_copy_computes_with_its_own_weights(how, generator, search):
    layer = some_layer()
    x = torch.randn(4, 16, 4, 6, generator=generator)
    context = some_context(generator)
    before = layer(x, context)
    other = copied_by(how, layer)
    assert torch.equal(other(x, context), before)
    assert other.adapter.module is other.attention and other.adapter.module is not layer.attention
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert torch.equal(layer(x, context), before) and not torch.equal(other(x, context), before)
    other(x, context).sum().backward()
    assert all(p.grad is None for p in layer.parameters()) and all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize("how", ["deepcopy", "deepcopy of a parent", "whole file", "state dict"])
def test_a_copy_keeps_a_history_of_its_own(how, generator, search):
    layer = some_layer()
    pair = [layer, copied_by(how, layer), copied_by(how, layer)]
    x = torch.randn(4, 16, 4, 6, generator=generator)
    context = some_context(generator, options=zk.SLROptions(correct=NOW))
    with context.step(0, 1):
        for each in pair:
            each(x, context)
    assert len(context.history()) == 3
    assert copy.deepcopy(some_layer(name="mid")).name == "mid"


def test_an_attention_put_in_its_place_is_used(generator):
    layer = some_layer()
    x = torch.randn(3, 16, 3, 5, generator=generator)
    other = PlainAttention(16, 4, groups=2)
    layer.attention = other
    assert torch.allclose(layer(x), other(x), atol=1e-6) and layer.adapter.heads == 4
    replica = layer._replicate_for_data_parallel()  # what DataParallel makes of a module for each device
    replica.attention = copy.deepcopy(other)
    assert replica.adapter.module is replica.attention and layer.adapter.module is other


def test_from_attention_shares_weights(generator):
    plain = PlainAttention(16, 2, groups=4)
    layer = zk.SLRAttention.from_attention(plain, name="first")
    assert layer.name == "first" and all(a is b for a, b in zip(layer.parameters(), plain.parameters(), strict=True))
    x = torch.randn(2, 16, 3, 3, generator=generator)
    assert torch.allclose(layer(x), plain(x), atol=1e-6)
    with pytest.raises(TypeError, match="Linear is not an attention this package knows: PlainAttention"):
        zk.SLRAttention.from_attention(torch.nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        zk.SLRAttention.from_attention("attn1")
    with pytest.raises(ValueError, match="qkv_order is for"):
        zk.SLRAttention.from_attention(plain, qkv_order="new")


# ---- compilation, errors ----


def test_compiled_without_a_context_it_is_one_graph(generator):
    layer = some_layer()
    x = torch.randn(3, 16, 3, 5, generator=generator)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


# torch.compile looks at .grad of what crosses a graph break, and hides the warning only where it is no error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_with_a_context_it_asks_it_at_every_call(generator, search):
    layer = some_layer()
    x = torch.randn(3, 16, 4, 6, generator=generator)
    flow = some_flow(1, 3, (32, 48), generator)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager")
    contexts = [zk.VideoContext(*flow, options=zk.SLROptions(correct=NOW, active=(0.0, 0.6))) for _ in range(2)]
    for k in range(3):
        outputs = []
        for module, context in zip((layer, compiled), contexts, strict=True):
            with context.step(k, 3):
                leaf = x.clone().requires_grad_()
                y = module(leaf, context)
                y.square().sum().backward()
            outputs.append((y.detach(), leaf.grad))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    a, b = (c.history() for c in contexts)
    assert len(a) == 1
    for key, history in a.items():
        assert torch.equal(history.forward, b[key].forward)


def test_errors(generator):
    layer = some_layer()
    context = some_context(generator, B=2, T=3)
    cases = [
        (ValueError, "x must have 3 axes", torch.zeros(6, 16), {}),
        (TypeError, r"x must be a torch.Tensor", [1.0], {}),
        (ValueError, "7 frames is not a whole number of clips of T = 3", torch.zeros(7, 16, 4, 6), {}),
        (ValueError, "0 frames is not a whole number", torch.zeros(0, 16, 4, 6), {}),
        (ValueError, "9 frames holds 3 clips of T = 3, which is no multiple of the context's B = 2",
         torch.zeros(9, 16, 4, 6), {}),
        (ValueError, "no token grid has 23 sites", torch.zeros(6, 23, 16), {}),
        (ValueError, "grid 5x5 has 25 sites, but x has 24 tokens", torch.zeros(6, 24, 16), {"grid": (5, 5)}),
        (ValueError, r"grid is \(6, 4\), but x has shape", torch.zeros(6, 16, 4, 6), {"grid": [6, 4]}),
        (TypeError, "grid must be two ints", torch.zeros(6, 24, 16), {"grid": 24}),
    ]  # fmt: skip
    for error, message, x, keywords in cases:
        with pytest.raises(error, match=message):
            layer(x, context, **keywords)
    with pytest.raises(TypeError, match=r"context must be zsvr_kernels.VideoContext or None, got tuple"):
        layer(torch.zeros(6, 16, 4, 6), (4, 6))
    assert torch.equal(layer(torch.ones(6, 16, 4, 6), context, grid=[4, 6]), layer(torch.ones(6, 16, 4, 6), context))
    assert layer(torch.zeros(0, 16, 4, 6)).shape == (0, 16, 4, 6)
    for arguments, error, message in (
        ({"channels": 16, "num_heads": 3}, ValueError, "no multiple of num_heads = 3"),
        ({"channels": 0, "num_heads": 1}, ValueError, "channels must be at least 1"),
        ({"channels": 16, "num_heads": 2, "groups": 3}, ValueError, "no multiple of groups = 3"),
        ({"channels": 16, "num_heads": 2, "norm": "batch"}, ValueError, "norm must be one of group, layer"),
        ({"channels": 16, "num_heads": 2, "groups": 4, "prefix": -1}, ValueError, "prefix must be at least 0"),
    ):
        with pytest.raises(error, match=message):
            zk.SLRAttention(**arguments)
