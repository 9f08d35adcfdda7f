"""diffusers: its Attention in all its settings, its U-Nets, and what its other switches do to a patch."""

from __future__ import annotations

import copy

import pytest
import torch
from agreement import (
    Case,
    Network,
    assert_at_rest,
    assert_equals_original,
    assert_gradients_agree,
    assert_layers_are_slr,
    assert_network_gradients_agree,
    assert_one_frame_changes_nothing,
    assert_shares_weights,
    compose,
    flows,
    gradients,
    recorded,
    rest,
)
from networks import adm, stable_diffusion
from torch import nn

import zsvr_kernels as zk
from zsvr_kernels import testing

pytest.importorskip("diffusers")

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor2_0,
    FusedAttnProcessor2_0,
)

MAP, TOKENS = (32, 3, 5), (15, 32)


def make(**settings):
    processor = settings.pop("processor", None)
    defaults = {"heads": 2, "dim_head": 16, "bias": True}

    def build() -> Attention:
        layer = Attention(32, **{**defaults, **settings})
        if processor is not None:
            layer.set_processor(processor())
        return layer

    return build


def fused(fuse: bool = True, **settings):
    class Fusing(Attention):
        """Fuses when it is moved to its dtype, after the test has set its weights."""

        def to(self, *args, **kwargs):
            result = super().to(*args, **kwargs)
            self.fuse_projections(fuse)
            return result

    def build() -> Attention:
        layer = Fusing(32, heads=2, dim_head=16, **settings)
        layer.set_processor(FusedAttnProcessor2_0())
        return layer

    return build


def in_double(module: Attention) -> None:
    module.upcast_attention = module.upcast_softmax = False  # to float32, which would be a step down


UNET = {"norm_num_groups": 8, "residual_connection": True, "eps": 1e-5}
CASES = {
    "unet": Case(make(**UNET), MAP),
    "unet rescaled": Case(make(**UNET, rescale_output_factor=1.7), MAP),
    "unet one head": Case(make(**UNET, heads=1, dim_head=32), MAP),
    "upcast attention": Case(make(**UNET, upcast_attention=True, processor=AttnProcessor), MAP, as_oracle=in_double),
    "upcast softmax": Case(make(**UNET, upcast_softmax=True, processor=AttnProcessor), MAP, as_oracle=in_double),
    "unscaled": Case(make(scale_qk=False), TOKENS),
    "attn1": Case(make(bias=False, dim_head=8), TOKENS),
    "attn1 group norm": Case(make(norm_num_groups=4), TOKENS),
    "wider inside": Case(make(dim_head=24, out_bias=False), TOKENS),
    "layer norm of q and k": Case(make(qk_norm="layer_norm"), TOKENS),
    "rms norm of q and k": Case(make(qk_norm="rms_norm"), TOKENS),
    "l2 norm of q and k": Case(make(qk_norm="l2"), TOKENS),
    "fused": Case(fused(bias=True), TOKENS),
    "fused without bias": Case(fused(**UNET), MAP),
}
every_case = pytest.mark.parametrize("name", list(CASES))


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_frames_that_do_not_meet_get_what_the_original_gives(name, dtype):
    assert_equals_original(CASES[name], dtype)


@every_case
def test_gradients_of_all_parameters_are_those_of_the_original(name):
    assert_gradients_agree(CASES[name])


@every_case
def test_weights_are_shared(name):
    assert_shares_weights(CASES[name])


def test_a_model_that_was_fused_and_unfused_reads_its_own_projections_again():
    module, x = CASES["attn1"].module(), CASES["attn1"].input(2)
    module.fuse_projections()
    with torch.no_grad():
        module.to_q.weight.mul_(2)  # only now: to_qkv holds the old weights
        layer = zk.SLRAttention.from_attention(module)
        torch.testing.assert_close(layer(x), module(x))
        module.set_processor(FusedAttnProcessor2_0())
        torch.testing.assert_close(layer(x), module(x))
        assert not torch.allclose(layer(x), AttnProcessor2_0()(module, x))
        context = zk.VideoContext(frames=1)
        with zk.patched(module, context):
            torch.testing.assert_close(module(x), FusedAttnProcessor2_0()(module, x))


