"""Patched networks under torch.compile: the patch is in the compiled code, costs no graph break, and is gone after."""

from __future__ import annotations

import copy

import pytest
import torch
from agreement import Network, assert_network_gradients_agree, gradients
from networks import HandWritten, ViT
from test_patching import NETWORKS

import zsvr_kernels as zk
from zsvr_kernels import opaque, testing

DEEP = Network(lambda: HandWritten(depth=10), [*(f"first.{n}" for n in range(10)), "second"], (3, 6, 8))


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


def counted() -> tuple[int, int]:
    """Return how many graphs were compiled and how many breaks there were."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def by_function(network, model):
    return torch.compile(lambda x: network.call(model, x), backend="eager")


def by_module(network, model):
    compiled = torch.compile(model, backend="aot_eager")
    return lambda x: network.call(compiled, x)


def in_place(network, model):
    model.compile(backend="eager")
    return lambda x: network.call(model, x)


def assert_same(got, model, network, context, x):
    """Hold compiled results to the budget: the uncompiled patched network in float64, and in x's dtype."""
    double = copy.deepcopy(getattr(model, "_orig_mod", model)).double()
    double._compiled_call_impl = None
    with zk.patched(double, context):
        oracle = network.call(double, x.double())
    testing.assert_within_budget(got, oracle, uncompiled(network, model, context, x), "compiled")


def uncompiled(network, model, context, x):
    with torch.compiler.set_stance("force_eager"), zk.patched(model, context):
        return network.call(model, x)


@pytest.mark.parametrize(
    ("name", "compiling"),
    [
        ("hand", by_function),
        ("hand", by_module),
        ("hand", in_place),
        ("guided", by_module),
        ("latent", by_module),
        ("timm", by_function),
        ("multihead", in_place),
        ("encoder layer", by_module),
    ],
)
def test_a_model_compiled_before_is_patched_inside_and_itself_after(name, compiling):
    network = NETWORKS[name]
    model, x = network.model(), network.input(4)
    context = network.context(4)
    with torch.no_grad():
        expected = network.call(model, x)
        run = compiling(network, model)
        torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-3)
        with zk.patched(model, context) as report:
            got = run(x)
        assert [layer.calls for layer in report.patched] == [1] * len(network.layers)
        assert_same(got, model, network, context, x)
        assert not torch.allclose(got, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-3)
        once = counted()
        assert once[1] <= (2 if compiling is by_function else 0)  # the two checks around the model's call
        for _ in range(2):  # another clip: the compiled code is good for it
            with zk.patched(model, network.context(4)):
                assert torch.equal(run(x), got)
            torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-3)
        if name != "encoder layer":  # whose fused path is compiled in, so it starts anew
            assert counted() == once


@pytest.mark.parametrize("compiling", [by_function, by_module])
def test_a_model_compiled_inside_is_itself_after(compiling):
    network = NETWORKS["hand"]
    model, x = network.model(), network.input(4)
    with torch.no_grad():
        expected = network.call(model, x)
        with zk.patched(model, network.context(4)):
            run = compiling(network, model)
            got = run(x)
        assert_same(got, model, network, network.context(4), x)
        torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_the_compiled_model_itself_can_be_given():
    network = NETWORKS["hand"]
    model, x = torch.compile(network.model(), backend="eager"), network.input(4)
    with torch.no_grad():
        expected = model(x)
        with zk.patched(model, network.context(4)) as report:
            got = model(x)
            assert [layer.name for layer in report.patched] == network.layers  # without the wrapper's _orig_mod
            model.second.forward = lambda x: x
            with pytest.raises(RuntimeError, match="1 patched layers were replaced after patching: second"):
                model(x)
        del model._orig_mod.second.forward
        torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_a_compiled_part_is_named_without_its_wrapper():
    network = NETWORKS["hand"]
    model, x = network.model(), network.input(4)
    with torch.no_grad():
        with zk.patched(model, network.context(4)):
            expected = model(x)
        model.second = torch.compile(model.second, backend="eager")
        with zk.patched(model, network.context(4)) as report:
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert [layer.name for layer in report.patched] == network.layers
    layer = zk.SLRAttention.from_attention(model.second)
    assert layer.adapter.kind == "PlainAttention" and layer.adapter.module is model.second._orig_mod


