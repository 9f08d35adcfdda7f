"""guided-diffusion's ADM checkpoints as a prior: converted exactly into diffusers' UNet2DModel.

Source: Dhariwal and Nichol 2021; ``256x256_diffusion_uncond.pt`` and relatives of openai/guided-diffusion.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zsvr import weights
from zsvr.files import hash_file
from zsvr.priors import weights_cache
from zsvr.priors.adm_layout import GROUPS, ADMLayout, check_keys, infer_layout, key_map
from zsvr.priors.base import Prior, sides
from zsvr.schedule import cosine_betas, linear_betas

ORDERS = ("legacy", "new")
SCHEDULES = ("linear", "cosine")
WRAPPED = "module."  # before every key, where DataParallel's wrapper was saved with the network
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_IN_TORSO = re.compile(r"\.(conv1|conv2|conv_shortcut|conv|to_q|to_k|to_v|to_out\.0)\.(weight|bias)$")


@dataclasses.dataclass(frozen=True)
class Published:
    """What a state dict cannot say, for the networks that guided-diffusion published."""

    size: int
    qkv_order: str = "legacy"
    head_dim: int | None = 64
    num_heads: int | None = None
    schedule: str = "linear"
    base_channels: int | None = None  # None: any


PUBLISHED = {  # by channel multipliers, finest level first
    (0.5, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0): Published(512),
    (1.0, 1.0, 2.0, 2.0, 4.0, 4.0): Published(256),
    (1.0, 1.0, 2.0, 3.0, 4.0): Published(128, head_dim=None, num_heads=4, base_channels=256),
    (1.0, 2.0, 3.0, 4.0): Published(64, qkv_order="new", schedule="cosine", base_channels=192),
}


def published(layout: ADMLayout) -> Published | None:
    """Return what is known of a published network with this layout, or None.

    improved-diffusion's networks have the same multipliers, but other heads, orders and steps: none is known.
    """
    known = PUBLISHED.get(layout.multipliers)
    if known is None or not (layout.has_residual_resampling and layout.has_scale_shift):
        return None
    return known if known.base_channels in (None, layout.base_channels) else None


def alphas_bar(schedule: str, steps: int) -> Tensor:
    """Return the cumulative products of ``1 - beta``, float64 ``[steps]``.

    Args:
        schedule: ``"linear"``: beta from ``1e-4 * 1000/steps`` to ``0.02 * 1000/steps`` (Ho et al. 2020);
            ``"cosine"`` (Nichol and Dhariwal 2021).
        steps: number of training steps N.

    Raises:
        ValueError: no such schedule, or too few steps: its noise would exceed what there is.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be the number of training steps, got {steps!r}")
    if schedule == "linear":
        beta = linear_betas(steps, 1e-4 * 1000 / steps, 0.02 * 1000 / steps)
    elif schedule == "cosine":
        beta = cosine_betas(steps)
    else:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if beta.max() >= 1:
        raise ValueError(f"a {schedule} schedule of {steps} steps reaches a beta of {float(beta.max()):.3g}: give more")
    return torch.cumprod(1 - beta, 0)


