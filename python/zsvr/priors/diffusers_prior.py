"""Any diffusers folder as a prior: pixel U-Nets (UNet2DModel), and latent ones of the Stable Diffusion family."""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
from typing import Any

import torch
from torch import Tensor, nn

from zsvr import pretrained
from zsvr.files import hash_file, hash_tensors
from zsvr.priors import text
from zsvr.priors.base import Prior, sides
from zsvr.schedule import alphas_bar_from_config

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
SMALLEST_LEVEL = 2.0**-24  # abar of a schedule that ends in pure noise, so that x0 can be divided by its root

_SD_BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_SDXL_BLOCKS = ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2

# Self-attentions of known networks, by kinds of blocks, their channels, layers in a block, transformers in a layer.
EXPECTED_COUNTS: dict[tuple[Any, ...], int] = {
    (_SD_BLOCKS, (320, 640, 1280, 1280), 2, 1): 16,  # Stable Diffusion 1 and 2
    (_SDXL_BLOCKS, (320, 640, 1280), 2, (1, 2, 10)): 70,  # SDXL
}


def expected_count(config: Any) -> int | None:
    """Return how many self-attentions a U-Net of this configuration has, if it is a known one."""
    names = ("down_block_types", "block_out_channels", "layers_per_block", "transformer_layers_per_block")
    values = [config.get(name) for name in names]
    key = tuple(tuple(value) if isinstance(value, (list, tuple)) else value for value in values)
    try:
        return EXPECTED_COUNTS.get(key)
    except TypeError:  # nested lists: none of the known ones
        return None


def noise_from(out: Tensor, x: Tensor, level: float, prediction: str) -> Tensor:
    """Return the noise that a network's output means.

    ``epsilon``: the output; ``v_prediction``: ``sqrt(a) v + sqrt(1-a) x``; ``sample``: ``(x - sqrt(a) x0)/sqrt(1-a)``.

    Args:
        out, x: alike, the output and the noisy input. level: abar at the step.
    """
    if prediction == "epsilon":
        return out
    if prediction == "v_prediction":
        return math.sqrt(level) * out + math.sqrt(1 - level) * x
    return (x - math.sqrt(level) * out) / math.sqrt(1 - level)


