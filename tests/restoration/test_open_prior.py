"""Opening priors: what decides, what is refused, what a description says."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from adm_network import Network
from saved_folders import XL, diffusers, latent_folder, pixel_folder

from zsvr import priors
from zsvr.files import hash_file

safetensors_torch = pytest.importorskip("safetensors.torch")


def test_open_decides_by_what_the_path_is(tmp_path):
    folder = pixel_folder(tmp_path / "net")
    assert isinstance(priors.open(str(folder)), priors.PixelPrior)
    assert isinstance(priors.open(f"diffusers:{folder}"), priors.PixelPrior)
    with pytest.raises(FileNotFoundError, match=r"nothing.*embedded"):
        priors.open(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no folder"):
        priors.open(f"diffusers:{tmp_path / 'nothing'}")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        priors.open(f"adm:{tmp_path / 'nothing.pt'}")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    for source in (tmp_path / "other.pt", f"adm:{tmp_path / 'other.pt'}"):
        with pytest.raises(ValueError, match="guided-diffusion"):
            priors.open(source)
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ValueError, match="converted to such a folder"):
        priors.open(tmp_path / "model.ckpt")
    with pytest.raises(LookupError, match="no embedded prior"):
        priors.open("embedded")


def test_registered_names_call_their_factory(monkeypatch):
    monkeypatch.setattr(priors, "_factories", dict(priors._factories))
    made = []
    priors.register("mine", lambda **options: made.append(options))
    priors.open("mine", size=3)
    assert made == [{"size": 3}]
    for name in ("", "a/b", "a.pt", "adm:x"):
        with pytest.raises(ValueError, match="must not look like a path"):
            priors.register(name, lambda: None)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders that a name is looked up in, best first; nothing else of this machine counts."""
    folders = {name: tmp_path / name for name in ("weights", "cache/zsvr", "here")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    monkeypatch.setenv("ZSVR_WEIGHTS", str(folders["weights"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(folders["here"])
    return folders


def test_the_default_network_is_found_by_its_name(places, tmp_path, monkeypatch):
    options = {"head_dim": 16, "size": 16, "cache": False}
    for suffix, name in ((".safetensors", "here"), (".pt", "here"), (".pt", "cache/zsvr"), (".pt", "weights")):
        path = places[name] / f"256x256_diffusion_uncond{suffix}"
        if suffix == ".pt":
            torch.save(Network().state, path)
        else:
            safetensors_torch.save_file(Network().state, str(path))
        prior = priors.open("adm256", **options)
        assert isinstance(prior, priors.ADMPrior) and prior.size == (16, 16)
        assert prior.describe()["path"] == str(path)
    monkeypatch.delenv("ZSVR_WEIGHTS")
    assert priors.open("adm256", **options).describe()["path"] == str(places["cache/zsvr"] / path.name)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert priors.open("adm256", **options).describe()["path"] == str(places["here"] / path.name)
    home = tmp_path / "home" / ".cache" / "zsvr"
    home.mkdir(parents=True)
    torch.save(Network().state, home / path.name)
    assert priors.open("adm256", **options).describe()["path"] == str(home / path.name)
    with pytest.raises(ValueError, match="no published network"):  # this one is tiny, and options are passed on
        priors.open("adm256")


def test_the_default_network_that_is_nowhere_says_what_to_do(places):
    (places["here"] / "256x256_diffusion_uncond.pt").mkdir()  # no file
    with pytest.raises(FileNotFoundError) as caught:
        priors.open("adm256")
    message = str(caught.value)
    for part in (*map(str, places.values()), "256x256_diffusion_uncond.pt", "openai/guided-diffusion", "2.1 GiB"):
        assert part in message, part
    assert '"256x256 unconditional"' in message and "--prior PATH" in message and "README" in message
    with pytest.raises(FileNotFoundError, match="adm256, embedded"):
        priors.open("adm25")


def break_json(folder: Any, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("config", "options", "match"),
    [
        ({"in_channels": 1, "out_channels": 1}, {}, "images of 1 channels"),
        ({"out_channels": 4}, {}, "conditioned on another image"),
        ({"sample_size": None}, {}, "give size="),
        ({}, {"prompt": "a"}, "takes no prompt"),
        ({}, {"guidance_scale": 2.0}, "takes no prompt"),
        ({}, {"label": 1}, "label 1"),
        ({}, {"prediction": "x0"}, "epsilon, v_prediction, sample"),
        ({}, {"dtype": torch.float64}, "float32, float16 or bfloat16"),
        ({"time_embedding_type": "fourier"}, {}, "another kind of diffusion"),
    ],
)
def test_pixel_models_that_are_no_priors_are_refused(config, options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        priors.open(pixel_folder(tmp_path, **config), **options)


@pytest.mark.parametrize(
    ("config", "options", "match"),
    [
        ({"in_channels": 9}, {}, "takes 9 channels and gives 4"),
        ({"num_class_embeds": 10}, {}, "an upscaler"),
        ({"time_cond_proj_dim": 16}, {}, "a distilled one"),
        ({"cross_attention_dim": 24}, {}, "give width 16, the U-Net takes 24"),
        ({"vae": {"latent_channels": 3}}, {}, "3 latent channels, the U-Net 4"),
        ({}, {"label": 1}, "takes a prompt, no label"),
        ({}, {"vae_frames": 0}, "vae_frames must be a whole number, at least 1"),
        ({}, {"vae_frames": 1.5}, "vae_frames must be a whole number, at least 1"),
        ({}, {"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({}, {"guidance_scale": "2"}, "guidance_scale must be a finite number, got '2'"),
        ({}, {"prompt": ["a"]}, "must be text"),
        ({}, {"prompt": "a", "negative_prompt": "b"}, "does nothing without guidance"),
        ({}, {"size": "16"}, "size must be a side"),
        ({}, {"size": 0}, "size must be a side"),
        ({"encoders": 1, **XL, "cross_attention_dim": 16}, {}, "the encoders give none"),
    ],
)
def test_latent_models_that_are_no_priors_are_refused(config, options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        priors.open(latent_folder(tmp_path, **config), **options)


def test_missing_and_broken_files_are_named(tmp_path):
    folder = latent_folder(tmp_path)
    (folder / "tokenizer").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="needs its tokenizer"):
        priors.open(folder)
    (tmp_path / "away").rename(folder / "tokenizer")
    break_json(folder, "text_encoder/config.json", architectures=["T5EncoderModel"])
    with pytest.raises(ValueError, match="T5EncoderModel"):
        priors.open(folder)
    break_json(folder, "text_encoder/config.json", architectures=["CLIPTextModel"])
    break_json(folder, "vae/config.json", _class_name="VQModel")
    with pytest.raises(ValueError, match="holds a VQModel"):
        priors.open(folder)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no diffusers folder with a vae"):
        priors.open(folder)
    break_json(folder, "unet/config.json", _class_name="FluxTransformer2DModel")
    with pytest.raises(ValueError, match="FluxTransformer2DModel"):
        priors.open(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"scheduler_config\.json is no JSON"):
        priors.open(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="with a scheduler"):
        priors.open(folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="with a unet"):
        priors.open(folder)


def test_unconditional_latent_models_are_refused(tmp_path):
    break_json(pixel_folder(tmp_path), "model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(ValueError, match="unconditional latent model"):
        priors.open(tmp_path)
    (tmp_path / "model_index.json").unlink()
    assert isinstance(priors.open(tmp_path), priors.PixelPrior)
    (tmp_path / "vqvae").mkdir()
    with pytest.raises(ValueError, match="unconditional latent model"):
        priors.open(tmp_path)


def test_weights_of_a_variant_are_asked_for_by_name(tmp_path):
    folder = pixel_folder(tmp_path)
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match="variant='fp16'"):
        priors.open(folder)
    prior = priors.open(folder, variant="fp16")
    assert list(prior.describe()["sha256"]) == ["diffusion_pytorch_model.fp16.safetensors"]
    next((folder / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        priors.open(folder)


class Bomb:
    def __reduce__(self) -> Any:
        return (exec, ("import pathlib; pathlib.Path('bomb').touch()",))


def test_pickles_of_objects_are_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = pixel_folder(tmp_path)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({"conv_in.weight": Bomb()}, weights.with_suffix(".bin"))
    with pytest.raises(Exception, match=r"(?i)weights|unpickl|load"):
        priors.open(folder)
    assert not (tmp_path / "bomb").exists()


def test_a_description_says_what_a_run_needs_to_know(tmp_path):
    folder = latent_folder(tmp_path)
    prior = priors.open(folder, prompt="a", guidance_scale=2.0)
    described = json.loads(json.dumps(prior.describe()))
    assert described["kind"] == "diffusers latent" and described["prompt"] == "a"
    assert described["path"] == str(folder) and described["guidance_scale"] == 2.0
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    assert described["sha256"] == {file.name: hash_file(file)}
    assert described["config"]["cross_attention_dim"] == 16
    assert described["remarks"] == []


def test_steps_outside_the_schedule_are_refused(tmp_path):
    prior = priors.open(pixel_folder(tmp_path))
    for step in (-1, 1000):
        with pytest.raises(ValueError, match=r"0\.\.999"):
            prior.predict(torch.zeros(1, 3, 16, 16), step)


def test_importing_priors_imports_none_of_the_libraries():
    code = (
        "import sys, zsvr.priors, zsvr.temporal, zsvr.temporal.semantic; "
        "sys.exit(', '.join({'diffusers', 'transformers', 'safetensors', 'cv2', 'av'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- weights that are not all there, or not what they are said to be ----


def change_weights(folder: Any, change: Any) -> None:
    (file,) = folder.glob("*.safetensors")
    tensors = safetensors_torch.load_file(str(file))
    change(tensors)
    safetensors_torch.save_file(tensors, str(file), {"format": "pt"})


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("unet", "mid_block.resnets.0.conv1.weight"),
        ("vae", "decoder.conv_out.weight"),
        ("text_encoder", "encoder.layers.0.mlp.fc1.weight"),
        ("text_encoder_2", "text_projection.weight"),
    ],
)
def test_weights_that_are_missing_are_named_and_never_random(part, key, tmp_path):
    folder = latent_folder(tmp_path, encoders=2, **XL)
    name = next(k for k in safetensors_torch.load_file(next((folder / part).glob("*.safetensors"))) if k.endswith(key))
    change_weights(folder / part, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=rf"{part} lacks weights of the \w+: .*{key}"):
        priors.open(folder, prompt="a")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_of_another_network_are_named(part, tmp_path):
    folder = latent_folder(tmp_path)
    change_weights(folder / part, lambda tensors: tensors.update({"more.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=rf"{part} has weights that .* does not have: more\.weight"):
        priors.open(folder)
    change_weights(folder / part, lambda tensors: (tensors.pop("more.weight"), tensors.pop("conv_in.bias", None)))
    if part == "unet":
        change_weights(folder / part, lambda tensors: tensors.update({"conv_in.bias": torch.zeros(3)}))
        with pytest.raises(ValueError, match=r"unet: .*conv_in\.bias expected shape"):
            priors.open(folder)


def test_every_part_is_read_from_its_files_of_a_variant_where_it_has_them(tmp_path):
    folder = latent_folder(tmp_path)
    expected = priors.open(folder, prompt="a")._condition.tokens
    for n, part in enumerate(("unet", "text_encoder", "vae")):
        (file,) = (folder / part).glob("*.safetensors")
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
        prior = priors.open(folder, prompt="a", variant="fp16")
        assert torch.equal(prior._condition.tokens, expected), n
    with pytest.raises(FileNotFoundError, match=r"unet has weights of fp16, none of 'bf16'"):
        priors.open(folder, variant="bf16")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files(variant, tmp_path):
    folder = pixel_folder(tmp_path)
    network = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    next((folder / "unet").glob("*.safetensors")).unlink()
    network.save_pretrained(folder / "unet", max_shard_size="300KB", variant=variant)
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1
    opened = priors.open(folder, variant=variant).model.state_dict()
    assert all(torch.equal(x, opened[name]) for name, x in network.state_dict().items())
    if variant:
        with pytest.raises(FileNotFoundError, match="variant='fp16'"):
            priors.open(folder)


def as_bin(part: Any) -> Any:
    (file,) = part.glob("*.safetensors")
    old = file.with_name("pytorch_model.bin" if file.name == "model.safetensors" else f"{file.stem}.bin")
    torch.save(safetensors_torch.load_file(str(file)), old)
    file.unlink()
    return old


def test_folders_of_older_files_open_alike_and_without_alarm(tmp_path, monkeypatch):
    folder = latent_folder(tmp_path)
    before = priors.open(folder, prompt="a")
    for part in ("unet", "vae", "text_encoder"):
        as_bin(folder / part)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [handler])
    after = priors.open(folder, prompt="a")
    assert said == []
    assert torch.equal(before._condition.tokens, after._condition.tokens)
    for one, other in ((before.model, after.model), (before.vae, after.vae)):
        assert all(torch.equal(x, other.state_dict()[name]) for name, x in one.state_dict().items())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("fault", ["cut", "pointer", "objects"])
def test_damaged_weights_say_which_file_and_what_it_is(part, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = latent_folder(tmp_path)
    (file,) = (folder / part).glob("*.safetensors")
    if fault == "objects":
        file = as_bin(folder / part)
        torch.save({"a": Bomb()}, file)
    elif fault == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2\n")
    match = {"cut": "damaged", "pointer": "Git LFS", "objects": "more than tensors"}[fault]
    with pytest.raises(ValueError, match=match) as caught:
        priors.open(folder, prompt="a")
    message = str(caught.value)
    assert file.name in message and f"{part}" in message and "weights_only" not in message
    assert not (tmp_path / "bomb").exists()


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path):
    folder = latent_folder(tmp_path)
    (folder / "tokenizer" / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no vocabulary"):
        priors.open(folder, prompt="a")
    (folder / "text_encoder" / "config.json").write_text("{")
    (folder / "tokenizer" / "vocab.json").touch()
    with pytest.raises(ValueError, match=r"text_encoder/config\.json is no JSON"):
        priors.open(folder, prompt="a")


def test_a_description_tells_runs_apart_that_differ_in_anything(tmp_path):
    folder = latent_folder(tmp_path)
    one = priors.open(folder, prompt="a").describe()
    assert one == priors.open(folder, prompt="a").describe()
    assert one["schedule"]["beta_schedule"] == "scaled_linear"
    assert one["text_sha256"] != priors.open(folder, prompt="b").describe()["text_sha256"]
    change_weights(folder / "vae", lambda tensors: tensors["decoder.conv_out.bias"].add_(1))
    other = priors.open(folder, prompt="a").describe()
    assert other["vae_sha256"] != one["vae_sha256"] and other["sha256"] == one["sha256"]
    change_weights(folder / "text_encoder", lambda tensors: next(iter(tensors.values())).add_(1))
    assert priors.open(folder, prompt="a").describe()["text_sha256"] != one["text_sha256"]
