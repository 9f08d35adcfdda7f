"""guided-diffusion's U-Net, written from its published description: an oracle for the conversion."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Network:
    """guided-diffusion's U-Net as a state dict and a function of it, written from its published description."""

    def __init__(
        self,
        base: int = 32,
        multipliers: tuple[float, ...] = (1, 2),
        blocks: int = 1,
        attention: tuple[int, ...] = (1,),
        head_dim: int | None = 16,
        heads: int | None = None,
        out: int = 6,
        updown: bool = True,
        scale_shift: bool = True,
        classes: int | None = None,
        in_channels: int = 3,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.base, self.multipliers, self.blocks, self.attention = base, multipliers, blocks, attention
        self.head_dim, self.heads, self.updown, self.scale_shift = head_dim, heads, updown, scale_shift
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.state: dict[str, Tensor] = {}
        self.time = 4 * base
        self._linear("time_embed.0", self.time, base)
        self._linear("time_embed.2", self.time, self.time)
        if classes:
            self.state["label_emb.weight"] = self._random(classes, self.time)
        width = [int(base * m) for m in multipliers]
        self._conv("input_blocks.0.0", width[0], in_channels)
        channels, stack, n = width[0], [width[0]], 1
        for i, c in enumerate(width):
            for _ in range(blocks):
                self._residual(f"input_blocks.{n}.0", channels, c)
                if i in attention:
                    self._attention(f"input_blocks.{n}.1", c)
                channels = c
                stack.append(c)
                n += 1
            if i < len(width) - 1:
                if updown:
                    self._residual(f"input_blocks.{n}.0", c, c)
                else:
                    self._conv(f"input_blocks.{n}.0.op", c, c)
                stack.append(c)
                n += 1
        self._residual("middle_block.0", channels, channels)
        self._attention("middle_block.1", channels)
        self._residual("middle_block.2", channels, channels)
        n = 0
        for i in reversed(range(len(width))):
            for j in range(blocks + 1):
                self._residual(f"output_blocks.{n}.0", channels + stack.pop(), width[i])
                channels = width[i]
                if i in attention:
                    self._attention(f"output_blocks.{n}.1", channels)
                if i and j == blocks:
                    where = f"output_blocks.{n}.{2 if i in attention else 1}"
                    if updown:
                        self._residual(where, channels, channels)
                    else:
                        self._conv(f"{where}.conv", channels, channels)
                n += 1
        self._norm("out.0", channels)
        self._conv("out.2", out, channels)

    def _random(self, *shape: int, fan: int = 0) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, device="meta")
        return torch.randn(shape, generator=self.generator) / math.sqrt(fan or 1)

    def _linear(self, name: str, out: int, inputs: int) -> None:
        self.state[f"{name}.weight"] = self._random(out, inputs, fan=inputs)
        self.state[f"{name}.bias"] = 0.3 * self._random(out)

    def _conv(self, name: str, out: int, inputs: int, size: int = 3) -> None:
        self.state[f"{name}.weight"] = self._random(out, inputs, size, size, fan=inputs * size * size)
        self.state[f"{name}.bias"] = 0.3 * self._random(out)

    def _norm(self, name: str, channels: int) -> None:
        self.state[f"{name}.weight"] = 1 + 0.3 * self._random(channels)
        self.state[f"{name}.bias"] = 0.3 * self._random(channels)

    def _residual(self, name: str, inputs: int, out: int) -> None:
        self._norm(f"{name}.in_layers.0", inputs)
        self._conv(f"{name}.in_layers.2", out, inputs)
        self._linear(f"{name}.emb_layers.1", 2 * out if self.scale_shift else out, self.time)
        self._norm(f"{name}.out_layers.0", out)
        self._conv(f"{name}.out_layers.3", out, out)
        if inputs != out:
            self._conv(f"{name}.skip_connection", out, inputs, 1)

    def _attention(self, name: str, c: int) -> None:
        self._norm(f"{name}.norm", c)
        for part, out in (("qkv", 3 * c), ("proj_out", c)):
            self.state[f"{name}.{part}.weight"] = 2 * self._random(out, c, 1, fan=c)
            self.state[f"{name}.{part}.bias"] = 0.3 * self._random(out)

    # ---- the forward ----

    def _parts(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.state[f"{name}.weight"].to(dtype), self.state[f"{name}.bias"].to(dtype)

    def _run_residual(self, name: str, x: Tensor, emb: Tensor, sample: str = "") -> Tensor:
        def norm(part: str, h: Tensor) -> Tensor:
            return F.group_norm(h, 32, *self._parts(f"{name}.{part}", x.dtype), eps=1e-5)

        def conv(part: str, h: Tensor, padding: int = 1) -> Tensor:
            return F.conv2d(h, *self._parts(f"{name}.{part}", x.dtype), padding=padding)

        def resample(h: Tensor) -> Tensor:
            if sample == "down":
                return F.avg_pool2d(h, 2)
            return F.interpolate(h, scale_factor=2, mode="nearest") if sample == "up" else h

        h = conv("in_layers.2", resample(F.silu(norm("in_layers.0", x))))
        x = resample(x)
        e = F.linear(F.silu(emb), *self._parts(f"{name}.emb_layers.1", x.dtype))[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm("out_layers.0", h) * (1 + scale) + shift
        else:
            h = norm("out_layers.0", h + e)
        h = conv("out_layers.3", F.silu(h))
        return (conv("skip_connection", x, 0) if f"{name}.skip_connection.weight" in self.state else x) + h

    def _run_attention(self, name: str, x: Tensor, order: str) -> Tensor:
        N, C, h, w = x.shape
        heads = self.heads or C // self.head_dim
        flat = x.reshape(N, C, h * w)
        qkv = F.conv1d(
            F.group_norm(flat, 32, *self._parts(f"{name}.norm", x.dtype), eps=1e-5),
            *self._parts(f"{name}.qkv", x.dtype),
        )
        if order == "legacy":
            q, k, v = qkv.reshape(N * heads, 3 * C // heads, -1).split(C // heads, dim=1)
        else:
            q, k, v = (part.reshape(N * heads, C // heads, -1) for part in qkv.chunk(3, dim=1))
        weight = torch.einsum("bct,bcs->bts", q * (C // heads) ** -0.25, k * (C // heads) ** -0.25).softmax(-1)
        a = torch.einsum("bts,bcs->bct", weight, v).reshape(N, C, -1)
        return (flat + F.conv1d(a, *self._parts(f"{name}.proj_out", x.dtype))).reshape(x.shape)

    def __call__(self, x: Tensor, step: int, order: str, label: int | None = None) -> Tensor:
        half = self.base // 2
        angles = step * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)  # as published
        features = torch.cat((angles.cos(), angles.sin()))[None].to(x.dtype)
        emb = F.linear(features, *self._parts("time_embed.0", x.dtype))
        emb = F.linear(F.silu(emb), *self._parts("time_embed.2", x.dtype))
        if label is not None:
            emb = emb + self.state["label_emb.weight"][label].to(x.dtype)
        h = F.conv2d(x, *self._parts("input_blocks.0.0", x.dtype), padding=1)
        kept, n, last = [h], 1, len(self.multipliers) - 1
        for i in range(last + 1):
            for _ in range(self.blocks):
                h = self._run_residual(f"input_blocks.{n}.0", h, emb)
                h = self._run_attention(f"input_blocks.{n}.1", h, order) if i in self.attention else h
                kept.append(h)
                n += 1
            if i < last:
                if self.updown:
                    h = self._run_residual(f"input_blocks.{n}.0", h, emb, "down")
                else:
                    h = F.conv2d(h, *self._parts(f"input_blocks.{n}.0.op", x.dtype), stride=2, padding=1)
                kept.append(h)
                n += 1
        h = self._run_residual("middle_block.0", h, emb)
        h = self._run_attention("middle_block.1", h, order)
        h = self._run_residual("middle_block.2", h, emb)
        n = 0
        for i in reversed(range(last + 1)):
            for j in range(self.blocks + 1):
                h = self._run_residual(f"output_blocks.{n}.0", torch.cat((h, kept.pop()), 1), emb)
                h = self._run_attention(f"output_blocks.{n}.1", h, order) if i in self.attention else h
                if i and j == self.blocks:
                    where = f"output_blocks.{n}.{2 if i in self.attention else 1}"
                    if self.updown:
                        h = self._run_residual(where, h, emb, "up")
                    else:
                        h = F.interpolate(h, scale_factor=2, mode="nearest")
                        h = F.conv2d(h, *self._parts(f"{where}.conv", x.dtype), padding=1)
                n += 1
        h = F.silu(F.group_norm(h, 32, *self._parts("out.0", x.dtype), eps=1e-5))
        return F.conv2d(h, *self._parts("out.2", x.dtype), padding=1)


def saved(network: Network, folder: Any, name: str = "net.pt") -> Any:
    """Return the path of the state dict, written to a folder."""
    path = folder / name
    if path.suffix == ".safetensors":
        import safetensors.torch

        safetensors.torch.save_file(network.state, str(path))
    else:
        torch.save(network.state, path)
    return path


def frames(n: int = 2, size: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
