"""SLRAttention.from_attention: the same layer as before where frames do not meet, with the same weights."""

from __future__ import annotations

import pytest
import torch
from agreement import (
    Case,
    assert_equals_original,
    assert_gradients_agree,
    assert_shares_weights,
    compose,
    flows,
)
from networks import (
    AttentionBlock,
    CrossAttention,
    ImprovedBlock,
    QKVAttention,
    ViTAttention,
)
from torch import nn

import zsvr_kernels as zk
from zsvr_kernels import testing
from zsvr_kernels.adapters import ADAPTERS, adapt, adapter_for
from zsvr_kernels.plain import PlainAttention

MAP, TOKENS = (32, 3, 5), (15, 32)  # [C, Hg, Wg], [P, C]


def batch_first(module, x):
    return module(x, x, x, need_weights=False)[0]


def sequence_first(module, x):
    turned = x.transpose(0, 1)
    return module(turned, turned, turned, need_weights=False)[0].transpose(0, 1)


CASES = {
    "guided legacy": Case(lambda: AttentionBlock(32, 2), MAP),
    "guided new": Case(lambda: AttentionBlock(32, 2, QKVAttention(2)), MAP),
    "guided said": Case(lambda: AttentionBlock(32, 2), MAP, qkv_order="legacy"),
    "guided checkpointing": Case(lambda: AttentionBlock(32, 2, use_checkpoint=True), MAP),
    "improved": Case(lambda: ImprovedBlock(32, 2), MAP),
    "latent": Case(lambda: CrossAttention(32, heads=2, dim_head=8), TOKENS),
    "timm": Case(lambda: ViTAttention(32, 4), TOKENS),
    "timm with norms": Case(lambda: ViTAttention(32, 2, qk_norm=True, scale_norm=True), (16, 32)),
    "batch first": Case(lambda: nn.MultiheadAttention(32, 2, batch_first=True), TOKENS, batch_first),
    "sequence first": Case(lambda: nn.MultiheadAttention(32, 2, bias=False), TOKENS, sequence_first),
    "plain": Case(lambda: PlainAttention(32, 2, groups=8), MAP),
    "plain tokens": Case(lambda: PlainAttention(32, 2, head_dim=8, norm="layer", qkv_bias=False), TOKENS),
    "plain bare": Case(lambda: PlainAttention(32, 4, norm=None, residual=False, out_bias=False), TOKENS),
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


@pytest.mark.parametrize("name", ["guided legacy", "guided new", "improved"])
def test_the_wrong_order_of_qkv_is_another_layer(name):
    case = CASES[name]
    module, x = case.module(), case.input(2)
    right = adapt(module).qkv_order
    assert right == ("new" if name == "guided new" else "legacy")
    wrong = "legacy" if right == "new" else "new"
    with torch.no_grad():
        got = zk.SLRAttention.from_attention(module, qkv_order=wrong)(x)
        with pytest.raises(AssertionError, match="exceeds the budget"):
            testing.assert_within_budget(got, case.call(case.oracle(module), x.double()), case.call(module, x), name)


@pytest.mark.parametrize("combine", ["serial", "parallel", "joint"])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_tokens_before_the_image_attend_but_have_no_trajectory(combine, prefix):
    Hg, Wg, frames = 3, 5, 4
    module = Case(lambda: ViTAttention(32, 2, qk_norm=True), (prefix + Hg * Wg, 32)).module()
    x = torch.randn(2 * frames, prefix + Hg * Wg, 32, generator=torch.Generator().manual_seed(5))
    options = zk.SLROptions(combine=combine, blend=0.3)
    context = zk.VideoContext(*flows(frames, B=2, size=(6, 10)), options=options)

    def expected(module, x, q_norm):
        qkv = module.qkv(x).unflatten(0, (2, frames)).unflatten(-1, (3, 2, 16))
        q, k, v = qkv.unbind(3)
        trajectories = context.trajectories((Hg, Wg))
        where = zk.Trajectories.from_positions(
            trajectories.positions.to(x.dtype) if x.dtype == torch.float32 else trajectories.positions,
            trajectories.valid,
            trajectories.frames,
            (Hg, Wg),
        )
        y = compose(module.q_norm(q), module.k_norm(k), v, context.table(), where, options, 0.25, prefix)
        return module.proj(y.flatten(0, 1).flatten(2))

    with torch.no_grad():
        got = zk.SLRAttention.from_attention(module, prefix=prefix)(x, context)
        by_options = zk.SLRAttention.from_attention(module)
        context.configure(options.with_(prefix=prefix))
        assert torch.equal(by_options(x, context), got)
        double = Case(lambda: ViTAttention(32, 2, qk_norm=True), ()).oracle(module)
        testing.assert_within_budget(got, expected(double, x.double(), None), expected(module, x, None), combine)
    context.configure(options)
    if prefix:
        with pytest.raises(ValueError, match=r"no token grid has 1[67] sites"):
            zk.SLRAttention.from_attention(module)(x, context)


def test_a_layer_of_ones_own_is_an_attention_with_its_own_weights(generator):
    layer = zk.SLRAttention(32, 2, groups=8, name="mine")
    x = torch.randn(2, 32, 3, 5, generator=generator)
    torch.testing.assert_close(layer(x), layer.attention(x))
    assert "PlainAttention, channels=32, heads=2, head_dim=16, name='mine'" in repr(layer)
    other = zk.SLRAttention(32, 2, groups=8)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x)) and other.name != layer.name
    names = {zk.SLRAttention.from_attention(layer.attention).name for _ in range(3)}
    assert len(names) == 3


