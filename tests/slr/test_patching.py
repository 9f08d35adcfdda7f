"""patched(): which layers it takes, that each then runs SLR attention, and that nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import (
    Network,
    assert_at_rest,
    assert_layers_are_slr,
    assert_network_gradients_agree,
    assert_one_frame_changes_nothing,
    flows,
    gradients,
    rest,
)
from networks import (
    GuidedUNet,
    HandWritten,
    LatentNet,
    ViT,
    ViTAttention,
)
from torch import nn

import zsvr_kernels as zk
from zsvr_kernels import _native
from zsvr_kernels.plain import PlainAttention

GUIDED = ["input_blocks.1.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"]
NETWORKS = {
    "guided": Network(GuidedUNet, GUIDED),
    "guided checkpointing": Network(lambda: GuidedUNet(use_checkpoint=True), GUIDED),
    "latent": Network(LatentNet, ["block.attn1", "deep.attn1"], (4, 6, 8), first_grid=(6, 8)),
    "timm": Network(lambda: ViT("timm"), ["layers.0", "layers.1"], options={"prefix": 1}),
    "multihead": Network(lambda: ViT("multihead"), ["layers.0", "layers.1"], options={"prefix": 1}),
    "sequence first": Network(lambda: ViT("sequence first"), ["layers.0", "layers.1"], options={"prefix": 1}),
    "encoder layer": Network(
        lambda: ViT("encoder layer"), ["layers.0.self_attn", "layers.1.self_attn"], options={"prefix": 1}
    ),
    "hand": Network(HandWritten, ["first.0", "second"], (3, 6, 8), first_grid=(6, 8)),
}
every_network = pytest.mark.parametrize("name", list(NETWORKS))
hand = NETWORKS["hand"]


def hand_context(frames: int = 4, **options) -> zk.VideoContext:
    return hand.context(frames, **options)


# ---- what happens to the layers ----


@every_network
def test_one_frame_changes_nothing(name):
    combines = ("serial", "parallel", "joint", "cross") if name in ("hand", "timm") else ()
    assert_one_frame_changes_nothing(NETWORKS[name], *combines)


@pytest.mark.parametrize(
    ("name", "combine"), [*((name, "serial") for name in NETWORKS), ("hand", "parallel"), ("timm", "joint")]
)
def test_every_layer_runs_slr_attention(name, combine):
    network = NETWORKS[name]
    context = network.context(8, combine=combine)
    report = assert_layers_are_slr(network, context, network.input(8))
    assert not report.patched[0].note and report.patched[0].grid == network.first_grid


def test_two_clips_and_guidance_branches_do_not_mix():
    model, context = hand.model(), hand_context(4, B=2)
    x = hand.input(2 * 2 * 4)  # 2 branches, 2 clips, 4 frames
    with torch.no_grad(), zk.patched(model, context):
        whole = model(x)
        other = model(torch.cat((torch.randn_like(x[:8]), x[8:])))
    assert torch.equal(other[8:], whole[8:]) and not torch.equal(other[:8], whole[:8])
    for clip in range(2):  # each clip has its own flow, in every branch
        alone = zk.VideoContext(*(flow[clip : clip + 1] for flow in flows(4, 2, (6, 8))))
        with torch.no_grad(), zk.patched(model, alone):
            for branch in range(2):
                rows = slice(8 * branch + 4 * clip, 8 * branch + 4 * clip + 4)
                torch.testing.assert_close(model(x[rows]), whole[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["hand", "guided", "multihead", "sequence first"])
def test_a_batch_that_is_no_whole_number_of_clips_is_refused(name):
    network = NETWORKS[name]
    model = network.model()
    with zk.patched(model, network.context(4)):
        with pytest.raises(ValueError, match=r"a batch of 6 frames is not a whole number of clips of T = 4 frames"):
            network.call(model, network.input(6))
        with torch.no_grad():
            network.call(model, network.input(4))  # what failed before does not count as the first call


@pytest.mark.parametrize("name", ["guided", "guided checkpointing", "latent", "timm", "multihead"])
def test_gradients_of_a_patched_network_are_those_of_the_network_where_frames_do_not_meet(name):
    network = NETWORKS[name]
    model, x = network.model(), network.input(2)
    double = network.model().double()
    oracle, eager = gradients(double, network.call(double, x.double())), gradients(model, network.call(model, x))
    with zk.patched(model, network.context(1)):
        ours = gradients(model, network.call(model, x))
    assert_network_gradients_agree(ours, oracle, eager)


def test_own_checkpointing_gives_the_gradients_of_none():
    x = NETWORKS["guided"].input(4)
    found = []
    for name in ("guided", "guided checkpointing"):
        model = NETWORKS[name].model()
        with zk.patched(model, NETWORKS[name].context(4)) as report:
            found.append(gradients(model, model(x)))
        calls = [layer.calls for layer in report.patched]
        assert calls == [2 if "checkpointing" in name else 1] * 4  # the block's own recomputation runs the patch
    assert found[0].keys() == found[1].keys()
    for name, g in found[0].items():
        torch.testing.assert_close(found[1][name], g, rtol=1e-5, atol=1e-5, msg=name)


def test_the_fused_path_of_torchs_encoder_layer_is_kept_off_and_comes_back():
    network = NETWORKS["encoder layer"]
    model, x = network.model(), network.input(4)
    fused = []
    fast = torch._transformer_encoder_layer_fwd
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a, **k: fused.append(1) or fast(*a, **k))
        model(x)
        assert len(fused) == 2  # without the patch torch reads the attention's weights and never calls it
        with zk.patched(model, network.context(4)) as report:
            model(x)
        assert len(fused) == 2 and [layer.calls for layer in report.patched] == [1, 1]
        model(x)
        assert len(fused) == 4


# ---- which layers ----


def names(report: zk.PatchReport) -> list[str]:
    return [layer.name for layer in report.patched]


def test_layers_are_chosen_by_pattern_stage_size_and_predicate():
    network = NETWORKS["guided"]
    model, x = network.model(), network.input(4)

    def taken(**options) -> list[str]:
        with torch.no_grad(), zk.patched(model, network.context(4, **options)) as report:
            model(x)
        return [layer.name for layer in report.patched if layer.note is None]

    assert taken() == GUIDED
    assert taken(layers=["output_blocks.*"]) == GUIDED[2:]
    assert taken(layers=["*.1.1", "middle_block.?"]) == [GUIDED[0], GUIDED[1], GUIDED[3]]
    assert taken(stages=["down"]) == GUIDED[:1]
    assert taken(stages=["mid", "up"]) == GUIDED[1:]
    assert taken(min_tokens=25) == [GUIDED[0], GUIDED[3]]  # 8x12 sites; the others have 4x6
    assert taken(max_tokens=24) == GUIDED[1:3]
    seen = []
    assert taken(layers=lambda name, grid: seen.append((name, grid)) or grid == (4, 6)) == GUIDED[1:3]
    assert sorted(set(seen)) == sorted(zip(GUIDED, [(8, 12), (4, 6), (4, 6), (8, 12)], strict=True))


def test_layers_left_alone_give_what_they_gave():
    network = NETWORKS["timm"]
    model, x = network.model(), network.input(4)
    with torch.no_grad():
        expected = model(x)
        for options in ({"max_tokens": 95}, {"min_tokens": 97}, {"layers": lambda name, grid: grid != (8, 12)}):
            with zk.patched(model, network.context(4, **options)) as report:
                assert torch.equal(model(x), expected), options
            assert all(layer.note for layer in report.patched)
        with zk.patched(model, network.context(4, min_tokens=96, max_tokens=96)):
            assert not torch.equal(model(x), expected)


def test_outside_the_active_range_the_network_is_bit_equal_to_itself():
    model, x = hand.model(), hand.input(4)
    context = hand_context(4, active=(0.25, 0.75), correct=zk.CorrectionOptions(enabled=False))
    with torch.no_grad():
        expected = model(x)
        with zk.patched(model, context) as report:
            for k in range(4):
                with context.step(k, 4):
                    same = torch.equal(model(x), expected)
                assert same == (k not in (1, 2)), k
                assert bool(report.patched[0].note) == same
        assert "progress 0.75 is outside active = (0.25, 0.75)" in str(report)


def test_tokens_need_a_grid_only_where_something_depends_on_it():
    network = NETWORKS["multihead"]
    model, x = network.model(), network.input(4)
    unknown = {"size": (5, 7)}
    flow = flows(4, 1, (16, 24))
    with torch.no_grad():
        expected = model(x)
        for options in ({"combine": "cross"}, {"combine": "spatial"}, {"active": (0.5, 1.0)}, {"max_tokens": 9}):
            context = zk.VideoContext(*flow, options=zk.SLROptions(prefix=1, **options), **unknown)
            with zk.patched(model, context) as report:
                is_same = torch.allclose(model(x), expected, rtol=1e-3, atol=1e-3)
                assert is_same == (options != {"combine": "cross"})
            assert report.patched[0].grid is None
        for options in ({}, {"combine": "cross", "layers": lambda name, grid: True}):
            context = zk.VideoContext(*flow, options=zk.SLROptions(prefix=1, **options), **unknown)
            with zk.patched(model, context), pytest.raises(ValueError, match="no token grid has 96 sites; tried 5x7"):
                model(x)
        named = zk.VideoContext(*flow, options=zk.SLROptions(prefix=1), grids=[(8, 12)], **unknown)
        with zk.patched(model, named) as report:
            model(x)
        assert report.patched[0].grid == (8, 12)


def test_options_given_to_the_block_hold_for_the_block():
    model, x, context = hand.model(), hand.input(4), hand_context(4)
    with torch.no_grad():
        with zk.patched(model, hand_context(4, combine="cross")):
            cross = model(x)
        with zk.patched(model, context, zk.SLROptions(combine="cross")):
            assert context.options.combine == "cross"
            assert torch.equal(model(x), cross)
        assert context.options.combine == "serial"
        with pytest.raises(KeyError), zk.patched(model, context, zk.SLROptions(combine="cross")):
            raise KeyError
        assert context.options.combine == "serial"


# ---- in and out ----


@every_network
def test_an_exception_leaves_nothing_behind(name):
    network = NETWORKS[name]
    model = network.model()
    before = rest(model)
    with pytest.raises(KeyError), zk.patched(model, network.context(4)):
        with pytest.raises(AssertionError):
            assert_at_rest(model, before)
        raise KeyError
    assert_at_rest(model, before)
    with torch.no_grad(), zk.patched(model, network.context(4)):
        network.call(model, network.input(4))
    assert_at_rest(model, before)


@pytest.mark.parametrize("order", ["hooked before", "hooked inside", "unhooked inside"])
@pytest.mark.parametrize("name", ["guided checkpointing", "multihead", "hand"])
def test_hooks_of_accelerate_stay_above_the_patch(name, order):
    hooks = pytest.importorskip("accelerate.hooks")

    class Seen(hooks.ModelHook):
        count = 0

        def pre_forward(self, module, *args, **kwargs):
            Seen.count += 1
            return args, kwargs

    network = NETWORKS[name]
    model, x = network.model(), network.input(4)
    layers = [model.get_submodule(layer) for layer in network.layers]

    def hook() -> None:
        for layer in layers:
            hooks.add_hook_to_module(layer, Seen())

    def unhook() -> None:
        for layer in layers:
            hooks.remove_hook_from_module(layer)

    with torch.no_grad():
        plain = network.call(model, x)
        with zk.patched(model, network.context(4)):
            expected = network.call(model, x)
        if order != "hooked inside":
            hook()
        with zk.patched(model, network.context(4)) as report:
            if order == "hooked inside":
                hook()
            assert torch.equal(network.call(model, x), expected) and Seen.count == len(layers)
            report.verify()
            if order == "unhooked inside":
                unhook()
            assert torch.equal(network.call(model, x), expected)
        torch.testing.assert_close(network.call(model, x), plain, rtol=1e-4, atol=1e-4)
        if order != "unhooked inside":
            assert Seen.count == 3 * len(layers)
            unhook()
        torch.testing.assert_close(network.call(model, x), plain, rtol=1e-4, atol=1e-4)


def test_patching_what_is_patched_raises_and_leaves_the_first_alone():
    model, x = hand.model(), hand.input(4)
    with torch.no_grad(), zk.patched(model, hand_context(4)):
        expected = model(x)
        with (
            pytest.raises(RuntimeError, match=r"first.0 is patched already: leave the first"),
            zk.patched(model, hand_context(4, combine="cross")),
        ):
            pass
        with (
            pytest.raises(RuntimeError, match="the model is patched already"),
            zk.patched(model.second, hand_context(4)),
        ):
            pass
        assert torch.equal(model(x), expected)
    with zk.patched(model.second, hand_context(4)), zk.patched(model.first, hand_context(4)):
        pass


def test_nothing_to_patch_says_what_was_looked_at():
    with (
        pytest.raises(RuntimeError, match="looked through Sequential and found no attention of a known structure"),
        zk.patched(nn.Sequential(nn.Linear(2, 2)), hand_context(4)),
    ):
        pass
    model = NETWORKS["latent"].model()
    with (
        pytest.raises(RuntimeError, match="nothing to patch: looked through LatentNet") as error,
        zk.patched(model, NETWORKS["latent"].context(4, layers=["no such layer"])),
    ):
        pass
    assert "block.attn1" in str(error.value) and "its name matches none of ['no such layer']" in str(error.value)
    assert "its keys come from 24 channels, its queries from 32" in str(error.value)
    assert "0 of 4 attention layers patched" in str(error.value)


def test_the_expected_count_is_held():
    model = NETWORKS["guided"].model()
    before = rest(model)
    with (
        pytest.raises(RuntimeError, match="expected 16 layers to patch, found 4\n"),
        zk.patched(model, NETWORKS["guided"].context(4), expected_count=16),
    ):
        pass
    assert_at_rest(model, before)


def test_wrong_arguments_are_named():
    with (
        pytest.raises(TypeError, match=r"model must be a torch.nn.Module or a pipeline with a unet, got str"),
        zk.patched("unet", hand_context(4)),
    ):
        pass
    eight: Any = 8
    with pytest.raises(TypeError, match=r"context must be zsvr_kernels.Video"), zk.patched(hand.model(), eight):
        pass

    class Pipeline:
        unet = hand.model()

    with zk.patched(Pipeline(), hand_context(4)) as report:
        assert names(report) == hand.layers


def test_the_order_of_qkv_can_be_said():
    network = NETWORKS["guided"]
    model, x = network.model(), network.input(4)
    with torch.no_grad():
        outputs = []
        for order in (None, "legacy", "new"):
            with zk.patched(model, network.context(4), qkv_order=order):
                outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


# ---- the report ----


def test_the_report_is_a_table_of_what_was_found():
    network = NETWORKS["latent"]
    model = network.model()
    with torch.no_grad(), zk.patched(model, network.context(4, layers=["deep.*"])) as report:
        model_lines = str(report).splitlines()
        why = "its name matches none of ['deep.*']"
        assert model_lines[1].split() == f"block.attn1 LDM CrossAttention - - - - no: {why}".split()
        assert model_lines[3].split() == ["deep.attn1", "LDM", "CrossAttention", "-", "2", "16", "-", "yes"]
        model(network.input(4))
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "structure", "grid", "heads", "head", "dim", "backend", "patched"]
    assert len({line.index("LDM") for line in lines[1:-1]}) == 1
    backend = "cpu" if _native.is_available() else "sdpa/reference"
    assert lines[3].split() == f"deep.attn1 LDM CrossAttention 3x4 2 16 {backend} yes".split()
    assert "no: its keys come from 24 channels, its queries from 32" in lines[2] and "block.attn2" in lines[2]
    assert lines[-1] == "1 of 4 attention layers patched"
    assert [x.name for x in report.skipped] == ["block.attn1", "block.attn2", "deep.attn2"]
    assert names(report) == ["deep.attn1"] and report.patched[0].calls == 1


def test_a_layer_that_is_slr_attention_already_is_named_and_left():
    model = nn.Sequential(zk.SLRAttention(16, 2, groups=4), PlainAttention(16, 2, groups=4))
    with zk.patched(model, hand_context(4)) as report:
        pass
    assert names(report) == ["1"] and "it is SLR attention: hand it the context" in str(report)


# ---- what bypasses the patch ----


class Odd(nn.Module):
    """Runs its attention ``times`` times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.attention = times, PlainAttention(16, 2, groups=4)

    def forward(self, x):
        for _ in range(self.times):
            x = self.attention(x)
        return x


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_that_runs_never_or_twice_is_an_error_unless_it_is_meant_to(times):
    model, x = Odd(times), torch.randn(4, 16, 6, 8, generator=torch.Generator().manual_seed(0))
    with (
        zk.patched(model, hand_context(4)),
        pytest.raises(RuntimeError, match=rf"did not run exactly once .*: attention \({times}\)"),
    ):
        model(x)
    with zk.patched(model, hand_context(4), verify=False) as report:
        model(x)
        assert report.patched[0].calls == times