class _DiffusersPrior(Prior):
    """What pixel and latent priors share."""

    def __init__(self, model: Any, schedule: dict[str, Any], prediction: str | None, facts: dict[str, Any]) -> None:
        self.model: nn.Module = model
        self.alphas_bar = alphas_bar(schedule)
        self.prediction = schedule.get("prediction_type") or "epsilon" if prediction is None else prediction
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")
        self.channels = model.config.in_channels
        if model.config.out_channels not in (self.channels, 2 * self.channels):
            raise ValueError(
                f"the network takes {self.channels} channels and gives {model.config.out_channels}: it is conditioned "
                "on another image (inpainting, upscaling, depth), and is no prior of images alone"
            )
        self._has_variance = model.config.out_channels == 2 * self.channels
        self.learns_variance = self._has_variance and schedule.get("variance_type") != "learned"
        self.expected_count = expected_count(model.config)
        self._facts = facts
        self._schedule = {name: schedule[name] for name in SCHEDULE if name in schedule}

    def _split(self, out: Tensor, x: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Return noise and variance fraction from the output for one branch."""
        out = out.to(x.dtype)
        variance = None
        if self._has_variance:
            out, second = out.chunk(2, dim=1)
            variance = (second + 1) / 2 if self.learns_variance else None
        return noise_from(out, x, self.level(step), self.prediction), variance

    @functools.cached_property
    def _hashes(self) -> dict[str, str]:
        if "unet" not in self._facts:  # a network that comes from no folder
            return {"state_dict": hash_tensors(self.model.state_dict())}
        folder = pathlib.Path(self._facts["unet"])
        files = sorted(p for p in folder.iterdir() if p.name.startswith("diffusion_pytorch_model"))
        return {p.name: hash_file(p) for p in files if p.suffix in (".safetensors", ".bin")}

    def describe(self) -> dict[str, Any]:
        """Return kind, path, hashes of the U-Net's weights, configuration, and remarks that a user should read."""
        config = {k: v for k, v in dict(self.model.config).items() if not k.startswith("_")}  # type: ignore[arg-type]
        return {
            **self._facts,
            "sha256": self._hashes,
            "prediction": self.prediction,
            "schedule": self._schedule,
            "size": list(self.size),
            "config": json.loads(json.dumps(config, default=str)),
        }


class PixelPrior(_DiffusersPrior):
    """A UNet2DModel that denoises images; see `open_diffusers`."""

    def __init__(
        self,
        model: Any,
        schedule: dict[str, Any],
        *,
        size: int | tuple[int, int] | None = None,
        prediction: str | None = None,
        label: int | None = None,
        facts: dict[str, Any],
    ) -> None:
        super().__init__(model, schedule, prediction, facts)
        if self.channels != 3:
            raise ValueError(f"the network denoises images of {self.channels} channels; a prior has 3")
        if model.config.time_embedding_type != "positional":
            raise ValueError(
                f"time embedding {model.config.time_embedding_type!r} belongs to another kind of diffusion"
            )
        classes = model.config.num_class_embeds
        if model.config.class_embed_type is not None or (classes is None and label is not None):
            raise ValueError(f"class_embed_type {model.config.class_embed_type!r}, {classes} classes, label {label}")
        if classes is not None and (label is None or not 0 <= label < classes):
            raise ValueError(f"the network is class-conditional: say label=0..{classes - 1}, got {label}")
        self.label = label
        self.size = _sides(size if size is not None else model.config.sample_size)
        self.multiple = 2 ** (len(model.config.block_out_channels) - 1)

    def predict(self, x: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Predict the noise, whatever the network predicts itself, and the variance fraction where it is learned."""
        model: Any = self.model
        inputs: dict[str, Tensor] = {}
        if self.label is not None:
            inputs["class_labels"] = torch.full((x.shape[0],), self.label, dtype=torch.long, device=x.device)
        return self._split(model(x.to(model.dtype), step, **inputs).sample, x, step)


class LatentPrior(_DiffusersPrior):
    """A UNet2DConditionModel that denoises the latents of an AutoencoderKL; see `open_diffusers`."""

    def __init__(
        self,
        model: Any,
        vae: Any,
        schedule: dict[str, Any],
        condition: text.TextCondition,
        *,
        size: int | tuple[int, int] | None = None,
        prediction: str | None = None,
        guidance_scale: float = 1.0,
        vae_frames: int = 4,
        facts: dict[str, Any],
    ) -> None:
        super().__init__(model, schedule, prediction, facts)
        config = model.config
        if config.class_embed_type is not None or config.num_class_embeds is not None:
            raise ValueError("the network takes class or noise-level labels (an upscaler), and is no prior of images")
        if config.addition_embed_type not in (None, "text_time") or config.encoder_hid_dim_type is not None:
            raise ValueError(
                f"conditioning by {config.addition_embed_type or config.encoder_hid_dim_type!r} is unknown"
            )
        if config.time_cond_proj_dim is not None:
            raise ValueError("the network is told its guidance (time_cond_proj_dim): a distilled one, and no prior")
        if vae.config.latent_channels != self.channels:
            raise ValueError(f"the VAE has {vae.config.latent_channels} latent channels, the U-Net {self.channels}")
        if not isinstance(vae_frames, int) or vae_frames < 1:
            raise ValueError(f"vae_frames must be a whole number, at least 1, got {vae_frames!r}")
        self.vae = vae
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.multiple = self.factor
        if size is None:
            height, width = _sides(config.sample_size)
            size = (height * self.factor, width * self.factor)
        self.size = _sides(size)
        self.branches = condition.tokens.shape[0]
        self.guidance_scale = guidance_scale
        self.vae_frames = vae_frames
        self._condition = condition

    def predict(self, x: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Predict the noise with classifier-free guidance: ``u + s (c - u)``; branches are outermost in the batch."""
        model: Any = self.model
        G, T = self.branches, x.shape[0]
        tokens = self._condition.tokens.to(x.device, model.dtype).repeat_interleave(T, 0)
        added: dict[str, Any] = {}
        if self._condition.pooled is not None:
            pixels = [float(n * self.factor) for n in x.shape[-2:]]
            sizes = torch.tensor([*pixels, 0.0, 0.0, *pixels], device=x.device).expand(G * T, 6)
            pooled = self._condition.pooled.to(x.device, model.dtype).repeat_interleave(T, 0)
            added["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        whole = x.to(model.dtype).repeat(G, 1, 1, 1)
        out = model(whole, step, encoder_hidden_states=tokens, **added).sample
        eps, variance = self._split(out[-T:], x, step)
        if G == 2:
            without, _ = self._split(out[:T], x, step)
            eps = without + self.guidance_scale * (eps - without)
        return eps, variance

    def encode(self, u: Tensor) -> Tensor:
        """Return the latents ``[T, C, H/f, W/f]`` of frames ``[T, 3, H, W]`` in [-1, 1]: the mode of the posterior."""
        if any(n % self.factor for n in u.shape[-2:]):
            raise ValueError(f"height and width must be multiples of {self.factor}, got {tuple(u.shape[-2:])}")
        scale, shift = self._latent_map()
        parts = u.to(self.vae.dtype).split(self.vae_frames)
        z = torch.cat([self.vae.encode(part).latent_dist.mode() for part in parts])
        return ((z - shift) * scale).to(u.dtype)

    def decode(self, x: Tensor) -> Tensor:
        """Return the frames of latents, not clipped."""
        scale, shift = self._latent_map()
        parts = (x.to(self.vae.dtype) / scale + shift).split(self.vae_frames)
        return torch.cat([self.vae.decode(part).sample for part in parts]).to(x.dtype)

    def _latent_map(self) -> tuple[float | Tensor, float | Tensor]:
        """Return scale and shift of ``x = (z - shift) * scale``; some VAEs have a mean and a deviation per channel."""
        config, scale = self.vae.config, float(self.vae.config.scaling_factor)
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is None or std is None:
            return scale, float(getattr(config, "shift_factor", None) or 0.0)
        weight = next(self.vae.parameters())
        mean, std = (torch.tensor(v, dtype=weight.dtype, device=weight.device)[:, None, None] for v in (mean, std))
        return scale / std, mean

    def describe(self) -> dict[str, Any]:
        """As other priors; also hashes of the VAE and the embedded prompts, guidance, and remarks on the prompts."""
        c = self._condition
        return {
            **super().describe(),
            "vae_sha256": hash_tensors(self.vae.state_dict()),
            "text_sha256": hash_tensors({"tokens": c.tokens, **({} if c.pooled is None else {"pooled": c.pooled})}),
            "guidance_scale": self.guidance_scale,
            "branches": self.branches,
            "remarks": list(self._condition.remarks),
        }


def alphas_bar(schedule: dict[str, Any]) -> Tensor:
    """Return the cumulative products of ``1 - beta`` of a scheduler's configuration, float64 ``[N]``.

    Raises:
        ValueError: it is no schedule of betas (flow matching, Karras et al., stochastic differential equations).
    """
    if schedule.get("beta_schedule") is None and schedule.get("trained_betas") is None:
        raise ValueError(
            f"the scheduler {schedule.get('_class_name', 'without a name')} has no betas: a prior must be a network of "
            "discrete-time diffusion (DDPM)"
        )
    return alphas_bar_from_config(schedule).clamp(min=SMALLEST_LEVEL)


def open_diffusers(
    path: str | os.PathLike[str],
    *,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    guidance_scale: float = 1.0,
    label: int | None = None,
    prediction: str | None = None,
    size: int | tuple[int, int] | None = None,
    variant: str | None = None,
    vae_frames: int = 4,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PixelPrior | LatentPrior:
    """Open a folder saved by diffusers as a prior. Local files only; safetensors first, never a pickle of objects.

    Args:
        path: a pipeline's folder (``unet``, ``scheduler``; latent models: ``vae``, and if they are there ``tokenizer``
            and ``text_encoder``, for SDXL also their second), or a U-Net's with a ``scheduler_config.json``.
        prompt, negative_prompt: of latent models; None is the empty one.
        guidance_scale: s of classifier-free guidance ``u + s (c - u)``; 1: none, and one branch.
        label: class to restore towards, of class-conditional pixel models.
        prediction: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``, instead of what the scheduler says.
        size: pixels of the training images, a side or (height, width), where the configuration does not say.
        variant: of the U-Net's weight files, as in ``diffusion_pytorch_model.fp16.safetensors``; of the others' too,
            where they have it.
        vae_frames: frames that the VAE takes at once.
        dtype: of the U-Net: float32, float16 or bfloat16. The VAE computes in float32.
        device: of the networks. Text encoders run once, on the CPU, and are let go.

    Raises:
        FileNotFoundError: a folder or file is missing, which one the message says.
        ValueError: a network that is no prior of images, or whose weights are damaged or not all there; a prompt
            without a text encoder; other wrong options.

    Example:
        >>> prior = open_diffusers("stable-diffusion-2-1-base", prompt="a sharp photo", guidance_scale=3.0)
        >>> latents = prior.encode(frames)
    """
    root = pathlib.Path(path)
    index = _json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    unet = _component(root, "unet", "config.json")
    schedule = _json(_component(root, "scheduler", "scheduler_config.json") / "scheduler_config.json")
    kind = _json(unet / "config.json").get("_class_name")
    facts = {"path": str(root), "unet": str(unet), "dtype": str(dtype).removeprefix("torch."), "variant": variant}
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    if kind == "UNet2DModel":
        if any(name in index or (root / name).is_dir() for name in ("vqvae", "vae")):
            raise ValueError(
                f"{root} is an unconditional latent model, which is not supported: only text-conditional are"
            )
        if prompt or negative_prompt or guidance_scale != 1:
            raise ValueError(f"{root} is a pixel model: it takes no prompt and no guidance")
        from diffusers import UNet2DModel

        pixel = pretrained.load(UNet2DModel, unet, dtype, variant=variant).to(device)
        facts["kind"] = "diffusers pixel"
        return PixelPrior(pixel, schedule, size=size, prediction=prediction, label=label, facts=facts)
    if kind != "UNet2DConditionModel":
        raise ValueError(f"{unet} holds a {kind}; a prior is a UNet2DModel or a UNet2DConditionModel")
    if label is not None:
        raise ValueError(f"{root} is a text-conditional model: it takes a prompt, no label (got {label})")
    vae_folder = _component(root, "vae", "config.json")
    vae_kind = _json(vae_folder / "config.json").get("_class_name")
    if vae_kind != "AutoencoderKL":
        raise ValueError(f"{vae_folder} holds a {vae_kind}, expected an AutoencoderKL")
    from diffusers import AutoencoderKL, UNet2DConditionModel

    latent = pretrained.load(UNet2DConditionModel, unet, dtype, variant=variant).to(device)
    condition = _condition(root, latent.config, index, prompt, negative_prompt, guidance_scale, variant)
    vae = pretrained.load(AutoencoderKL, vae_folder, torch.float32, variant=variant, is_variant_needed=False)
    facts |= {"kind": "diffusers latent", "prompt": prompt or "", "negative_prompt": negative_prompt}
    return LatentPrior(
        latent,
        vae.to(device),
        schedule,
        condition,
        size=size,
        prediction=prediction,
        guidance_scale=guidance_scale,
        vae_frames=vae_frames,
        facts=facts,
    )


def _condition(
    root: pathlib.Path,
    config: Any,
    index: dict[str, Any],
    prompt: str | None,
    negative_prompt: str | None,
    guidance_scale: float,
    variant: str | None,
) -> text.TextCondition:
    if not isinstance(guidance_scale, int | float) or not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale!r}")
    for words in (prompt, negative_prompt):
        if not isinstance(words, str | None):
            raise ValueError(f"prompt and negative_prompt must be text, got {words!r}")
    branches = 1 if guidance_scale == 1 else 2
    if (root / "text_encoder").is_dir() or (root / "text_encoder_2").is_dir():
        if negative_prompt and branches == 1:
            raise ValueError(
                "a negative_prompt does nothing without guidance: give guidance_scale above 1, or leave it out"
            )
        fills = bool(index.get("force_zeros_for_empty_prompt", True))
        return text.encode(
            root, config, prompt or "", negative_prompt, branches, zeros_for_no_negative=fills, variant=variant
        )
    if prompt or negative_prompt or branches == 2:
        raise ValueError(
            f"{root} has no text_encoder, so there are no prompts and no guidance: leave prompt, negative_prompt and "
            "guidance_scale out, or put text_encoder and tokenizer there"
        )
    return text.zeros(config, branches)


def _sides(size: Any) -> tuple[int, int]:
    if size is None:
        raise ValueError("the configuration does not say the size of the training images (sample_size): give size=...")
    return sides(size)


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object, got {type(found).__name__}")
    return found


def _component(root: pathlib.Path, name: str, config: str) -> pathlib.Path:
    """Return where a component lies: in its own folder, or (old layouts, bare networks) in the root."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    places = [root / name] if name == "vae" else [root / name, root]
    for folder in places:
        if (folder / config).is_file():
            return folder
    raise FileNotFoundError(
        f"{root} is no diffusers folder with a {name}: no {' and no '.join(str(p / config) for p in places)}"
    )
