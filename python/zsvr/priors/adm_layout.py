"""The layout of guided-diffusion's U-Net: read off a state dict, and mapped key by key onto diffusers' UNet2DModel.

Source: Dhariwal and Nichol 2021, "Diffusion Models Beat GANs on Image Synthesis", and its published checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]  # key of a state dict -> shape

GROUPS = 32  # of every group norm

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclass(frozen=True)
class ADMLayout:
    """What a state dict says of its network.

    Attributes:
        base_channels: width of the timestep features.
        time_channels: width of the time embedding.
        in_channels, out_channels: of the image; twice as many out where the variance is learned.
        channels: of each level, finest first.
        residual_blocks: per level on the way down; one more on the way up.
        attention_levels: levels whose residual blocks are followed by attention.
        has_residual_resampling: residual blocks change the resolution; else strided convolutions do.
        has_scale_shift: the time embedding scales and shifts after the second norm; else it is added.
        classes: number of classes, or None.
    """

    base_channels: int
    time_channels: int
    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    residual_blocks: int
    attention_levels: tuple[int, ...]
    has_residual_resampling: bool
    has_scale_shift: bool
    classes: int | None

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.channels)

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Channels of each level as multiples of the base, as guided-diffusion's ``channel_mult``."""
        return tuple(c / self.base_channels for c in self.channels)

    @property
    def learns_variance(self) -> bool:
        """Whether the second half of the output is a variance."""
        return self.out_channels == 2 * self.in_channels

    @property
    def attentions(self) -> int:
        """Number of attention blocks."""
        return len(self.attention_levels) * (2 * self.residual_blocks + 1) + 1

    def unet_config(self, head_dim: int, size: tuple[int, int]) -> dict[str, Any]:
        """Return the arguments of the UNet2DModel that computes the same."""
        has_attention = [i in self.attention_levels for i in range(self.levels)]
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if not self.has_residual_resampling:
            plain = ("DownBlock2D", "UpBlock2D")
        resampling = "resnet" if self.has_residual_resampling else "conv"
        return {
            "sample_size": size[0] if size[0] == size[1] else size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "layers_per_block": self.residual_blocks,
            "block_out_channels": self.channels,
            "attention_head_dim": head_dim,
            "down_block_types": tuple("AttnDownBlock2D" if a else plain[0] for a in has_attention),
            "up_block_types": tuple("AttnUpBlock2D" if a else plain[1] for a in reversed(has_attention)),
            "downsample_type": resampling,
            "upsample_type": resampling,
            "resnet_time_scale_shift": "scale_shift" if self.has_scale_shift else "default",
            "time_embedding_dim": self.time_channels,
            "num_class_embeds": self.classes,
            "norm_num_groups": GROUPS,
            "attn_norm_num_groups": GROUPS,  # without it the attention in the middle loses its norm
            "norm_eps": 1e-5,
        }