REFUSED = {
    "cross": (dict(cross_attention_dim=24), "it is cross-attention"),
    "cross of equal width": (dict(cross_attention_dim=32), "it is cross-attention"),
    "added": (dict(added_kv_proj_dim=8), "added keys and values"),
    "only added": (dict(added_kv_proj_dim=8, only_cross_attention=True), "it is cross-attention"),
    "spatial norm": (dict(spatial_norm_dim=8), "spatial_norm"),
    "grouped queries": (dict(kv_heads=1), "grouped queries"),
    "causal": (dict(is_causal=True), "it is causal"),
    "no output": (dict(pre_only=True), "no projection of keys or of the output"),
    "norm across heads": (dict(qk_norm="layer_norm_across_heads", kv_heads=2), "across heads"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_no_plain_self_attention_is_refused(name):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        zk.SLRAttention.from_attention(make(**settings)())


def test_processors_that_do_more_are_refused():
    class Rotary:
        def __call__(self, attn, hidden_states, image_rotary_emb=None):
            return hidden_states

    with pytest.raises(ValueError, match="by their positions \\(image_rotary_emb\\)"):
        zk.SLRAttention.from_attention(make(processor=Rotary)())
    custom = make(processor=lambda: CustomDiffusionAttnProcessor2_0(True, True, 32, 32))
    with pytest.raises(ValueError, match="weights of its own \\(CustomDiffusionAttnProcessor2_0\\)"):
        zk.SLRAttention.from_attention(custom())


# ---- whole U-Nets ----


def call_adm(model, x):
    return model(x, 500).sample


def text_for(x, width):
    return torch.linspace(-1, 1, 7 * width, dtype=x.dtype).reshape(1, 7, width).expand(len(x), -1, -1)


def call_latent(model, x):
    return model(x, 500, encoder_hidden_states=text_for(x, model.config.cross_attention_dim)).sample


ADM = [
    *(f"down_blocks.{i}.attentions.0" for i in (1, 2)),
    "mid_block.attentions.0",
    *(f"up_blocks.{i}.attentions.{j}" for i in (0, 1) for j in (0, 1)),
]
LATENT = [
    f"{part}.transformer_blocks.0.attn1"
    for part in (
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        *(f"up_blocks.1.attentions.{j}" for j in (0, 1)),
    )
]
NETWORKS = {
    "adm": Network(adm, ADM, (3, 8, 16), call_adm, first_grid=(4, 8)),
    "latent": Network(stable_diffusion, LATENT, (4, 6, 10), call_latent, first_grid=(6, 10)),
    "latent, equal width": Network(lambda: stable_diffusion(32), LATENT, (4, 6, 10), call_latent, first_grid=(6, 10)),
}
every_network = pytest.mark.parametrize("name", list(NETWORKS))


@pytest.mark.parametrize("name", ["adm", "latent"])
def test_one_frame_changes_nothing(name):
    assert_one_frame_changes_nothing(NETWORKS[name])


@every_network
def test_every_self_attention_runs_slr_attention_and_no_other(name):
    network = NETWORKS[name]
    report = assert_layers_are_slr(network, network.context(8), network.input(8))
    assert report.patched[0].grid == network.first_grid
    skipped = [layer for layer in report.layers if not layer.is_patched]
    if name == "adm":
        assert not skipped
    else:
        assert sorted(layer.name for layer in skipped) == sorted(x.replace("attn1", "attn2") for x in LATENT)
        assert {layer.reason for layer in skipped} == {"it is cross-attention"}
        assert {layer.grid for layer in report.patched} == {(6, 10), (3, 5)}


@pytest.mark.parametrize("combine", ["serial", "parallel", "joint", "cross"])
def test_a_layer_of_the_patched_adm_is_slr_attention_written_out(combine):
    network, frames, name = NETWORKS["adm"], 5, "up_blocks.0.attentions.1"
    model = network.model()
    context = network.context(frames, combine=combine, blend=0.3)
    with torch.no_grad():
        with zk.patched(model, context), recorded(model, [name]) as calls:
            call_adm(model, network.input(frames))
        x, got = calls[name][0][0], calls[name][2]

        def expected(module, x):
            C, Hg, Wg = x.shape[1:]
            tokens = nn.functional.group_norm(
                x, module.group_norm.num_groups, module.group_norm.weight, module.group_norm.bias, module.group_norm.eps
            )
            tokens = tokens.reshape(1, frames, C, Hg * Wg).mT
            q, k, v = (
                nn.functional.linear(tokens, f.weight, f.bias).unflatten(-1, (module.heads, -1))
                for f in (module.to_q, module.to_k, module.to_v)
            )
            trajectories = context.trajectories((Hg, Wg))
            y = compose(q, k, v, context.table(), trajectories, context.options, q.shape[-1] ** -0.5)
            y = nn.functional.linear(y.flatten(3), module.to_out[0].weight, module.to_out[0].bias)
            return (x + y[0].mT.reshape(x.shape)) / module.rescale_output_factor

        module = model.get_submodule(name)
        oracle = expected(copy.deepcopy(module).double(), x.double())
        testing.assert_within_budget(got, oracle, expected(module, x), combine)
        with pytest.raises(AssertionError, match="exceeds the budget"):
            testing.assert_within_budget(module(x), oracle, expected(module, x), "the original")


def test_guidance_branches_share_the_trajectories_of_the_conditional_one():
    network = NETWORKS["latent"]
    model = network.model()
    for conditional in (-1, 0):
        context = network.context(4, B=2, conditional=conditional)
        x = network.input(16)
        with torch.no_grad(), zk.patched(model, context):
            whole = call_latent(model, x)
            for branch in (0, 1):
                part = slice(8 * branch, 8 * branch + 8)
                torch.testing.assert_close(call_latent(model, x[part]), whole[part], rtol=1e-4, atol=1e-4)


# ---- processors set by others ----


class Counting:
    """Somebody's own processor."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, num_frames=None, **kwargs):
        self.calls += 1
        self.frames = num_frames
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


def test_processors_set_before_come_back():
    network = NETWORKS["latent"]
    model, x = network.model(), network.input(4)
    own = {name: Counting() for name in model.attn_processors}
    model.set_attn_processor(own.copy())
    before = rest(model)
    context = network.context(4, active=(0.5, 1.0), correct=zk.CorrectionOptions(enabled=False))
    keywords = {"cross_attention_kwargs": {"num_frames": 4}}
    with torch.no_grad(), zk.patched(model, context):
        assert all(model.attn_processors[name] is not own[name] for name in own if "attn1" in name)
        assert all(model.attn_processors[name] is own[name] for name in own if "attn2" in name)
        with context.step(1, 2):
            model(x, 500, text_for(x, 24), **keywords)
        assert {p.calls for name, p in own.items() if "attn1" in name} == {0}
        with context.step(0, 2):  # inactive: their own run, with what they asked for
            model(x, 500, text_for(x, 24), **keywords)
        assert {(p.calls, p.frames) for name, p in own.items() if "attn1" in name} == {(1, 4)}
    assert model.attn_processors == own
    assert_at_rest(model, before)


class WeightlessModule(nn.Module):
    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)


def test_a_processor_that_is_a_module_stays_in_the_tree():
    layer = make(processor=WeightlessModule)()
    before, modules = rest(layer), [name for name, _ in layer.named_modules()]
    with zk.patched(layer, zk.VideoContext(frames=1)) as report:
        assert [name for name, _ in layer.named_modules()] == modules
        report.verify()
        layer(torch.zeros(1, 4, 32))
    assert_at_rest(layer, before)
    assert isinstance(layer.processor, WeightlessModule)


def switch_processors(model):
    model.set_attn_processor(AttnProcessor2_0())


def switch_slicing(model):
    model.set_attention_slice(1)


def switch_fusing(model):
    model.fuse_qkv_projections()


@pytest.mark.parametrize("switch", [switch_processors, switch_slicing, switch_fusing])
def test_processors_set_inside_are_noticed_before_anything_runs(switch):
    network = NETWORKS["latent"]
    model, x = network.model(), network.input(4)
    ran = []
    model.conv_in.register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.no_grad(), zk.patched(model, network.context(4)):
        call_latent(model, x)
        assert ran == [1]
        switch(model)
        with pytest.raises(RuntimeError, match=r"4 patched layers were replaced after patching: down_blocks\.0"):
            call_latent(model, x)
        assert ran == [1]
    assert type(model.mid_block.attentions[0].transformer_blocks[0].attn1.processor).__module__.startswith("diffusers")


@pytest.mark.parametrize("switch", [switch_slicing, switch_fusing])
def test_switches_set_before_are_replaced_and_come_back(switch):
    network = NETWORKS["latent"]
    model, x = network.model(), network.input(4)
    with torch.no_grad():
        with zk.patched(model, network.context(4)):
            expected = call_latent(model, x)
        switch(model)
        before = rest(model)
        with zk.patched(model, network.context(4)):
            torch.testing.assert_close(call_latent(model, x), expected, rtol=1e-4, atol=1e-4)
        assert_at_rest(model, before)


def test_masks_are_refused_and_other_sequences_go_to_the_original():
    layer, x = CASES["attn1"].module(), CASES["attn1"].input(4)
    text = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(2))
    context = zk.VideoContext(*flows(4, size=(6, 10)))
    with torch.no_grad():
        expected = layer(x, text), layer(x, text, attention_mask=torch.zeros(4, 1, 6))
        with zk.patched(layer, context, verify=False) as report:
            assert torch.equal(layer(x, text), expected[0])
            assert torch.equal(layer(x, text, attention_mask=torch.zeros(4, 1, 6)), expected[1])
            assert report.patched[0].note == "called as cross-attention"
            with pytest.raises(ValueError, match="takes no attention_mask"):
                layer(x, attention_mask=torch.zeros(4, 1, 15))
            assert not torch.allclose(layer(x), layer(x, x.clone()))
            assert torch.equal(layer(x), layer(x, x))


# ---- memory, precision, recomputation ----


@pytest.mark.parametrize("name", ["adm", "latent"])
def test_gradient_checkpointing_gives_the_gradients_of_none(name):
    network = NETWORKS[name]
    model, x = network.model().train(), network.input(4)
    context = network.context(4)
    with zk.patched(model, context):
        expected = gradients(model, network.call(model, x))
    with zk.patched(model, network.context(1)):
        single = gradients(model, network.call(model, x))
    model.enable_gradient_checkpointing()
    before = rest(model)
    with zk.patched(model, context) as report:
        got = gradients(model, network.call(model, x))
    assert_at_rest(model, before)
    if name == "latent":  # UNet2DModel recomputes the convolutions around its attention alone
        assert {layer.calls for layer in report.patched} == {2}
    assert got.keys() == expected.keys()
    for key, g in expected.items():
        torch.testing.assert_close(got[key], g, rtol=1e-5, atol=1e-5, msg=key)
    assert any(not torch.allclose(single[key], g, rtol=1e-2, atol=1e-2) for key, g in expected.items())


def test_gradients_of_a_patched_unet_are_its_own_where_frames_do_not_meet():
    network = NETWORKS["adm"]
    model, x = network.model(), network.input(2)
    double = copy.deepcopy(model).double()
    oracle, eager = gradients(double, call_adm(double, x.double())), gradients(model, call_adm(model, x))
    with zk.patched(model, network.context(1)):
        ours = gradients(model, call_adm(model, x))
    assert_network_gradients_agree(ours, oracle, eager)


@pytest.mark.parametrize(
    ("name", "dtype"), [("adm", torch.bfloat16), ("latent", torch.bfloat16), ("latent", torch.float16)], ids=str
)
def test_half_precision_models(name, dtype):
    network = NETWORKS[name]
    model, x = network.model().to(dtype), network.input(4).to(dtype)
    with torch.no_grad():
        eager, oracle = network.call(model, x), network.call(copy.deepcopy(model).double(), x.double())
        with zk.patched(model, network.context(1)):
            testing.assert_within_budget(network.call(model, x), oracle, eager, "T = 1")
        with zk.patched(model, network.context(4)) as report:
            out = network.call(model, x)
        with zk.patched(copied := copy.deepcopy(model).double(), network.context(4)):
            wide = network.call(copied, x.double())
    assert out.dtype == dtype and report.patched[0].grid == network.first_grid
    # No eager peer computes SLR attention in this dtype: the plain network's own rounding error is the measure.
    testing.assert_within_budget(out, wide, wide + (eager - oracle), "T = 4")


def test_autocast_takes_the_network_to_bfloat16():
    network = NETWORKS["adm"]
    model, x = network.model(), network.input(4)
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            eager = call_adm(model, x)
            with zk.patched(model, network.context(4)) as report:
                out = call_adm(model, x)
        oracle = call_adm(double, x.double())
        with zk.patched(double, network.context(4)):
            wide = call_adm(double, x.double())
    assert out.dtype == torch.bfloat16 and [layer.calls for layer in report.patched] == [1] * 7
    testing.assert_within_budget(out, wide, wide + (eager - oracle), "autocast")


@pytest.mark.parametrize(("name", "order"), [("adm", "offloaded first"), ("latent", "patched first")])
def test_offloaded_models(name, order):
    accelerate = pytest.importorskip("accelerate")
    network = NETWORKS[name]
    model, x = network.model(), network.input(4)
    with torch.no_grad():
        plain = network.call(model, x)
        with zk.patched(model, network.context(4)):
            expected = network.call(model, x)

        def offload() -> None:
            weights = {key: value.clone() for key, value in model.state_dict().items()}
            accelerate.cpu_offload(model, torch.device("cpu"), state_dict=weights)
            assert {p.device.type for p in model.parameters()} == {"meta"}

        if order == "offloaded first":
            offload()
            held = rest(model)
            with zk.patched(model, network.context(4), expected_count=len(network.layers)):
                assert torch.equal(network.call(model, x), expected)
            assert_at_rest(model, held, ("_parameters",))  # accelerate makes them anew in every call
        else:
            with zk.patched(model, network.context(4)):
                offload()
                assert torch.equal(network.call(model, x), expected)
        assert torch.equal(network.call(model, x), plain)
    assert all(type(model.get_submodule(layer).processor) is AttnProcessor2_0 for layer in network.layers)
