"""ADM checkpoints: conversion against an independent forward, orders of qkv, published layouts, half precision."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adm_network import Network, frames, relative, saved
from torch import Tensor

import zsvr_kernels as zk
from zsvr.priors import adm, adm_layout

pytest.importorskip("diffusers")
pytest.importorskip("safetensors")

NETWORKS: dict[str, dict[str, Any]] = {
    "as published": {"multipliers": (1, 1, 2), "blocks": 2, "attention": (1, 2)},
    "strided convolutions": {"updown": False, "attention": (0, 1)},
    "added embedding": {"scale_shift": False, "out": 3},
    "a gap in the attention": {"multipliers": (1, 2, 2), "attention": (0, 2)},
    "attention in the middle only": {"attention": ()},
    "heads by number": {"multipliers": (1, 2, 3), "attention": (1, 2), "head_dim": None, "heads": 4},
    "first multiplier a half": {"base": 64, "multipliers": (0.5, 1)},
    "classes": {"classes": 5},
}


@pytest.mark.parametrize("order", adm.ORDERS)
@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_converted_network_computes_the_same(name, order, tmp_path):
    network = Network(**NETWORKS[name])
    label = 3 if name == "classes" else None
    prior = adm.open_adm(
        saved(network, tmp_path),
        qkv_order=order,
        head_dim=network.head_dim,
        num_heads=network.heads,
        size=16,
        label=label,
        cache=False,
    )
    x, step = frames().double(), 417
    prior.model.double()
    with torch.no_grad():
        expected = network(x, step, order, label)
        eps, frac = prior.predict(x, step)
    got = eps if frac is None else torch.cat((eps, 2 * frac - 1), 1)
    assert relative(got, expected) < 1e-12
    other = network(x, step, adm.ORDERS[1 - adm.ORDERS.index(order)], label)
    assert relative(got, other) > 1e-3, "the orders must differ, else this test tells nothing"
    assert prior.learns_variance == (network.state["out.2.weight"].shape[0] == 6)
    assert prior.multiple == 2 ** (len(network.multipliers) - 1)


@pytest.mark.parametrize("name", ["as published", "heads by number"])
def test_the_patch_of_one_frame_changes_nothing(name, tmp_path):
    network = Network(**NETWORKS[name])
    options = {"head_dim": network.head_dim, "num_heads": network.heads, "size": 16, "cache": False}
    prior = adm.open_adm(saved(network, tmp_path), **options)
    prior.model.double()
    x = frames(1).double()
    flow = torch.zeros(1, 0, 2, 16, 16)
    with torch.no_grad():
        expected, _ = prior.predict(x, 40)
        context = zk.VideoContext(flow, flow, options=zk.SLROptions(backend="reference"))
        with zk.patched(prior.model, context, expected_count=prior.expected_count):
            got, _ = prior.predict(x, 40)
    assert relative(got, expected) < 1e-12


def test_the_layout_is_read_off_the_state_dict():
    network = Network(base=64, multipliers=(0.5, 1, 1.5), blocks=2, attention=(2,), classes=7, updown=False)
    layout = adm_layout.infer_layout({k: tuple(v.shape) for k, v in network.state.items()})
    assert layout == adm_layout.ADMLayout(64, 256, 3, 6, (32, 64, 96), 2, (2,), False, True, 7)
    assert layout.multipliers == (0.5, 1, 1.5)
    assert layout.learns_variance


def test_the_full_network_has_the_published_size_and_every_key_is_mapped():
    network = Network(256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 64, device="meta")
    shapes = {k: tuple(v.shape) for k, v in network.state.items()}
    assert sum(map(math.prod, shapes.values())) == 552_814_086
    layout = adm_layout.infer_layout(shapes)
    known = adm.published(layout)
    assert known == adm.Published(256, "legacy", 64, None, "linear", None)
    assert layout.attentions == 16
    with torch.device("meta"):
        model = adm._build(layout, 64, None, (256, 256))
    targets = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert sum(map(math.prod, targets.values())) == 552_814_086
    keys = adm_layout.key_map(layout, targets)
    adm_layout.check_keys(shapes, keys, targets)
    reached = [target for names in keys.values() for target in names]
    assert sorted(reached) == sorted(targets)
    assert len(set(reached)) == len(reached)
    assert list(keys) != [] and set(keys) == set(shapes)
    found = [(name, m.heads, m.inner_dim) for name, m in adm._attentions(model)]
    assert len(found) == 16
    assert {(h, c) for _, h, c in found} == {(8, 512), (16, 1024)}
    with zk.patched(model, zk.VideoContext(frames=2), zk.SLROptions(frames="previous", combine="cross")) as report:
        assert len(report.patched) == layout.attentions


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"base": 192, "multipliers": (1, 2, 3, 4), "blocks": 3}, (64, "new", 64, None, "cosine")),
        ({"base": 256, "multipliers": (1, 1, 2, 3, 4), "blocks": 2}, (128, "legacy", None, 4, "linear")),
        ({"base": 256, "multipliers": (0.5, 1, 1, 2, 2, 4, 4), "blocks": 2}, (512, "legacy", 64, None, "linear")),
        ({"base": 128, "multipliers": (1, 1, 2, 2, 4, 4), "blocks": 1}, (256, "legacy", 64, None, "linear")),
        ({"base": 128, "multipliers": (1, 2, 3, 4), "blocks": 3}, None),
        # improved-diffusion: the same multipliers, yet 4 heads and the legacy order; one head
        ({"base": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "updown": False}, None),
        ({"base": 128, "multipliers": (1, 1, 2, 2, 4, 4), "updown": False, "scale_shift": False}, None),
    ],
)
def test_published_networks_are_known_by_their_layout(arguments, expected):
    network = Network(**arguments, attention=(1,), device="meta")
    known = adm.published(adm_layout.infer_layout({k: tuple(v.shape) for k, v in network.state.items()}))
    if expected is None:
        assert known is None
    else:
        assert known is not None
        assert (known.size, known.qkv_order, known.head_dim, known.num_heads, known.schedule) == expected


def test_the_published_ffhq_network_opens_without_options(tmp_path):
    """128 channels, one residual block, attention at 16 x 16, 64 channels a head: ``ffhq_10m.pt`` and its kin."""
    network = Network(128, (1, 1, 2, 2, 4, 4), 1, (4,), 64)
    network.state = {name: x.half() for name, x in network.state.items()}
    prior = adm.open_adm(saved(network, tmp_path), cache=False)
    assert (prior.size, prior.multiple, prior.expected_count) == ((256, 256), 32, 4)
    assert prior.learns_variance and {m.heads for _, m in adm._attentions(prior.model)} == {8}
    x = frames(1, 32)
    with torch.no_grad():
        got, expected = prior.predict(x, 7)[0], network(x, 7, "legacy")[:, :3]
    assert relative(got, expected) < 1e-5


def test_networks_that_are_told_rescaled_steps(tmp_path):
    """improved-diffusion's networks of 4000 steps are told a quarter of the step, which need not be whole."""
    network = Network(updown=False, head_dim=None, heads=4)
    options = {"num_heads": 4, "size": 16, "schedule": "cosine", "steps": 4000, "cache": False}
    path = saved(network, tmp_path)
    x = frames().double()
    for rescale, told in ((True, 3001 / 4), (False, 3001)):
        prior = adm.open_adm(path, **options, rescale_timesteps=rescale)
        prior.model.double()
        with torch.no_grad():
            assert relative(prior.predict(x, 3001)[0], network(x, told, "legacy")[:, :3]) < 1e-12
        assert prior.describe()["rescale_timesteps"] is rescale and len(prior.alphas_bar) == 4000


