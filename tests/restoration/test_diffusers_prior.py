"""Priors opened from folders that diffusers saved: predictions, guidance, VAE, text, patching, faults."""

from __future__ import annotations

import json
import math

import diffusers
import pytest
import torch
import transformers
from adm_network import Network
from saved_folders import XL, latent_folder, pixel_folder

import zsvr_kernels as zk
from zsvr import priors
from zsvr.priors import diffusers_prior, text


def frames(n: int = 3, channels: int = 3, size: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


# ---- pixel models ----


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("prediction", diffusers_prior.PREDICTIONS)
def test_noise_follows_from_whatever_is_predicted(prediction, named, tmp_path):
    folder = pixel_folder(tmp_path, {"prediction_type": prediction if named else "epsilon"})
    prior = priors.open(folder, **({} if named else {"prediction": prediction}))
    assert isinstance(prior, priors.PixelPrior) and not prior.learns_variance
    assert (prior.size, prior.multiple, prior.factor, prior.branches) == ((16, 16), 2, 1, 1)
    x, step = frames(), 321
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=False)
    with torch.no_grad():
        eps, frac = prior.predict(x, step)
        out = prior.model(x, step).sample
    assert frac is None
    x0 = scheduler.step(out, step, x).pred_original_sample
    a = scheduler.alphas_cumprod[step]
    torch.testing.assert_close(a.sqrt() * x0 + (1 - a).sqrt() * eps, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((x - (1 - a).sqrt() * eps) / a.sqrt(), x0, rtol=1e-3, atol=1e-3)
    if prediction != "epsilon":
        assert not torch.allclose(eps, out)


def test_known_predictions_give_the_noise_that_was_added():
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    a = 0.3
    x = math.sqrt(a) * x0 + math.sqrt(1 - a) * noise
    outputs = {"epsilon": noise, "sample": x0, "v_prediction": math.sqrt(a) * noise - math.sqrt(1 - a) * x0}
    assert set(outputs) == set(diffusers_prior.PREDICTIONS)
    for prediction, out in outputs.items():
        torch.testing.assert_close(diffusers_prior.noise_from(out, x, a, prediction), noise, msg=prediction)


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
        {"rescale_betas_zero_snr": True},
    ],
)
def test_levels_are_those_of_the_scheduler(schedule, tmp_path):
    diffusers.DDPMScheduler(**schedule).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    bars = diffusers_prior.alphas_bar(config)
    expected = diffusers.DDPMScheduler(**schedule).alphas_cumprod
    assert bars.dtype == torch.float64
    torch.testing.assert_close(bars.float(), expected, rtol=1e-4, atol=1e-7)
    assert (bars >= diffusers_prior.SMALLEST_LEVEL).all() and (bars.diff() <= 0).all()


@pytest.mark.parametrize(
    "scheduler", [diffusers.FlowMatchEulerDiscreteScheduler, diffusers.ScoreSdeVeScheduler, diffusers.EDMEulerScheduler]
)
def test_schedules_without_betas_are_refused(scheduler, tmp_path):
    pixel_folder(tmp_path)
    scheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=f"{scheduler.__name__} has no betas"):
        priors.open(tmp_path)


@pytest.mark.parametrize(("variance", "learns"), [("learned_range", True), ("learned", False)])
def test_a_learned_variance_is_a_fraction(variance, learns, tmp_path):
    prior = priors.open(pixel_folder(tmp_path, {"variance_type": variance}, out_channels=6))
    x = frames()
    with torch.no_grad():
        eps, frac = prior.predict(x, 5)
        out = prior.model(x, 5).sample
    assert prior.learns_variance == learns
    torch.testing.assert_close(eps, out[:, :3], rtol=0, atol=0)
    if learns:
        torch.testing.assert_close(frac, (out[:, 3:] + 1) / 2, rtol=0, atol=0)
    else:
        assert frac is None


def test_class_conditional_pixel_models_take_a_label(tmp_path):
    pixel_folder(tmp_path, num_class_embeds=4)
    prior = priors.open(tmp_path, label=2)
    x = frames()
    with torch.no_grad():
        expected = prior.model(x, 7, class_labels=torch.tensor([2, 2, 2])).sample
        torch.testing.assert_close(prior.predict(x, 7)[0], expected, rtol=0, atol=0)
    for label in (None, 4, -1):
        with pytest.raises(ValueError, match=r"label=0\.\.3"):
            priors.open(tmp_path, label=label)