REFUSED = {
    "latent cross by dims": (lambda: CrossAttention(32, 24), "keys come from 24 channels, its queries from 32"),
    "kdim": (lambda: nn.MultiheadAttention(32, 2, kdim=24, vdim=20), "keys and values have 24 and 20 channels"),
    "bias of keys": (lambda: nn.MultiheadAttention(32, 2, add_bias_kv=True), "adds keys of its own"),
    "zero attention": (lambda: nn.MultiheadAttention(32, 2, add_zero_attn=True), "adds keys of its own"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_no_plain_self_attention_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        zk.SLRAttention.from_attention(make())


def test_structures_with_more_to_them_are_refused():
    guided = AttentionBlock(32, 2)
    guided.encoder_kv = nn.Conv1d(8, 64, 1)
    with pytest.raises(ValueError, match="encoder's keys"):
        zk.SLRAttention.from_attention(guided)
    relative = ViTAttention(32, 2)
    relative.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
    with pytest.raises(ValueError, match="depend on positions"):
        zk.SLRAttention.from_attention(relative)
    for module, name in ((ViTAttention(32, 2), "gate"), (CrossAttention(32), "gate"), (AttentionBlock(32, 2), "gate")):
        module.gate = nn.Linear(32, 32)
        with pytest.raises(ValueError, match="parts that such a layer does not have: gate"):
            zk.SLRAttention.from_attention(module)
        del module.gate
        module.register_parameter(name, nn.Parameter(torch.zeros(3)))
        with pytest.raises(ValueError, match="parts that such a layer does not have: gate"):
            zk.SLRAttention.from_attention(module)
    narrow = CrossAttention(32)
    narrow.to_k, narrow.to_v = nn.Linear(32, 16), nn.Linear(32, 16)
    with pytest.raises(ValueError, match="different widths"):
        zk.SLRAttention.from_attention(narrow)


def test_other_modules_and_wrong_arguments_say_what_is_known():
    with pytest.raises(TypeError, match="Linear is not an attention this package knows: PlainAttention, torch Multi"):
        zk.SLRAttention.from_attention(nn.Linear(8, 8))
    with pytest.raises(TypeError, match=r"module must be a torch.nn.Module, got str"):
        zk.SLRAttention.from_attention("attn1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="qkv_order must be one of legacy, new, got 'old'"):
        zk.SLRAttention.from_attention(AttentionBlock(32, 2), qkv_order="old")
    with pytest.raises(ValueError, match="qkv_order is for guided-diffusion AttentionBlock, got a timm Attention"):
        zk.SLRAttention.from_attention(ViTAttention(32), qkv_order="new")
    with pytest.raises(ValueError, match="prefix must be at least 0"):
        zk.SLRAttention.from_attention(ViTAttention(32), prefix=-1)


def test_inputs_of_the_wrong_rank_are_refused(generator):
    image, tokens = torch.randn(2, 32, 3, 5, generator=generator), torch.randn(2, 15, 32, generator=generator)
    with pytest.raises(ValueError, match=r"timm Attention takes tokens \[N, P, C\], got shape \(2, 32, 3, 5\)"):
        zk.SLRAttention.from_attention(ViTAttention(32))(image)
    with pytest.raises(ValueError, match=r"takes tokens \[N, P, C\]"):
        zk.SLRAttention.from_attention(nn.MultiheadAttention(32, 2))(image)
    with pytest.raises(ValueError, match=r"takes \[N, C, Hg, Wg\], got shape \(2, 15, 32\)"):
        zk.SLRAttention.from_attention(AttentionBlock(32, 2))(tokens)
    with pytest.raises(ValueError, match="x must have 3 axes"):
        zk.SLRAttention.from_attention(ViTAttention(32))(image[0, 0])
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        zk.SLRAttention.from_attention(ViTAttention(32))(None)  # type: ignore[arg-type]


def test_tokens_need_their_grid(generator):
    x = torch.randn(4, 15, 32, generator=generator)
    layer = zk.SLRAttention.from_attention(ViTAttention(32))
    context = zk.VideoContext(*flows(4, size=(6, 10)))
    by_size = layer(x, context)
    assert torch.equal(layer(x, context, grid=(3, 5)), by_size)
    assert not torch.equal(layer(x, context, grid=(5, 3)), by_size)
    with pytest.raises(ValueError, match="grid 4x4 has 16 sites, but x has 15 tokens"):
        layer(x, context, grid=(4, 4))
    with pytest.raises(ValueError, match="no token grid has 15 sites; tried 8x8, 4x4, 2x2"):
        layer(x, zk.VideoContext(*flows(4, size=(8, 8))))


def test_batches_are_whole_clips(generator):
    layer = zk.SLRAttention.from_attention(PlainAttention(32, 2, groups=8))
    context = zk.VideoContext(*flows(4, B=2, size=(6, 10)))
    with pytest.raises(ValueError, match="a batch of 6 frames is not a whole number of clips of T = 4"):
        layer(torch.randn(6, 32, 3, 5, generator=generator), context)
    with pytest.raises(ValueError, match=r"holds 3 clips of T = 4, which is no multiple of the context's B = 2"):
        layer(torch.randn(12, 32, 3, 5, generator=generator), context)
    assert layer(torch.randn(16, 32, 3, 5, generator=generator), context).shape == (16, 32, 3, 5)


def test_every_structure_is_told_from_the_others():
    kinds = {"guided": "guided-diffusion AttentionBlock", "improved": "guided-diffusion AttentionBlock"}
    kinds |= {"latent": "LDM CrossAttention", "timm": "timm Attention", "plain": "PlainAttention"}
    kinds |= {"batch": "torch MultiheadAttention", "sequence": "torch MultiheadAttention"}
    for name, case in CASES.items():
        takers = [adapter.kind for adapter in ADAPTERS if adapter.recognises(case.build())]
        expected = kinds[name.split()[0]]
        assert takers == [expected] or (expected == "PlainAttention" and takers == [expected, "timm Attention"]), name
        assert adapter_for(case.build()).kind == adapt(case.build()).kind == expected
    assert not [a for a in ADAPTERS for m in (nn.Linear(4, 4), nn.Sequential(), nn.Module()) if a.recognises(m)]