def test_a_pair_of_sides_may_be_a_list_as_the_command_line_gives_it(tmp_path):
    prior = adm.open_adm(saved(Network(), tmp_path), head_dim=16, size=[16, 24], cache=False)
    assert prior.size == (16, 24)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_wrapper_of_several_devices_is_taken_off(suffix, tmp_path):
    plain, wrapped = Network(), Network()
    wrapped.state = {f"module.{name}": x for name, x in plain.state.items()}
    options = {"head_dim": 16, "size": 16, "cache": False}
    expected = adm.open_adm(saved(plain, tmp_path, "plain" + suffix), **options).model.state_dict()
    got = adm.open_adm(saved(wrapped, tmp_path, "wrapped" + suffix), **options).model.state_dict()
    assert all(torch.equal(x, got[name]) for name, x in expected.items())


@pytest.mark.parametrize("order", adm.ORDERS)
def test_orders_are_permutations_of_rows_that_come_back(order):
    x = torch.randn(3 * 24, 5)
    parts = adm.split_qkv(x, 3, order)
    torch.testing.assert_close(adm.join_qkv(parts, 3, order), x, rtol=0, atol=0)
    rows = torch.arange(3 * 24).reshape(3, 3, 8)  # legacy: (heads, qkv, D); new: (qkv, heads, D)
    q = rows[:, 0].flatten() if order == "legacy" else rows[0].flatten()
    torch.testing.assert_close(parts[0], x[q], rtol=0, atol=0)