def test_a_bare_network_with_its_scheduler_beside_it_is_enough(tmp_path):
    pixel_folder(tmp_path / "whole")
    flat = tmp_path / "flat"
    flat.mkdir()
    for part in ("unet", "scheduler"):
        for file in (tmp_path / "whole" / part).iterdir():
            file.rename(flat / file.name)
    prior = priors.open(flat)
    assert isinstance(prior, priors.PixelPrior)
    with torch.no_grad():
        assert prior.predict(frames(), 0)[0].shape == (3, 3, 16, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_predicts_in_the_dtype_of_the_frames(dtype, tmp_path):
    folder = pixel_folder(tmp_path)
    half, whole = priors.open(folder, dtype=dtype), priors.open(folder)
    assert {p.dtype for p in half.model.parameters()} == {dtype}
    x = frames()
    with torch.no_grad():
        eps, expected = half.predict(x, 10)[0], whole.predict(x, 10)[0]
    assert eps.dtype == torch.float32
    assert 0 < float((eps - expected).norm() / expected.norm()) < 8 * torch.finfo(dtype).eps


# ---- latent models ----


def test_branches_are_outermost_and_guidance_is_their_extrapolation(tmp_path):
    prior = priors.open(latent_folder(tmp_path), prompt="a b", negative_prompt="c", guidance_scale=3.5)
    assert isinstance(prior, priors.LatentPrior)
    assert (prior.size, prior.factor, prior.multiple, prior.channels, prior.branches) == ((16, 16), 2, 2, 4, 2)
    x = frames(3, 4, 8)
    seen = {}
    handle = prior.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(x=args[0], tokens=kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        eps, frac = prior.predict(x, 77)
    handle.remove()
    torch.testing.assert_close(seen["x"], torch.cat((x, x)), rtol=0, atol=0)
    negative, positive = prior._condition.tokens
    assert not torch.allclose(negative, positive)
    for n in range(3):
        torch.testing.assert_close(seen["tokens"][n], negative, rtol=0, atol=0)
        torch.testing.assert_close(seen["tokens"][3 + n], positive, rtol=0, atol=0)
    with torch.no_grad():
        u, c = (
            prior.model(x, 77, encoder_hidden_states=e[None].expand(3, -1, -1)).sample for e in (negative, positive)
        )
    torch.testing.assert_close(eps, u + 3.5 * (c - u), rtol=1e-4, atol=1e-5)
    assert frac is None and not torch.allclose(u, c)


def test_one_branch_is_the_prompt_alone(tmp_path):
    folder = latent_folder(tmp_path, {"prediction_type": "v_prediction"})
    prior = priors.open(folder, prompt="a b")
    both = priors.open(folder, prompt="a b", guidance_scale=2.0)
    assert prior.branches == 1
    torch.testing.assert_close(prior._condition.tokens[0], both._condition.tokens[1])
    x = frames(2, 4, 8)
    with torch.no_grad():
        out = prior.model(x, 9, encoder_hidden_states=prior._condition.tokens.expand(2, -1, -1)).sample
        a = prior.level(9)
        expected = math.sqrt(a) * out + math.sqrt(1 - a) * x
        torch.testing.assert_close(prior.predict(x, 9)[0], expected, rtol=1e-5, atol=1e-6)


def test_text_is_encoded_as_the_pipeline_does(tmp_path):
    folder = latent_folder(tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        folder,
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=diffusers.PNDMScheduler.from_pretrained(folder / "scheduler"),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        local_files_only=True,
    )
    prompt, negative = pipeline.encode_prompt("ab c a", "cpu", 1, True, "b")
    prior = priors.open(folder, prompt="ab c a", negative_prompt="b", guidance_scale=2.0)
    torch.testing.assert_close(prior._condition.tokens, torch.cat((negative, prompt)))


def test_the_large_family_gets_both_encoders_and_the_sizes(tmp_path):
    folder = latent_folder(tmp_path, encoders=2, **XL)
    prior = priors.open(folder, prompt="a", guidance_scale=2.0)
    tokens, pooled = prior._condition.tokens, prior._condition.pooled
    assert tokens.shape == (2, 12, 32) and pooled.shape == (2, 20)
    assert not tokens[0].any() and not pooled[0].any(), "no negative prompt: zeros"
    ids = torch.tensor([[9, 5, *[10] * 10]])
    for n, suffix in enumerate(("", "_2")):
        kind = transformers.CLIPTextModelWithProjection if n else transformers.CLIPTextModel
        encoder = kind.from_pretrained(folder / f"text_encoder{suffix}").eval()
        with torch.no_grad():
            out = encoder(ids, output_hidden_states=True)
        torch.testing.assert_close(tokens[1:, :, 16 * n : 16 * n + 16], out.hidden_states[-2])
    torch.testing.assert_close(pooled[1:], out.text_embeds)
    assert priors.open(folder, prompt="a", negative_prompt="", guidance_scale=2.0)._condition.tokens[0].any()
    seen = {}
    prior.model.register_forward_pre_hook(lambda m, a, k: seen.update(k["added_cond_kwargs"]), with_kwargs=True)
    with torch.no_grad():
        prior.predict(frames(3, 4, 8)[:, :, :6], 3)
    assert seen["time_ids"].tolist() == [[12, 16, 0, 0, 12, 16]] * 6
    torch.testing.assert_close(seen["text_embeds"], pooled.repeat_interleave(3, 0), rtol=0, atol=0)


@pytest.mark.parametrize("config", [{}, XL])
def test_without_a_text_encoder_zeros_of_the_right_width_and_a_remark(config, tmp_path):
    prior = priors.open(latent_folder(tmp_path, encoders=0, **config))
    with torch.no_grad():
        assert torch.isfinite(prior.predict(frames(2, 4, 8), 5)[0]).all()
    assert not prior._condition.tokens.any()
    assert prior._condition.tokens.shape == (1, text.LENGTH, 32 if config else 16)
    described = prior.describe()
    assert "no text encoder" in described["remarks"][0]
    for options in ({"prompt": "a"}, {"guidance_scale": 2.0}, {"negative_prompt": "b"}):
        with pytest.raises(ValueError, match="has no text_encoder"):
            priors.open(tmp_path, **options)


def test_a_prompt_that_is_cut_off_is_remarked_upon(tmp_path):
    folder = latent_folder(tmp_path)
    assert priors.open(folder, prompt=" ".join("abc" for _ in range(3))).describe()["remarks"] == []
    (remark,) = priors.open(folder, prompt=" ".join("a" for _ in range(30))).describe()["remarks"]
    assert remark == "a prompt of 32 tokens was cut off after 12"


@pytest.mark.parametrize("shift", [None, 0.25])
def test_frames_go_through_the_vae_in_pieces(shift, tmp_path):
    folder = latent_folder(tmp_path, vae={"shift_factor": shift})
    prior = priors.open(folder, vae_frames=2)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").eval()
    u = frames(5).clamp(-1, 1)
    sizes = []
    prior.vae.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with torch.no_grad():
        z = prior.encode(u)
        expected = (vae.encode(u).latent_dist.mean - (shift or 0)) * 0.3
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(prior.decode(z), vae.decode(z / 0.3 + (shift or 0)).sample, rtol=1e-4, atol=1e-4)
    assert z.shape == (5, 4, 8, 8) and sizes == [2, 2, 1]
    with pytest.raises(ValueError, match="multiples of 2"):
        prior.encode(frames(1)[..., :15])


def test_encode_and_decode_are_differentiable(tmp_path):
    prior = priors.open(latent_folder(tmp_path))
    u = frames(2).clamp(-1, 1).requires_grad_(True)
    z = prior.encode(u)
    prior.decode(z).square().mean().backward()
    assert u.grad.abs().min(dim=0).values.max() > 0 and torch.isfinite(u.grad).all()
    assert not any(p.requires_grad for p in (*prior.vae.parameters(), *prior.model.parameters()))


def test_a_mean_and_deviation_of_each_channel_are_taken_off(tmp_path):
    """As diffusers' pipelines do for such VAEs: ``x = (z - mean) scaling_factor / std``."""
    mean, std = [-0.5, 0.25, 1.0, 0.0], [2.0, 1.0, 0.5, 3.0]
    prior = priors.open(latent_folder(tmp_path, vae={"latents_mean": mean, "latents_std": std}))
    u = frames(2).clamp(-1, 1)
    m, s = (torch.tensor(v)[:, None, None] for v in (mean, std))
    with torch.no_grad():
        z = prior.vae.encode(u).latent_dist.mean
        x = prior.encode(u)
        torch.testing.assert_close(x, (z - m) * 0.3 / s, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(prior.decode(x), prior.vae.decode(z).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "prediction"),
    [("adm", "epsilon"), *((kind, p) for kind in ("pixel", "latent") for p in diffusers_prior.PREDICTIONS)],
)
def test_gradients_are_those_of_what_is_computed(kind, prediction, tmp_path):
    """A host differentiates through predict and decode: against central differences, in float64."""
    if kind == "pixel":
        prior = priors.open(pixel_folder(tmp_path, {"prediction_type": prediction}, out_channels=6))
    elif kind == "latent":
        folder = latent_folder(tmp_path, {"prediction_type": prediction})
        prior = priors.open(folder, prompt="a", guidance_scale=2.5, vae_frames=1)
        prior.vae.double()
    else:
        torch.save(Network().state, tmp_path / "net.pt")
        prior = priors.open(tmp_path / "net.pt", head_dim=16, size=16, cache=False)
    prior.model.double()
    shape = (2, prior.channels, 16 // prior.factor, 16 // prior.factor)
    g = torch.Generator().manual_seed(2)
    x, along = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(shape, generator=g, dtype=torch.float64)
    image = torch.randn(2, 3, 16, 16, generator=g, dtype=torch.float64)

    def of_predict(x):
        eps, frac = prior.predict(x, 300)
        return (eps * weight).sum() + (0 if frac is None else (frac * weight).sum())

    def of_decode(x):
        return (prior.decode(x) * image).sum()

    for f in (of_predict, of_decode):
        x.requires_grad_(True)
        (gradient,) = torch.autograd.grad(f(x), x)
        with torch.no_grad():
            difference = (f(x + 1e-5 * along) - f(x - 1e-5 * along)) / 2e-5
        torch.testing.assert_close((gradient * along).sum(), difference, rtol=1e-5, atol=1e-6)
        assert (gradient.abs() > 0).all()


@pytest.mark.parametrize("kind", ["pixel", "latent", "adm"])
def test_gradients_of_half_networks_are_near_those_in_float32(kind, tmp_path):
    if kind == "adm":
        network = Network()
        for name, weight in network.state.items():
            if name.endswith(("out_layers.3.weight", "proj_out.weight")):
                weight.mul_(0.1)  # unlike a random network, a trained one does not blow rounding up
        torch.save(network.state, tmp_path / "net.pt")
        options = {"head_dim": 16, "size": 16, "cache": False}
        source = tmp_path / "net.pt"
    else:
        options = {}
        source = (pixel_folder if kind == "pixel" else latent_folder)(tmp_path)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        prior = priors.open(source, dtype=dtype, **options)
        x = frames(2, prior.channels, 16 // prior.factor).requires_grad_(True)
        eps, _ = prior.predict(x, 300)
        prior.decode(x - eps).square().mean().backward()
        gradients.append(x.grad)
    whole, half = gradients
    assert half.dtype == torch.float32
    assert 0 < float((half - whole).norm() / whole.norm()) < 8 * torch.finfo(torch.bfloat16).eps


# ---- patching ----


def test_the_patch_finds_the_attention_of_an_opened_model(tmp_path):
    flow = torch.zeros(1, 2, 2, 8, 8)
    prior = priors.open(latent_folder(tmp_path), prompt="a", guidance_scale=2.0)
    x = frames(3, 4, 8)
    with torch.no_grad():
        plain, _ = prior.predict(x, 5)
        with zk.patched(prior.model, zk.VideoContext(flow, flow), expected_count=4) as report:
            changed, _ = prior.predict(x, 5)
        assert {layer.name.rpartition(".")[2] for layer in report.patched} == {"attn1"}
        assert {layer.grid for layer in report.patched} == {(8, 8), (4, 4)}
        assert not torch.allclose(plain, changed)
        with zk.patched(prior.model, zk.VideoContext(flow[:, :0], flow[:, :0])):
            alone = torch.cat([prior.predict(x[n : n + 1], 5)[0] for n in range(3)])
    torch.testing.assert_close(alone, plain, rtol=1e-4, atol=1e-5)


def test_pixel_models_are_patched_too(tmp_path):
    prior = priors.open(pixel_folder(tmp_path))
    flow = torch.zeros(1, 2, 2, 16, 16)
    with torch.no_grad(), zk.patched(prior.model, zk.VideoContext(flow, flow), expected_count=4) as report:
        assert torch.isfinite(prior.predict(frames(), 5)[0]).all()
    assert {layer.grid for layer in report.patched} == {(8, 8)}


PUBLISHED = {
    "SD 1": ({"cross_attention_dim": 768, "attention_head_dim": 8}, 16),
    "SD 2": ({"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}, 16),
    "SDXL": (
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        70,
    ),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_known_networks_have_the_expected_number_of_self_attentions(name):
    config, count = PUBLISHED[name]
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(sample_size=64, **config)
    assert diffusers_prior.expected_count(model.config) == count
    context = zk.VideoContext(frames=2, options=zk.SLROptions(frames="previous", combine="cross"))
    with zk.patched(model, context, expected_count=count) as report:
        assert {layer.name.rpartition(".")[2] for layer in report.patched} == {"attn1"}
    pruned = {**model.config, "layers_per_block": 1}
    assert diffusers_prior.expected_count(pruned) is None
    assert diffusers_prior.expected_count({**pruned, "transformer_layers_per_block": [[1, 2], [3]]}) is None
