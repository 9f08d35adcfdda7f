"""The network that FVD looks through, from a local file: I3D, Inception-v1 inflated to three dimensions, RGB."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsvr.files import Path
from zsvr.weights import state_dict

Triple = tuple[int, int, int]  # time, rows, columns

SIZE = 224
CLASSES = 400
LEAST_FRAMES = 9  # the last average takes two steps of eight frames
SHOWN = 5  # wrong tensors that an error names

WIDTHS = {  # 1x1x1 | 1x1x1, 3x3x3 | 1x1x1, 3x3x3 | pooling, 1x1x1
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}


def same_pad(x: Tensor, kernel: Triple, stride: Triple) -> Tensor:
    """Pad ``[N, C, T, H, W]`` with zeros as TensorFlow's SAME does, for ``ceil(n / stride)`` outputs.

    An odd zero goes to the end.
    """
    padding: list[int] = []
    for n, k, s in zip(x.shape[:1:-1], reversed(kernel), reversed(stride), strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding)


class Unit(nn.Module):
    """Convolution with SAME padding, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = (side, side, side), (stride, stride, stride)
        self.conv3d = nn.Conv3d(inputs, outputs, self.kernel, self.stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(same_pad(x, self.kernel, self.stride))))


class Pool(nn.Module):
    """Maximum with SAME padding; zeros change nothing after a ReLU."""

    def __init__(self, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(same_pad(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """Inception's four branches side by side; widths as in `WIDTHS`."""

    def __init__(self, inputs: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = Unit(inputs, widths[0], 1)
        self.b1a, self.b1b = Unit(inputs, widths[1], 1), Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = Unit(inputs, widths[3], 1), Unit(widths[3], widths[4], 3)
        self.pool, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(inputs, widths[5], 1)
        self.outputs = widths[0] + widths[2] + widths[4] + widths[5]

    def forward(self, x: Tensor) -> Tensor:
        branches = (self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.pool(x)))
        return torch.cat(branches, 1)


class I3D(nn.Module):
    """Two-stream I3D's RGB half (Carreira and Zisserman, CVPR 2017), its modules named as in the public weights."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.MaxPool3d_2a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        self.MaxPool3d_3a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        channels = 192
        for name, widths in WIDTHS.items():
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = Pool((3, 3, 3), (2, 2, 2))
            elif name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = Pool((2, 2, 2), (2, 2, 2))
            block = Mixed(channels, widths)
            self.add_module(name, block)
            channels = block.outputs
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(channels, CLASSES, 1)})

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``[N, 400]`` of clips ``[N, 3, T, 224, 224]`` in [-1, 1], averaged over time."""
        for name, layer in self.named_children():
            if name != "logits":
                x = layer(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.logits["conv3d"](x).mean((2, 3, 4))


def i3d(weights: Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """Return the features of FVD: ``[N, 3, T, H, W]`` in [0, 1] to I3D's 400 logits ``[N, 400]`` before the softmax.

    Frames are stretched to 224x224, bilinearly (half-pixel geometry, not antialiased), and scaled to [-1, 1].

    Args:
        weights: state dict of I3D in its public PyTorch layout (rgb_imagenet.pt, i3d_pretrained_400.pt), or the same
            as .safetensors.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds something else; clips that do not fit.

    Source: Unterthiner et al., Towards Accurate Generative Models of Video, 2018.
    """
    network = I3D()
    _load(network, weights)
    network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def features(clips: Tensor) -> Tensor:
        if clips.dim() != 5 or clips.shape[1] != 3 or clips.shape[2] < LEAST_FRAMES or not clips.is_floating_point():
            expected = f"floating [N, 3, T, H, W] with T of at least {LEAST_FRAMES}"
            raise ValueError(f"I3D needs clips as {expected}, got {tuple(clips.shape)} of {clips.dtype}")
        frames = clips.to(device, torch.float32).clamp(0, 1).transpose(1, 2).flatten(0, 1)
        frames = F.interpolate(frames, (SIZE, SIZE), mode="bilinear", align_corners=False)
        return network(2 * frames.unflatten(0, (len(clips), -1)).transpose(1, 2) - 1)

    return features


def _load(network: nn.Module, path: Path) -> None:
    """Fill a network from a file; counts of training batches, which older files lack, are left alone."""
    found, own = (
        {name: x for name, x in tensors.items() if not name.endswith(".num_batches_tracked")}
        for tensors in (state_dict(path), network.state_dict())
    )
    wrong = [f"{name} is missing" for name in own if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in own]
    wrong += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(x.shape)}"
        for name, x in own.items()
        if name in found and found[name].shape != x.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"{path} is no state dict of the RGB I3D with {CLASSES} classes: {'; '.join(wrong[:SHOWN])}{more}"
        )
    network.load_state_dict(found, strict=False)