def overfitted_towards_noise(order: str, folder: Any) -> Any:
    """A network of which nothing but the order matters, with its last convolution fitted to the noise it gets."""
    network = Network(seed=3)
    x0, step = frames(2, seed=9), 300
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    a = float(adm.alphas_bar("linear", 1000)[step])
    x = math.sqrt(a) * x0 + math.sqrt(1 - a) * noise
    last = {}

    def features() -> Tensor:
        kept = F.conv2d

        def note(h: Tensor, weight: Tensor, *rest: Any, **kw: Any) -> Tensor:
            last["h"] = h
            return kept(h, weight, *rest, **kw)

        F.conv2d = note
        try:
            network(x.double(), step, order)
        finally:
            F.conv2d = kept
        return last["h"]

    columns = F.unfold(features(), 3, padding=1).mT.flatten(0, 1)  # [N P, C 9]
    columns = torch.cat((columns, torch.ones(len(columns), 1)), 1)
    wanted = noise.double().flatten(2).mT.flatten(0, 1)
    solution = torch.linalg.lstsq(columns, wanted).solution  # [C 9 + 1, 3]
    weight = torch.zeros_like(network.state["out.2.weight"])
    weight[:3] = solution[:-1].mT.reshape(3, -1, 3, 3).float()
    network.state["out.2.weight"] = weight
    network.state["out.2.bias"] = torch.cat((solution[-1], torch.zeros(3))).float()
    return saved(network, folder), x0


@pytest.mark.parametrize("order", adm.ORDERS)
def test_the_wrong_order_is_found_out(order, tmp_path):
    path, x0 = overfitted_towards_noise(order, tmp_path)
    options = {"head_dim": 16, "size": 16}
    adm.open_adm(path, qkv_order=order, **options)
    right = adm.open_adm(path, qkv_order=order, **options)  # weights of the cache file, which permuting must not change
    (file,) = tmp_path.glob("*.zsvr.safetensors")
    data = file.read_bytes()
    before = {k: v.clone() for k, v in right.model.state_dict().items()}
    errors = right.verify_order(x0)
    assert set(errors) == set(adm.ORDERS)
    assert errors[order] < 0.9 * min(v for k, v in errors.items() if k != order)
    for k, v in right.model.state_dict().items():
        assert torch.equal(v, before[k]), k
    assert file.read_bytes() == data
    other = adm.ORDERS[1 - adm.ORDERS.index(order)]
    with pytest.raises(ValueError, match=f"open the checkpoint with qkv_order='{order}'"):
        adm.open_adm(path, qkv_order=other, **options).verify_order(x0)


def test_alphas_are_those_of_the_published_schedules():
    beta = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    np.testing.assert_allclose(adm.alphas_bar("linear", 1000).numpy(), np.cumprod(1 - beta), rtol=1e-13)
    cosine = adm.alphas_bar("cosine", 1000)
    wanted = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine[:990].numpy(), (wanted / wanted[0])[1:991], rtol=1e-9)
    assert cosine[-1] > 0
    with pytest.raises(ValueError, match="linear, cosine"):
        adm.alphas_bar("sigmoid", 1000)


# ---- half precision ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_torso_keeps_norms_and_embeddings_in_float32(dtype, tmp_path):
    network = Network(**NETWORKS["as published"])
    for name, weight in network.state.items():
        if name.endswith(("out_layers.3.weight", "proj_out.weight")):
            weight.mul_(0.1)  # like a trained network, and unlike a random one, it does not blow rounding up
    path = saved(network, tmp_path)
    whole = adm.open_adm(path, head_dim=16, size=16, cache=False)
    prior = adm.open_adm(path, head_dim=16, size=16, cache=False, dtype=dtype)
    for name, x in prior.model.state_dict().items():
        is_kept = re.search(r"norm|time_emb|^conv_in|^conv_out", name)
        assert x.dtype == (torch.float32 if is_kept else dtype), name
    x = frames()
    with torch.no_grad():
        eps, frac = prior.predict(x, 300)
        expected, _ = whole.predict(x, 300)
    assert eps.dtype == frac.dtype == torch.float32
    error = relative(eps, expected)
    assert 0 < error < 4 * torch.finfo(dtype).eps
    context = zk.VideoContext(torch.zeros(1, 1, 2, 16, 16), torch.zeros(1, 1, 2, 16, 16))
    with torch.no_grad(), zk.patched(prior.model, context, expected_count=prior.expected_count):
        assert torch.isfinite(prior.predict(x, 300)[0]).all()
