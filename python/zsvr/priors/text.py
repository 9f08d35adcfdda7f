"""What a Stable Diffusion U-Net gets beside the image: embeddings of prompts, or zeros where there is no encoder."""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsvr import pretrained

ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
VOCABULARIES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
LENGTH = 77  # tokens of a prompt, where no tokenizer says


@dataclass(frozen=True)
class TextCondition:
    """Embeddings of the branches of classifier-free guidance, the conditional one last.

    Attributes:
        tokens: ``[G, L, W]``. pooled: ``[G, V]``, or None where the U-Net takes none.
        remarks: what the user should know.
    """

    tokens: Tensor
    pooled: Tensor | None
    remarks: tuple[str, ...] = ()


def pooled_width(config: Any) -> int | None:
    """Return the width of the pooled embedding a U-Net takes beside six sizes (SDXL), or None."""
    if config.get("addition_embed_type") != "text_time":
        return None
    return int(config["projection_class_embeddings_input_dim"]) - 6 * int(config["addition_time_embed_dim"])


def zeros(config: Any, branches: int) -> TextCondition:
    """Return zero embeddings of the width that a U-Net of this configuration takes."""
    width = config["cross_attention_dim"]
    if not isinstance(width, int):
        raise ValueError(f"a U-Net whose layers take text of different widths is not supported: {width}")
    pooled = pooled_width(config)
    return TextCondition(
        torch.zeros(branches, LENGTH, width),
        None if pooled is None else torch.zeros(branches, pooled),
        ("there is no text encoder: the network gets zero embeddings, which it was not trained with",),
    )


@torch.no_grad()
def encode(
    root: pathlib.Path,
    config: Any,
    prompt: str,
    negative_prompt: str | None,
    branches: int,
    *,
    zeros_for_no_negative: bool = True,
    variant: str | None = None,
) -> TextCondition:
    """Encode a prompt with the text encoders of a folder, and before it the negative one if there are two branches.

    Args:
        root: folder with ``text_encoder`` and ``tokenizer`` (SDXL: and ``text_encoder_2``, ``tokenizer_2``).
        config: of the U-Net.
        prompt, negative_prompt: may be empty.
        branches: 1 or 2.
        zeros_for_no_negative: SDXL's embeddings of a negative prompt that is not given are zeros.
        variant: of the encoders' weights, where they have it.

    Raises:
        FileNotFoundError: an encoder without its weights, or without its tokenizer or the files of it.
        ValueError: an encoder of another kind, of another width, or whose weights are damaged or not all there.
    """
    is_xl = config.get("addition_embed_type") == "text_time"
    suffixes = [s for s in ("", "_2") if (root / f"text_encoder{s}").is_dir()]
    texts = [prompt] if branches == 1 else [negative_prompt or "", prompt]
    tokens, pooled, remarks = [], None, []
    for suffix in suffixes:
        hidden, projected, cut = _encode_with(root, suffix, texts, is_xl, variant)
        remarks += [remark for remark in cut if remark not in remarks]
        tokens.append(hidden)
        pooled = projected if projected is not None else pooled
    joined = torch.cat(tokens, -1)
    width = config["cross_attention_dim"]
    if joined.shape[-1] != width:
        raise ValueError(f"the text encoders in {root} give width {joined.shape[-1]}, the U-Net takes {width}")
    if not is_xl:
        return TextCondition(joined, None, tuple(remarks))
    if pooled is None or pooled.shape[-1] != pooled_width(config):
        got = "none" if pooled is None else f"width {pooled.shape[-1]}"
        raise ValueError(f"the U-Net takes a pooled embedding of width {pooled_width(config)}, the encoders give {got}")
    if branches == 2 and negative_prompt is None and zeros_for_no_negative:
        joined[0], pooled[0] = 0.0, 0.0
    return TextCondition(joined, pooled, tuple(remarks))


def _encode_with(
    root: pathlib.Path, suffix: str, texts: list[str], is_xl: bool, variant: str | None
) -> tuple[Tensor, Tensor | None, list[str]]:
    """Return token embeddings, the pooled one, and remarks on what was cut off."""
    import transformers

    folder, vocabulary = root / f"text_encoder{suffix}", root / f"tokenizer{suffix}"
    if not vocabulary.is_dir():
        raise FileNotFoundError(f"{folder} needs its tokenizer, {vocabulary}")
    if not any(all((vocabulary / name).is_file() for name in names) for names in VOCABULARIES):
        raise FileNotFoundError(
            f"{vocabulary} has no vocabulary: expected {' or '.join(map(' and '.join, VOCABULARIES))}"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    try:
        name = (json.loads((folder / "config.json").read_text()).get("architectures") or ["CLIPTextModel"])[0]
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{folder / 'config.json'} is no JSON: {error}") from error
    if name not in ENCODERS:
        raise ValueError(f"{folder} holds a {name}; text encoders that are supported: {', '.join(ENCODERS)}")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(str(vocabulary), local_files_only=True)
    kind = getattr(transformers, name)
    encoder = pretrained.load(
        kind, folder, torch.float32, variant=variant, is_variant_needed=False, has_other_parts=True
    )
    length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    mask = batch.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    out = encoder(batch.input_ids, attention_mask=mask, output_hidden_states=is_xl)
    lengths = [len(tokenizer(words).input_ids) for words in texts]
    cut = [f"a prompt of {n} tokens was cut off after {length}" for n in lengths if n > length]
    if not is_xl:
        return out.last_hidden_state, None, cut
    return out.hidden_states[-2], getattr(out, "text_embeds", None), cut