def split_qkv(x: Tensor, heads: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts for q, k and v of a joint projection's weight or bias ``[3C, ...]``, each ``[C, ...]``.

    Rows are ``(heads, 3, head_dim)`` in the legacy order, ``(3, heads, head_dim)`` in the new one.
    """
    shape, axis = ((heads, 3, -1), 1) if order == "legacy" else ((3, heads, -1), 0)
    q, k, v = (part.flatten(0, 1) for part in x.unflatten(0, shape).unbind(axis))
    return q, k, v


def join_qkv(parts: tuple[Tensor, Tensor, Tensor], heads: int, order: str) -> Tensor:
    """Return the joint projection ``[3C, ...]`` that `split_qkv` takes apart."""
    wide = [part.unflatten(0, (heads, -1)) for part in parts]
    return torch.stack(wide, 1 if order == "legacy" else 0).flatten(0, 2)


class ADMPrior(Prior):
    """An unconditional (or, with a label, class-conditional) ADM network; see `open_adm`.

    Attributes:
        layout: what the checkpoint's keys said.
        qkv_order: the order its attention projections were read in.
        label: class that is restored towards, or None.
        time_scale: times the training step is what the network is told.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ADMLayout,
        *,
        alphas_bar: Tensor,
        size: tuple[int, int],
        qkv_order: str,
        label: int | None,
        time_scale: float = 1.0,
        facts: dict[str, Any],
    ) -> None:
        self.model: nn.Module = model
        self.layout = layout
        self.alphas_bar = alphas_bar
        self.channels = layout.in_channels
        self.size = size
        self.multiple = 2 ** (layout.levels - 1)
        self.learns_variance = layout.learns_variance
        self.expected_count = layout.attentions
        self.qkv_order = qkv_order
        self.label = label
        self.time_scale = time_scale
        self._facts = facts

    def predict(self, x: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Predict the noise, and the variance fraction ``(v + 1) / 2`` as the network gives it (not clipped)."""
        self.level(step)
        model: Any = self.model
        inputs: dict[str, Tensor] = {}
        if self.label is not None:
            inputs["class_labels"] = torch.full((x.shape[0],), self.label, dtype=torch.long, device=x.device)
        time = torch.tensor([step * self.time_scale], dtype=torch.float32, device=x.device)
        out = model(x.to(model.dtype), time, **inputs).sample.to(x.dtype)
        if not self.learns_variance:
            return out, None
        eps, variance = out.chunk(2, dim=1)
        return eps, (variance + 1) / 2

    @torch.no_grad()
    def verify_order(self, image: Tensor, *, step: int = 300, seed: int = 0) -> dict[str, float]:
        """Check the order of q, k and v on an image: the right one predicts noise better.

        Args:
            image: ``[3, H, W]`` or ``[N, 3, H, W]`` in [-1, 1], like what the network was trained on.
            step: training step whose noise is added.
            seed: of the noise.

        Returns:
            mean squared error of the predicted noise by order. The weights are as before.

        Raises:
            ValueError: the other order is better.
        """
        device = next(self.model.parameters()).device
        x0 = image.to(device, torch.float32).reshape(-1, *image.shape[-3:])
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed)).to(device)
        a = self.level(step)
        x = math.sqrt(a) * x0 + math.sqrt(1 - a) * noise
        other = ORDERS[1 - ORDERS.index(self.qkv_order)]
        errors = {self.qkv_order: float((self.predict(x, step)[0] - noise).square().mean())}
        _reorder(self.model, self.qkv_order, other)
        try:
            errors[other] = float((self.predict(x, step)[0] - noise).square().mean())
        finally:
            _reorder(self.model, other, self.qkv_order)
        if not errors[self.qkv_order] < errors[other]:
            found = ", ".join(f"{name} {errors[name]:.4g}" for name in ORDERS)
            raise ValueError(
                f"qkv_order={self.qkv_order!r} predicts noise no better than {other!r} (squared error: {found}): open "
                f"the checkpoint with qkv_order={other!r}"
            )
        return errors

    def describe(self) -> dict[str, Any]:
        """Return kind, path, hash, options and layout."""
        return {
            "kind": "adm",
            **self._facts,
            "qkv_order": self.qkv_order,
            "label": self.label,
            "size": list(self.size),
            "layout": dataclasses.asdict(self.layout),
        }


def open_adm(
    path: str | os.PathLike[str],
    *,
    qkv_order: str | None = None,
    head_dim: int | None = None,
    num_heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    schedule: str | None = None,
    steps: int = 1000,
    rescale_timesteps: bool = False,
    label: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cache: str | os.PathLike[str] | bool = True,
) -> ADMPrior:
    """Open a guided-diffusion checkpoint as a prior. The conversion is exact; nothing in the file is executed.

    What the file cannot say has the value of the published network with the same layout unless it is given.

    Args:
        path: ``.pt`` (read with ``weights_only=True``) or ``.safetensors``, holding the network's state dict.
        qkv_order: ``"legacy"`` (rows of qkv are head by head q, k, v; the published 256 x 256 networks) or ``"new"``.
            The file cannot tell them apart and the wrong one fails silently: see `ADMPrior.verify_order`.
        head_dim: channels per head (64 in most); or
        num_heads: heads of every attention.
        size: pixels of the training images, a side or (height, width).
        schedule: of the noise, ``"linear"`` or ``"cosine"``.
        steps: number of training steps N.
        rescale_timesteps: the network is told ``1000/steps`` times the step, as in some of improved-diffusion.
        label: class to restore towards, for a class-conditional network.
        dtype: float32; float16 or bfloat16 for the torso's convolutions and attention, while norms, embeddings, the
            first and the last convolution stay float32.
        device: of the network.
        cache: the converted weights are kept as a file beside the checkpoint (True; a warning where that cannot be
            written), in a folder (its path), or not at all (False). The file is found by the checkpoint's hash and the
            options, and verified when it is read.

    Returns:
        The prior, its network in evaluation mode and without gradients of weights.

    Raises:
        FileNotFoundError: no such file, or the cache's folder does not exist.
        ValueError: the file holds something else; every key that does not fit is listed. An option is missing or wrong.
        OSError: the cache cannot be written to the folder that was named.

    Example:
        >>> prior = open_adm("256x256_diffusion_uncond.pt", dtype=torch.bfloat16, device="cuda")
        >>> eps, frac = prior.predict(frames, step=300)
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if head_dim is not None and num_heads is not None:
        raise ValueError(f"give head_dim or num_heads, not both: got {head_dim} and {num_heads}")
    checkpoint = _Checkpoint(path)
    try:
        layout = infer_layout(checkpoint.shapes)
        _check_use(layout, label)
        known = published(layout) or Published(0, head_dim=None)
        if not known.size and (size is None or head_dim is num_heads is None):
            raise ValueError(
                f"no published network has channel multipliers {layout.multipliers} on {layout.base_channels} "
                f"channels with {_manner(layout)}: say the size of its training images, size=..., and its heads, "
                "head_dim=... (most: 64) or num_heads=..., and if not legacy, linear and 1000: qkv_order=..., "
                "schedule=..., steps=... (improved-diffusion's networks have num_heads=4, some of them 1; those of "
                "4000 steps mostly rescale_timesteps=True)"
            )
        pixels = sides(known.size if size is None else size)
        if head_dim is None and num_heads is None:
            head_dim, num_heads = known.head_dim, known.num_heads
        order = known.qkv_order if qkv_order is None else qkv_order
        if order not in ORDERS:
            raise ValueError(f"qkv_order must be one of {', '.join(ORDERS)}, got {order!r}")
        schedule = known.schedule if schedule is None else schedule
        bars = alphas_bar(schedule, steps)
        with torch.device("meta"):
            model = _build(layout, head_dim, num_heads, pixels)
        unet_shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        keys = key_map(layout, unet_shapes)
        check_keys(checkpoint.shapes, keys, unet_shapes)
        heads = {name: module.heads for name, module in _attentions(model)}
        source = {"sha256": hash_file(path), "parameters": sum(map(math.prod, unet_shapes.values()))}
        options = {"qkv_order": order, "heads": sorted(heads.items()), "dtype": str(dtype)}
        made = _converted(checkpoint, keys, heads, order, dtype)
        folder = _cache_folder(path, cache)
        state = _cached(made, folder, path.stem, {**source, **options}, device, is_needed=cache is not True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model.load_state_dict(state, strict=True, assign=True)
    model.eval().requires_grad_(False)
    if dtype != torch.float32:
        _run_torso_in(model, dtype)
    facts = {"path": str(path), **source, "dtype": str(dtype).removeprefix("torch."), "schedule": schedule}
    facts |= {"head_dim": head_dim, "num_heads": num_heads, "steps": steps, "rescale_timesteps": rescale_timesteps}
    scale = 1000 / steps if rescale_timesteps else 1.0
    return ADMPrior(
        model, layout, alphas_bar=bars, size=pixels, qkv_order=order, label=label, time_scale=scale, facts=facts
    )


def _manner(layout: ADMLayout) -> str:
    resampling = "residual blocks" if layout.has_residual_resampling else "strided convolutions"
    return f"{resampling} that resample and a time embedding that {'scales' if layout.has_scale_shift else 'is added'}"


def _check_use(layout: ADMLayout, label: int | None) -> None:
    """Refuse networks that are no priors of RGB images, and labels that do not fit."""
    if layout.in_channels != 3:
        raise ValueError(
            f"the network takes {layout.in_channels} channels: it is conditioned on another image (an upsampler), or "
            "no network for RGB; a prior takes 3"
        )
    if layout.out_channels not in (3, 6):
        raise ValueError(f"the network gives {layout.out_channels} channels; expected 3, or 6 with a learned variance")
    if layout.classes is None and label is not None:
        raise ValueError(f"the network knows no classes, got label = {label}")
    if layout.classes is not None and label is None:
        raise ValueError(
            f"the network is class-conditional ({layout.classes} classes): say which, label=0..{layout.classes - 1}, "
            "or take an unconditional checkpoint"
        )
    if layout.classes is not None and not 0 <= (label or 0) < layout.classes:
        raise ValueError(f"label must be within 0..{layout.classes - 1}, got {label}")


def _build(layout: ADMLayout, head_dim: int | None, num_heads: int | None, size: tuple[int, int]) -> Any:
    from diffusers import UNet2DModel
    from diffusers.models.embeddings import TimestepEmbedding, Timesteps

    deepest = {layout.channels[i] for i in layout.attention_levels} | {layout.channels[-1]}
    per_head = num_heads if head_dim is None else head_dim
    wrong = [c for c in sorted(deepest) if not isinstance(per_head, int) or per_head < 1 or c % per_head]
    if wrong:
        name = "num_heads" if head_dim is None else "head_dim"
        raise ValueError(f"{name} = {per_head} does not divide the {wrong[0]} channels of an attention")
    model: Any = UNet2DModel(**layout.unet_config(head_dim or GROUPS, size))
    if layout.base_channels != layout.channels[0]:  # UNet2DModel takes both for the same
        model.time_proj = Timesteps(layout.base_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        model.time_embedding = TimestepEmbedding(layout.base_channels, layout.time_channels)
    if num_heads is not None:
        for _, module in _attentions(model):
            module.heads = module.sliceable_head_dim = num_heads
            module.scale = (module.inner_dim // num_heads) ** -0.5
    return model


def _attentions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "to_q"):
            yield name, module


def _reorder(model: nn.Module, order: str, other: str) -> None:
    """Permute q, k and v in place, from what ``order`` made of the checkpoint to what ``other`` makes of it."""
    for _, module in _attentions(model):
        for part in ("weight", "bias"):
            parts = tuple(getattr(layer, part).data for layer in (module.to_q, module.to_k, module.to_v))
            joint = join_qkv(parts, module.heads, order)  # type: ignore[arg-type]
            for old, new in zip(parts, split_qkv(joint, module.heads, other), strict=True):
                old.copy_(new)


class _Checkpoint:
    """Shapes and tensors of a checkpoint file; tensors are read when they are asked for."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._tensors: Mapping[str, Any] = {}
        self._file: Any = None
        if path.suffix == ".safetensors":
            import safetensors

            try:
                self._file = safetensors.safe_open(str(path), framework="pt", device="cpu")
            except safetensors.SafetensorError as error:
                why = weights.reason(path, error)
                raise ValueError(f"{path} is no safetensors file, or it is damaged: {why}") from error
            names = self._file.keys()
            shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}
        else:
            found = weights.load(path, mmap=zipfile.is_zipfile(path))
            _check_state_dict(path, found)
            self._tensors = found
            shapes = {name: tuple(x.shape) for name, x in found.items()}
        self._prefix = WRAPPED if all(name.startswith(WRAPPED) for name in shapes) else ""
        self.shapes = {name.removeprefix(self._prefix): shape for name, shape in shapes.items()}

    def check_sums(self) -> None:
        if self._file is None:
            weights.check_sums(self._path)

    def __getitem__(self, name: str) -> Tensor:
        name = self._prefix + name
        return self._tensors[name] if self._file is None else self._file.get_tensor(name)


def _check_state_dict(path: pathlib.Path, found: Any) -> None:
    """Refuse what holds no tensors by name, and say where within it they may be."""
    if isinstance(found, Mapping) and all(isinstance(k, str) and isinstance(x, Tensor) for k, x in found.items()):
        return
    inside, advice = "", "save the network's alone"
    if isinstance(found, Mapping):
        inside = f" with {', '.join(map(str, list(found)[:5]))}"
        within = [key for key, x in found.items() if isinstance(x, Mapping)]
        if within:
            pick = f"torch.load({path.name!r}, weights_only=True)[{within[-1]!r}]"
            which = "" if len(within) == 1 else f" (or another of {', '.join(map(str, within))})"
            advice += f', torch.save({pick}, "network.pt"){which}'
    raise ValueError(f"{path} holds no state dict but a {type(found).__name__}{inside}: {advice}")


def _converted(
    checkpoint: _Checkpoint,
    keys: Mapping[str, tuple[str, ...]],
    heads: Mapping[str, int],
    order: str,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the UNet2DModel one by one, so that no second copy of the checkpoint is held."""
    checkpoint.check_sums()
    for name, targets in keys.items():
        x = checkpoint[name]
        if not x.is_floating_point():
            raise ValueError(f"{name} holds {x.dtype}, expected floating point: quantised weights are not supported")
        if name.endswith((".qkv.weight", ".proj_out.weight")):
            x = x.squeeze(-1)
        parts = (x,) if len(targets) == 1 else split_qkv(x, heads[targets[0].rpartition(".to_q.")[0]], order)
        for target, part in zip(targets, parts, strict=True):
            yield target, part.to(dtype if _IN_TORSO.search(target) else torch.float32, copy=True).contiguous()


def _cache_folder(path: pathlib.Path, cache: str | os.PathLike[str] | bool) -> pathlib.Path | None:
    if isinstance(cache, bool):
        return path.parent if cache else None
    if not pathlib.Path(cache).is_dir():
        raise FileNotFoundError(f"cache must be a folder that exists, or False for none; {cache} is none")
    return pathlib.Path(cache)


def _cached(
    made: Iterator[tuple[str, Tensor]],
    folder: pathlib.Path | None,
    stem: str,
    facts: Mapping[str, Any],
    device: torch.device | str,
    *,
    is_needed: bool,
) -> dict[str, Tensor]:
    """Return the weights on the device, from the cache if it has them; else make them, and keep them there.

    Where they cannot be kept, that is an error if ``is_needed``, else a warning: checkpoints may lie in a folder of
    someone else's.
    """
    if folder is None:
        return {name: x.to(device) for name, x in made}
    file = weights_cache.cache_path(folder, stem, facts)
    if file.exists():
        try:
            return weights_cache.read(file, facts, device)
        except weights_cache.DamagedCacheError as error:
            warnings.warn(f"{error}; it is made anew", stacklevel=3)
    state = dict(made)
    try:
        weights_cache.write(file, state, facts)
    except OSError as error:
        advice = "name a folder that can be written to, cache=..., or none, cache=False"
        message = f"the converted weights cannot be kept as {file} ({error}): {advice}"
        if is_needed:
            raise OSError(message) from error
        warnings.warn(f"{message}; this time they are used as they are", stacklevel=3)
    return {name: state.pop(name).to(device) for name in list(state)}


def _run_torso_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a network whose torso has half weights run: norms compute in float32, what they give is cast."""

    def widen(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.float() for x in args)

    def narrow(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out.to(dtype)

    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(widen)
        is_norm_within = isinstance(module, nn.GroupNorm) and name != "conv_norm_out"
        if is_norm_within or name == "conv_in" or name.endswith(".time_emb_proj"):
            module.register_forward_hook(narrow)
