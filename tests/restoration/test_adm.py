"""ADM checkpoints: conversion against an independent forward, orders of qkv, faults, cache."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adm_network import Network
from torch import Tensor

import zsvr_kernels as zk
from zsvr import files, weights
from zsvr.files import hash_file
from zsvr.priors import adm, adm_layout

pytest.importorskip("diffusers")
safetensors_torch = pytest.importorskip("safetensors.torch")


def saved(network: Network, folder: Any, name: str = "net.pt") -> Any:
    path = folder / name
    if path.suffix == ".safetensors":
        safetensors_torch.save_file(network.state, str(path))
    else:
        torch.save(network.state, path)
    return path


def frames(n: int = 2, size: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


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


# ---- faults ----


def error_of(state: dict[str, Any], folder: Any, **options: Any) -> str:
    torch.save(state, folder / "faulty.pt")
    with pytest.raises(ValueError) as caught:
        adm.open_adm(folder / "faulty.pt", **{"head_dim": 16, "size": 16, "cache": False, **options})
    return str(caught.value)


def test_every_key_that_does_not_fit_is_listed(tmp_path):
    state = dict(Network().state)
    del state["middle_block.1.qkv.bias"], state["output_blocks.0.0.in_layers.0.weight"]
    state["input_blocks.2.0.in_layers.2.weights"] = state.pop("input_blocks.2.0.in_layers.2.weight")
    state["ema.decay"] = torch.zeros(1)
    state["out.0.weight"] = torch.zeros(64)
    message = error_of(state, tmp_path)
    for line in (
        "missing: middle_block.1.qkv.bias",
        "missing: output_blocks.0.0.in_layers.0.weight",
        "missing: input_blocks.2.0.in_layers.2.weight\n",
        "unexpected: input_blocks.2.0.in_layers.2.weights",
        "unexpected: ema.decay (1,)",
        "wrong shape: out.0.weight (64,), expected (32,)",
        "6 keys",
        "faulty.pt",
    ):
        assert line in message, line


def test_a_state_dict_cut_short_says_what_is_missing(tmp_path):
    whole = Network().state
    message = error_of({k: v for k, v in whole.items() if not k.startswith("output_blocks.3.")}, tmp_path)
    assert message.count("missing: output_blocks.3.0.") == 12
    message = error_of({k: v for k, v in whole.items() if not k.startswith("out.2")}, tmp_path)
    assert "out.2.weight" in message and "no state dict of a guided-diffusion U-Net" in message
    assert "time_embed.0.weight" in error_of({"conv.weight": torch.zeros(1)}, tmp_path)
    message = error_of({k: v for k, v in whole.items() if "blocks.1." not in k}, tmp_path)
    assert "input_blocks.1.0.out_layers.3.weight" in message or "do not fit" in message


@pytest.mark.parametrize(
    ("network", "options", "match"),
    [
        ({"in_channels": 6}, {}, "upsampler"),
        ({"out": 5}, {}, "expected 3, or 6"),
        ({"classes": 5}, {}, "class-conditional \\(5 classes\\)"),
        ({"classes": 5}, {"label": 5}, "within 0..4"),
        ({}, {"label": 0}, "knows no classes"),
        ({}, {"size": None}, "no published network has channel multipliers"),
        ({}, {"head_dim": None}, "head_dim=... \\(most: 64\\) or num_heads=..."),
        ({"in_channels": 6}, {"size": None}, "upsampler"),
        ({}, {"head_dim": 24}, "head_dim = 24 does not divide"),
        ({}, {"head_dim": 0}, "head_dim = 0 does not divide"),
        ({}, {"head_dim": 16.0}, "head_dim = 16.0 does not divide"),
        ({}, {"head_dim": None, "num_heads": 7}, "num_heads = 7 does not divide"),
        ({}, {"num_heads": 2}, "not both"),
        ({}, {"qkv_order": "old"}, "legacy, new"),
        ({}, {"schedule": "x"}, "linear, cosine"),
        ({}, {"steps": 0}, "number of training steps, got 0"),
        ({}, {"steps": 100.5}, "number of training steps, got 100.5"),
        ({}, {"steps": 20}, "schedule of 20 steps reaches a beta of 1: give more"),
        ({}, {"size": 0}, "size must be a side"),
        ({}, {"size": "16"}, "size must be a side"),
        ({}, {"size": (16,)}, "size must be a side"),
        ({}, {"dtype": torch.float64}, "dtype must be one of"),
    ],
)
def test_wrong_uses_are_refused(network, options, match, tmp_path):
    path = saved(Network(**network), tmp_path)
    with pytest.raises(ValueError, match=match):
        adm.open_adm(path, **{"head_dim": 16, "size": 16, "cache": False, **options})


class Bomb:
    def __reduce__(self) -> Any:
        return (exec, ("import pathlib; pathlib.Path('bomb').touch()",))


NO_CHECKPOINTS: dict[str, tuple[Any, str]] = {
    "page": (b"<!DOCTYPE html><html><body>Not found</body></html>", "a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2211383297\n", "Git LFS"),
    "empty": (b"", "it is empty"),
    "objects": ({"a": torch.zeros(1), "b": Bomb()}, "more than tensors, objects of exec"),
    "wrapper": ({"model": {"x": torch.zeros(1)}, "ema": {"x": torch.zeros(1)}, "step": 1}, r"\['ema'\].*another of"),
    "numbers": ({3: torch.zeros(1)}, "a dict with 3"),
    "text": (b"Zero bytes of a network", "no file of PyTorch's, or it is damaged"),
    "array": ([torch.zeros(1)], "no state dict but a list"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", list(NO_CHECKPOINTS))
def test_messages_say_what_a_file_is_and_never_advise_to_execute_it(name, legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, match = NO_CHECKPOINTS[name]
    path = tmp_path / f"{name}.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=match) as caught:
        adm.open_adm(path, head_dim=16, size=16, cache=False)
    assert str(path) in str(caught.value)
    messages = [str(caught.value)]
    try:
        weights.state_dict(path)
    except ValueError as error:
        messages.append(str(error))
    for message in messages:
        assert "`" not in message and "weights_only=False" not in message and "add_safe_globals" not in message
        assert len(message) < 600 + len(str(path))
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_checkpoints_fail_with_their_name_whatever_is_hit(legacy, tmp_path):
    whole = tmp_path / "whole.pt"
    torch.save(dict(list(Network().state.items())[:9]), whole, _use_new_zipfile_serialization=not legacy)
    data = whole.read_bytes()
    g = torch.Generator().manual_seed(0)
    refused = 0
    for n in range(120):
        near = data.index(b"time_embed") + int(torch.randint(0, 1200, (1,), generator=g))
        damaged = bytearray(data)
        damaged[near % len(data)] = int(torch.randint(0, 256, (1,), generator=g))
        path = tmp_path / f"damaged{n}.pt"
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=path.name) as caught:  # the rest of the network is not there
            adm.open_adm(path, head_dim=16, size=16, cache=False)
        refused += "read safely" in str(caught.value)
    assert refused > 20


def test_quantised_weights_are_refused(tmp_path):
    state = dict(Network().state)
    state["middle_block.0.in_layers.2.weight"] = torch.zeros(64, 64, 3, 3, dtype=torch.int8)
    message = error_of(state, tmp_path)
    assert "middle_block.0.in_layers.2.weight holds torch.int8" in message and "faulty.pt" in message


def test_classifiers_are_called_by_their_name(tmp_path):
    state = {name: x for name, x in Network().state.items() if not name.startswith(("output_blocks", "out."))}
    assert "a classifier" in error_of({**state, "out.2.qkv_proj.weight": torch.zeros(3, 3, 1)}, tmp_path)


def test_files_that_are_no_checkpoints_are_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"head_dim": 16, "size": 16, "cache": False}
    torch.save({"state": Bomb()}, "pickle.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        adm.open_adm("pickle.pt", **options)
    assert not (tmp_path / "bomb").exists()
    whole = saved(Network(), tmp_path).read_bytes()
    for name, data in {"cut.pt": whole[: len(whole) // 2], "empty.pt": b"", "cut.safetensors": b"\x10"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            adm.open_adm(name, **options)
    torch.save({"state_dict": Network().state}, "wrapped.pt")
    with pytest.raises(ValueError, match="no state dict but a dict with state_dict"):
        adm.open_adm("wrapped.pt", **options)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        adm.open_adm("nothing.pt", **options)


# ---- cache ----


def test_the_cache_is_made_once_read_back_and_keyed(tmp_path, monkeypatch):
    path = saved(Network(), tmp_path, "net.safetensors")
    options = {"head_dim": 16, "size": 16}
    first = adm.open_adm(path, **options)
    (file,) = tmp_path.glob("net.*.zsvr.safetensors")
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with monkeypatch.context() as patch:  # nothing is converted any more

        def refuse(*_: Any) -> Any:
            raise AssertionError("converted again")
            yield

        patch.setattr(adm, "_converted", refuse)
        second = adm.open_adm(path, **options)
    for name, x in first.model.state_dict().items():
        assert torch.equal(x, second.model.state_dict()[name]), name
    adm.open_adm(path, **options, qkv_order="new")
    adm.open_adm(path, **options, dtype=torch.bfloat16)
    assert len(list(tmp_path.glob("net.*.zsvr.safetensors"))) == 3
    folder = tmp_path / "elsewhere"
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        adm.open_adm(path, **options, cache=folder)
    folder.mkdir()
    adm.open_adm(path, **options, cache=folder)
    assert [p.name for p in folder.iterdir()] == [file.name]
    assert first.describe()["sha256"] == hash_file(path)
    network = Network(seed=5)
    safetensors_torch.save_file(network.state, str(path))
    third = adm.open_adm(path, **options)
    third.model.double()
    eps, _ = third.predict(frames().double(), 5)
    assert relative(eps, network(frames().double(), 5, "legacy")[:, :3]) < 1e-12


@pytest.mark.parametrize("fault", ["flipped bit", "cut short", "foreign", "empty", "renamed"])
def test_a_damaged_cache_is_noticed_and_made_anew(fault, tmp_path):
    path = saved(Network(), tmp_path)
    options = {"head_dim": 16, "size": 16}
    expected = adm.open_adm(path, **options).model.state_dict()
    (file,) = tmp_path.glob("*.zsvr.safetensors")
    data = bytearray(file.read_bytes())
    if fault == "flipped bit":
        data[-77] ^= 4
    elif fault == "cut short":
        del data[-100:]
    elif fault == "empty":
        data.clear()
    elif fault == "renamed":
        adm.open_adm(path, **options, qkv_order="new")
        data = bytearray(next(p for p in tmp_path.glob("*.zsvr.safetensors") if p != file).read_bytes())
    file.write_bytes(data)
    if fault == "foreign":
        safetensors_torch.save_file({"x": torch.zeros(1)}, str(file))
    with pytest.warns(UserWarning, match="made anew"):
        again = adm.open_adm(path, **options).model.state_dict()
    assert all(torch.equal(x, again[name]) for name, x in expected.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adm.open_adm(path, **options)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("is_named", [False, True])
def test_a_cache_that_cannot_be_written_says_what_to_do(is_named, tmp_path, monkeypatch):
    """In a folder that was named it is an error; beside a checkpoint, which may be another's folder, a warning."""
    path = saved(Network(), tmp_path)
    expected = adm.open_adm(path, head_dim=16, size=16, cache=False).model.state_dict()
    folder = tmp_path / "named"
    folder.mkdir()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    if is_named:
        with pytest.raises(OSError, match="cache=False"):
            adm.open_adm(path, head_dim=16, size=16, cache=folder)
    else:
        with pytest.warns(UserWarning, match="cache=False"):
            got = adm.open_adm(path, head_dim=16, size=16).model.state_dict()
        assert all(torch.equal(x, got[name]) for name, x in expected.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["named", "net.pt"] and not list(folder.iterdir())


@pytest.mark.parametrize("is_named", [False, True])
def test_a_cache_that_grows_too_large_for_the_disk_says_so(is_named, tmp_path):
    path = saved(Network(), tmp_path)
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes; the file would have three times as many
    try:
        if is_named:
            with pytest.raises(OSError, match="grew larger"):
                adm.open_adm(path, head_dim=16, size=16, cache=tmp_path)
        else:
            with pytest.warns(UserWarning, match="grew larger"):
                adm.open_adm(path, head_dim=16, size=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt"]


def test_a_cache_that_cannot_be_read_is_no_obstacle(tmp_path):
    path = saved(Network(), tmp_path)
    options = {"head_dim": 16, "size": 16}
    expected = adm.open_adm(path, **options).model.state_dict()
    (file,) = tmp_path.glob("*.zsvr.safetensors")
    file.unlink()
    file.mkdir()  # what cannot be read, or replaced, whoever runs the test
    with pytest.warns(UserWarning) as caught:
        got = adm.open_adm(path, **options).model.state_dict()
    assert [str(file) in str(w.message) for w in caught] == [True, True]
    assert all(torch.equal(x, got[name]) for name, x in expected.items())
