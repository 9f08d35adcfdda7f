"""The image encoder of the semantic level of temporal guidance: CLIP's, from a local folder, or any other."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zsvr import pretrained

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, where a folder does not say
STD = (0.26862954, 0.26130258, 0.27577711)


def resize_bicubic(u: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize frames ``[T, C, H, W]`` with the antialiased cubic kernel, as ``torch.nn.functional.interpolate`` does.

    Both axes are matrix products, so that gradients are summed in a fixed order on GPUs too.
    """

    def matrix(source: int, target: int) -> Tensor:
        eye = torch.eye(source, dtype=torch.float64)[None, None]
        wide = torch.nn.functional.interpolate(eye, (target, source), mode="bicubic", antialias=True)
        return wide[0, 0].to(u)

    return matrix(u.shape[-2], size[0]) @ u @ matrix(u.shape[-1], size[1]).mT


def embedding_of(output: Any) -> Tensor:
    """Return the image embedding in what an encoder returned: a tensor, ``image_embeds`` or ``pooler_output``.

    transformers 5 returns an output object from ``get_image_features``, where 4 returned the tensor.
    """
    for name in ("image_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, Tensor):
        return output
    raise TypeError(
        f"the image encoder returned a {type(output).__name__} without image_embeds or pooler_output; expected a "
        "tensor [T, E] or an object with one of them"
    )


class SemanticEncoder:
    """Embeds frames: resized, normalised, encoded. ``encoder(u [T, 3, H, W] in [0, 1]) -> [T, E]``, differentiable.

    Args:
        model: a module with ``get_image_features(pixel_values=...)``, or called as ``model(pixel_values=...)``, or
            with pixels alone if it takes no such name.
        size: (height, width) it takes.
        mean, std: of its normalisation, per channel.
    """

    def __init__(
        self,
        model: nn.Module,
        size: tuple[int, int] = (224, 224),
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.size = size
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, u: Tensor) -> Tensor:
        weight = next(self.model.parameters(), u)
        pixels = resize_bicubic(u, self.size).to(weight)
        mean, std = (
            torch.tensor(v, dtype=pixels.dtype, device=pixels.device)[:, None, None] for v in (self.mean, self.std)
        )
        pixels = (pixels - mean) / std
        model: Any = self.model
        if hasattr(model, "get_image_features"):
            return embedding_of(model.get_image_features(pixel_values=pixels))
        if getattr(model, "main_input_name", None) == "pixel_values":
            return embedding_of(model(pixel_values=pixels))
        return embedding_of(model(pixels))


def open_clip_encoder(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> SemanticEncoder:
    """Open the image side of a CLIP model that transformers saved in a local folder.

    Args:
        path: folder with ``config.json``, weights (safetensors first) and maybe ``preprocessor_config.json``.
        dtype, device: of the network.

    Raises:
        FileNotFoundError: no such folder, or it has no ``config.json`` or no weights.
        ValueError: it holds another kind of model, or weights of the image side are damaged or missing.
    """
    folder = pathlib.Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no folder of a CLIP model: it has no config.json")
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ValueError(f"{folder} holds a model of type {kind!r}, expected 'clip' or 'clip_vision_model'")
    import transformers

    if kind == "clip":
        both: Any = transformers.CLIPConfig.from_pretrained(str(folder), local_files_only=True)
        config: Any = both.vision_config
        config.projection_dim = both.projection_dim
    else:
        config = transformers.CLIPVisionConfig.from_pretrained(str(folder), local_files_only=True)
    encoder = transformers.CLIPVisionModelWithProjection
    model = pretrained.load(encoder, folder, dtype, config=config, has_other_parts=True)  # the text side is left out
    side = int(model.config.image_size)
    preprocessor = folder / "preprocessor_config.json"
    facts = json.loads(preprocessor.read_text()) if preprocessor.is_file() else {}
    mean, std = facts.get("image_mean", MEAN), facts.get("image_std", STD)
    return SemanticEncoder(model.to(device), (side, side), mean, std)
