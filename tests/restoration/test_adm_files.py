"""Files of ADM checkpoints: faults, wrong uses, and the cache of converted weights."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from adm_network import Network, frames, relative, saved

from zsvr import files, weights
from zsvr.files import hash_file
from zsvr.priors import adm

pytest.importorskip("diffusers")
safetensors_torch = pytest.importorskip("safetensors.torch")


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


@pytest.mark.parametrize("has_sums", [True, False])
def test_a_bit_that_changed_in_a_weight_is_noticed(has_sums, tmp_path):
    """PyTorch reads such a file without a word; where a file has no checksums, nothing can be said."""
    path = tmp_path / "net.pt"
    torch.serialization.set_crc32_options(has_sums)
    try:
        torch.save(Network().state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    options = {"head_dim": 16, "size": 16, "cache": False}
    adm.open_adm(path, **options)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    if not has_sums:
        adm.open_adm(path, **options)
        return
    with pytest.raises(ValueError, match=r"net\.pt is damaged, net/data/\d+ in it"):
        adm.open_adm(path, **options)
    with pytest.raises(ValueError, match=r"net\.pt is damaged"):
        weights.state_dict(path)


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