def test_a_replaced_forward_is_noticed_before_anything_runs():
    model, x = hand.model(), hand.input(4)
    ran = []
    with torch.no_grad(), zk.patched(model, hand_context(4)) as report:
        model(x)
        report.verify()
        model.second.forward = lambda x: x
        model.inlet.register_forward_pre_hook(lambda *_: ran.append(1))
        with pytest.raises(RuntimeError, match="1 patched layers were replaced after patching: second"):
            model(x)
        assert not ran
        with pytest.raises(RuntimeError, match="replaced after patching"):
            report.verify()
    assert model.second.forward(1) == 1  # what somebody else has put there stays


def test_masks_and_other_arguments_are_refused():
    context = zk.VideoContext(*flows(4, size=(6, 8)))
    x = torch.randn(4, 48, 32, generator=torch.Generator().manual_seed(0))
    for module, keywords in (
        (LatentNet().block.attn1, {"mask": torch.ones(4, 48, dtype=torch.bool)}),
        (ViTAttention(32), {"attn_mask": torch.zeros(48, 48)}),
    ):
        with zk.patched(module, context), pytest.raises(ValueError, match="takes the input alone: leave out masks"):
            module(x, **keywords)
    multihead = nn.MultiheadAttention(32, 4, batch_first=True)
    with zk.patched(multihead, context):
        for keywords in (
            {"attn_mask": torch.zeros(48, 48)},
            {"key_padding_mask": torch.zeros(4, 48, dtype=torch.bool)},
            {"is_causal": True},
        ):
            with pytest.raises(ValueError, match="takes the input alone: leave out masks"):
                multihead(x, x, x, **keywords)
        frame = x[0]
        with pytest.raises(ValueError, match="must get a batch of frames, got shape"):
            multihead(frame, frame, frame)


def test_cross_attention_at_run_time_goes_to_the_original():
    context = zk.VideoContext(*flows(4, size=(6, 8)))
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(4, 48, 32, generator=g), torch.randn(4, 5, 32, generator=g)
    latent, multihead = LatentNet().block.attn1, nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        expected = latent(x, context=text), multihead(x, text, text)[0], multihead(x, x, x.flip(0))[0]
        with zk.patched(latent, context) as report, zk.patched(multihead, context) as other:
            assert torch.equal(latent(x, context=text), expected[0])
            assert torch.equal(multihead(x, text, text)[0], expected[1])
            assert torch.equal(multihead(x, x, x.flip(0))[0], expected[2])
            assert report.patched[0].note == other.patched[0].note == "called as cross-attention"
            latent(x, context=x)
            assert report.patched[0].note is None