@pytest.mark.parametrize("compiling", [by_function, by_module, in_place])
def test_a_replaced_layer_is_noticed_in_compiled_code(compiling):
    network = NETWORKS["hand"]
    model, x = network.model(), network.input(4)
    run = compiling(network, model)
    with torch.no_grad(), zk.patched(model, network.context(4)):
        run(x)
        model.second.forward = lambda x: x
        with pytest.raises(RuntimeError, match="1 patched layers were replaced after patching: second"):
            run(x)


@pytest.mark.parametrize("compiling", [by_function, in_place])
def test_many_layers_and_steps_are_compiled_once(compiling):
    model, x = DEEP.model(), DEEP.input(4)
    context = DEEP.context(4, active=(0.25, 0.75), correct=zk.CorrectionOptions(enabled=False))
    with torch.no_grad(), zk.patched(model, context) as report:
        run = compiling(DEEP, model)
        outputs, compiled = [], []
        for k in range(8):
            with context.step(k, 8):
                outputs.append(run(x))
            compiled.append(counted())
        context.configure(context.options.with_(combine="cross", blend=0.25))
        with context.step(4, 8):
            cross = run(x)
    assert [layer.calls for layer in report.patched] == [9] * 11
    assert set(compiled) == {compiled[0]} == {counted()}
    assert all(torch.equal(out, outputs[0]) for out in (outputs[1], outputs[6], outputs[7]))
    assert all(torch.equal(out, outputs[2]) for out in outputs[3:6])
    assert not torch.allclose(outputs[0], outputs[2], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(cross, outputs[2], rtol=1e-3, atol=1e-3)


def test_a_graph_without_breaks():
    network = NETWORKS["guided"]
    model, x = network.model(), network.input(4)
    with torch.no_grad(), zk.patched(model, network.context(4), verify=False):
        got = torch.compile(lambda x: model(x), backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["hand", "multihead"])
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch._dynamo looks at it
def test_gradients_of_a_compiled_model(name):
    network = NETWORKS[name]
    model, x = network.model(), network.input(4)
    double = copy.deepcopy(model).double()
    with zk.patched(double, network.context(4)):
        oracle = gradients(double, network.call(double, x.double()))
    with zk.patched(model, network.context(4)):
        eager = gradients(model, network.call(model, x))
    compiled = torch.compile(model, backend="aot_eager")
    with zk.patched(model, network.context(4)) as report:
        ours = gradients(model, network.call(compiled, x))
        assert [layer.calls for layer in report.patched] == [1] * len(network.layers)
    assert_network_gradients_agree(ours, oracle, eager)


def test_autocast_in_compiled_code():
    network = NETWORKS["hand"]
    model, x = network.model(), network.input(4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), zk.patched(model, network.context(4)):
        expected = model(x)
        got = torch.compile(model, backend="eager")(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


def test_a_layer_given_a_context_compiles_like_any_module(generator):
    layer = zk.SLRAttention(16, 2, groups=4)
    context, x = NETWORKS["hand"].context(4), torch.randn(4, 16, 6, 8, generator=generator)
    compiled = torch.compile(layer, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, context), layer(x, context))
        for k in range(6):
            with context.step(k, 12):
                compiled(x, context)
            if k == 0:
                first = counted()
        assert counted() == first


def test_the_operation_is_one_to_the_compiler(generator):
    x = torch.randn(2, 5, 8, generator=generator)
    opaque.open_layer(-1, lambda x: x.flip(1).mT.contiguous().mT * 2, 8)
    try:
        torch.library.opcheck(torch.ops.zsvr_layers.run.default, (x, -1), test_utils="test_faketensor")
        torch.library.opcheck(torch.ops.zsvr_layers.run.default, (x, -1), test_utils="test_schema")
        assert torch.equal(opaque.run(x, -1), x.flip(1) * 2)
    finally:
        opaque.close_layer(-1)
    with pytest.raises(RuntimeError, match="ran after the block"):
        opaque.run(x, -1)
    layer = ViT("timm").layers[0]
    assert opaque.number_of(layer) == opaque.number_of(layer) != opaque.number_of(ViT("timm").layers[0])


@pytest.mark.slow
def test_inductor(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = NETWORKS["timm"]
    model, x, context = network.model(), network.input(4), network.context(4)
    compiled = torch.compile(model)
    with torch.no_grad():
        expected = compiled(x)
        with zk.patched(model, context) as report:
            got = compiled(x)
        assert_same(got, model, network, context, x)
        assert not torch.allclose(got, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(compiled(x), expected)
    assert [layer.calls for layer in report.patched] == [1, 1] and counted()[1] == 0
