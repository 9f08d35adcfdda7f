"""Folders of tiny random models, as diffusers saves them."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest
import torch

from zsvr import encoders

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WORDS = ["!", "a", "b", "c", "!</w>", "a</w>", "b</w>", "c</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]


def pixel_folder(folder: Any, schedule: dict[str, Any] | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        **{
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            **config,
        }
    )
    unet.save_pretrained(folder / "unet")
    diffusers.DDPMScheduler(**(schedule or {})).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]})
    )
    return folder


def latent_folder(
    folder: Any,
    schedule: dict[str, Any] | None = None,
    encoders: int = 1,
    vae: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    torch.manual_seed(0)
    is_xl = config.get("addition_embed_type") == "text_time"
    unet = diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 8,
            "cross_attention_dim": 32 if is_xl else 16,
            **config,
        }
    )
    unet.save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(
        **{
            "block_out_channels": (32, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "scaling_factor": 0.3,
            **(vae or {}),
        }
    ).save_pretrained(folder / "vae")
    diffusers.PNDMScheduler(
        **{"beta_schedule": "scaled_linear", "steps_offset": 1, "skip_prk_steps": True, **(schedule or {})}
    ).save_pretrained(folder / "scheduler")
    for n in range(encoders):
        suffix = "_2" if n else ""
        kind = transformers.CLIPTextModelWithProjection if n else transformers.CLIPTextModel
        settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
        ids = {"bos_token_id": 9, "eos_token_id": 10, "pad_token_id": 10}
        encoder = kind(
            transformers.CLIPTextConfig(**settings, **ids, vocab_size=11, max_position_embeddings=12, projection_dim=20)
        )
        encoder.save_pretrained(folder / f"text_encoder{suffix}")
        words = folder / f"tokenizer{suffix}"
        words.mkdir()
        (words / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(WORDS)}))
        (words / "merges.txt").write_text("#version: 0.2\na b</w>\n")
        (words / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "CLIPTokenizer",
                    "model_max_length": 12,
                    "bos_token": "<|startoftext|>",
                    "eos_token": "<|endoftext|>",
                    "pad_token": "<|endoftext|>",
                    "unk_token": "<|endoftext|>",
                }
            )
        )
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder


XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
}


def saved_lpips(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Return files of random weights of LPIPS: backbone and heads."""
    generator = torch.Generator().manual_seed(2)
    trunk, heads = {}, {}
    for n, (number, (i, o, k, _, _)) in enumerate(zip(encoders.LPIPS.NUMBERS, encoders.LPIPS.LAYERS, strict=True)):
        trunk[f"features.{number}.weight"] = torch.randn(o, i, k, k, generator=generator) / math.sqrt(i * k * k)
        trunk[f"features.{number}.bias"] = 0.1 * torch.randn(o, generator=generator)
        heads[f"lin{n}.model.1.weight"] = torch.rand(1, o, 1, 1, generator=generator)
    torch.save(trunk, folder / "alexnet.pth")
    torch.save(heads, folder / "alex.pth")
    return folder / "alexnet.pth", folder / "alex.pth"