class _Reader:
    """Looks up sizes in a state dict and notes what is not there."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.missing: list[str] = []

    def size(self, key: str, axis: int, rank: int) -> int:
        shape = self.shapes.get(key)
        if shape is None or len(shape) != rank:
            self.missing.append(key if shape is None else f"{key} with {rank} axes (got shape {tuple(shape)})")
            return 1
        return shape[axis]

    def count(self, part: str) -> int:
        found = [int(m[1]) for key in self.shapes if (m := re.match(rf"{part}\.(\d+)\.", key))]
        return 1 + max(found, default=-1)


def infer_layout(shapes: Shapes) -> ADMLayout:
    """Read the layout off the keys and shapes of a guided-diffusion (or improved-diffusion) state dict.

    Raises:
        ValueError: keys that the layout is read from are missing, or their numbers do not fit each other; all are
            listed.
    """
    read = _Reader(shapes)
    in_channels = read.size("input_blocks.0.0.weight", 1, 4)
    out_channels = read.size("out.2.weight", 0, 4)
    time_channels = read.size("time_embed.0.weight", 0, 2)
    base = read.size("time_embed.0.weight", 1, 2)
    inputs, outputs = read.count("input_blocks"), read.count("output_blocks")
    if inputs and not outputs:
        raise ValueError("the network has input blocks and no output blocks: it is a classifier, and no prior")
    if read.missing:
        some = ", ".join(list(shapes)[:3]) or "nothing"
        raise ValueError(
            f"this is no state dict of a guided-diffusion U-Net: it lacks {', '.join(dict.fromkeys(read.missing))}; "
            f"it has {len(shapes)} keys: {some}, ..."
        )
    ups = {m[1] for key in shapes if (m := re.match(r"output_blocks\.(\d+)\.[1-9]\.(?:in_layers|conv)\.", key))}
    levels = 1 + len(ups)
    blocks = max(inputs, outputs)  # both are levels * (residual blocks + 1)
    residual_blocks = blocks // levels - 1
    if residual_blocks < 1 or blocks % levels:
        raise ValueError(
            f"the numbers of blocks do not fit: {inputs} input blocks, {outputs} output blocks, {len(ups)} of them "
            f"with an upsampler, so {levels} levels; both kinds must be levels * (residual blocks + 1) blocks"
        )
    starts = [1 + i * (residual_blocks + 1) for i in range(levels)]
    channels = tuple(read.size(f"input_blocks.{n}.0.out_layers.3.weight", 0, 4) for n in starts)
    embedded = read.size("input_blocks.1.0.emb_layers.1.weight", 0, 2)
    classes = read.size("label_emb.weight", 0, 2) if "label_emb.weight" in shapes else None
    if read.missing:
        raise ValueError(f"the layout cannot be read, as keys are missing: {', '.join(read.missing)}")
    return ADMLayout(
        base_channels=base,
        time_channels=time_channels,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=channels,
        residual_blocks=residual_blocks,
        attention_levels=tuple(i for i, n in enumerate(starts) if f"input_blocks.{n}.1.qkv.weight" in shapes),
        has_residual_resampling=not any(re.match(r"input_blocks\.\d+\.0\.op\.", key) for key in shapes),
        has_scale_shift=embedded == 2 * channels[0],
        classes=classes,
    )


def module_map(layout: ADMLayout) -> Iterator[tuple[str, str, str]]:
    """Yield ``(name in ADM, name in UNet2DModel, kind)``; kind is "residual", "attention" or "leaf"."""
    for ours, theirs in _OUTSIDE.items():
        yield ours, theirs, "leaf"
    if layout.classes is not None:
        yield "label_emb", "class_embedding", "leaf"
    last = layout.levels - 1
    n = 1
    for i in range(layout.levels):
        for j in range(layout.residual_blocks):
            yield f"input_blocks.{n}.0", f"down_blocks.{i}.resnets.{j}", "residual"
            if i in layout.attention_levels:
                yield f"input_blocks.{n}.1", f"down_blocks.{i}.attentions.{j}", "attention"
            n += 1
        if i < last:
            down = f"down_blocks.{i}.downsamplers.0"
            if layout.has_residual_resampling:
                yield f"input_blocks.{n}.0", down, "residual"
            else:
                yield f"input_blocks.{n}.0.op", f"{down}.conv", "leaf"
            n += 1
    yield "middle_block.0", "mid_block.resnets.0", "residual"
    yield "middle_block.1", "mid_block.attentions.0", "attention"
    yield "middle_block.2", "mid_block.resnets.1", "residual"
    n = 0
    for i in range(layout.levels):
        has_attention = last - i in layout.attention_levels
        for j in range(layout.residual_blocks + 1):
            yield f"output_blocks.{n}.0", f"up_blocks.{i}.resnets.{j}", "residual"
            if has_attention:
                yield f"output_blocks.{n}.1", f"up_blocks.{i}.attentions.{j}", "attention"
            n += 1
        if i < last:
            name, up = f"output_blocks.{n - 1}.{2 if has_attention else 1}", f"up_blocks.{i}.upsamplers.0"
            if layout.has_residual_resampling:
                yield name, up, "residual"
            else:
                yield f"{name}.conv", f"{up}.conv", "leaf"


def key_map(layout: ADMLayout, unet_shapes: Shapes) -> dict[str, tuple[str, ...]]:
    """Return, for every key of the ADM state dict, the keys of the UNet2DModel it becomes: one, or q, k and v.

    Args:
        layout: of the checkpoint.
        unet_shapes: of the UNet2DModel made from it; says which residual blocks have a convolution on their shortcut.
    """
    pairs: list[tuple[str, tuple[str, ...]]] = []
    for ours, theirs, kind in module_map(layout):
        if kind == "leaf":
            pairs.append((ours, (theirs,)))
        elif kind == "residual":
            pairs += [(f"{ours}.{a}", (f"{theirs}.{b}",)) for a, b in _RESIDUAL.items()]
        else:
            pairs.append((f"{ours}.norm", (f"{theirs}.group_norm",)))
            pairs.append((f"{ours}.qkv", tuple(f"{theirs}.to_{x}" for x in "qkv")))
            pairs.append((f"{ours}.proj_out", (f"{theirs}.to_out.0",)))
    return {
        f"{ours}.{part}": tuple(f"{name}.{part}" for name in theirs)
        for ours, theirs in pairs
        for part in ("weight", "bias")
        if f"{theirs[0]}.{part}" in unet_shapes
    }


def check_keys(shapes: Shapes, keys: Mapping[str, tuple[str, ...]], unet_shapes: Shapes) -> None:
    """Raise ValueError, with every key that is missing, unexpected or of another shape, unless all fit."""
    problems = [f"missing: {key}" for key in keys if key not in shapes]
    problems += [f"unexpected: {key} {tuple(shape)}" for key, shape in shapes.items() if key not in keys]
    for key, targets in keys.items():
        target = tuple(unet_shapes[targets[0]])
        expected = (len(targets) * target[0], *target[1:])
        is_attention = key.endswith((".qkv.weight", ".proj_out.weight"))
        got = tuple(shapes.get(key, ()))
        expected = (*expected, 1) if is_attention else expected
        if key in shapes and got != expected:
            problems.append(f"wrong shape: {key} {got}, expected {expected}")
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"the checkpoint does not have guided-diffusion's layout, {len(problems)} keys:\n  {lines}")
