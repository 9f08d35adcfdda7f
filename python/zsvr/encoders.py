"""Networks that metrics look through, from local files: LPIPS and Inception.

I3D: `zsvr.i3d`; CLIP: `zsvr.temporal.semantic`.
"""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsvr.files import Path
from zsvr.weights import state_dict


class LPIPS(nn.Module):
    """Learned perceptual distance on AlexNet (Zhang et al., CVPR 2018), from two local files.

    Args:
        backbone: state dict of torchvision's ``alexnet`` (alexnet-owt-7be5be79.pth).
        heads: state dict of the linear heads of LPIPS 0.1 (alex.pth).

    Raises:
        FileNotFoundError: a file is missing. ValueError: it holds something else.
    """

    LAYERS = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
    NUMBERS = (0, 3, 6, 8, 10)  # of the convolutions in torchvision's ``features``
    POOLED = (1, 2)  # convolutions after a pooling

    def __init__(self, backbone: Path, heads: Path, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, kernel, stride, padding) for i, o, kernel, stride, padding in self.LAYERS
        )
        self.heads = nn.ParameterList(nn.Parameter(torch.zeros(1, o, 1, 1)) for _, o, *_ in self.LAYERS)
        trunk = {
            f"convolutions.{n}.{kind}": f"features.{number}.{kind}"
            for n, number in enumerate(self.NUMBERS)
            for kind in ("weight", "bias")
        }
        self._load(backbone, trunk, "torchvision's alexnet")
        self._load(heads, {f"heads.{n}": f"lin{n}.model.1.weight" for n in range(len(self.LAYERS))}, "LPIPS heads")
        self.shift = torch.tensor((-0.030, -0.088, -0.188), device=device)[:, None, None]
        self.scale = torch.tensor((0.458, 0.448, 0.450), device=device)[:, None, None]
        self.eval().requires_grad_(False).to(device)

    def _load(self, path: Path, names: dict[str, str], what: str) -> None:
        found = state_dict(path)
        own = dict(self.named_parameters())
        for name, theirs in names.items():
            if theirs not in found or found[theirs].shape != own[name].shape:
                got = tuple(found[theirs].shape) if theirs in found else "nothing"
                raise ValueError(f"{path} is no state dict of {what}: {theirs} is {got}, not {tuple(own[name].shape)}")
            own[name].data.copy_(found[theirs])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance ``[N]`` of pictures ``[N, 3, H, W]`` in [0, 1], sides of 64 or more."""
        if min(a.shape[2:]) < 64:
            raise ValueError(f"LPIPS needs frames of at least 64x64, got {tuple(a.shape[2:])}")
        device = self.heads[0].device
        x, y = ((2 * u.float().to(device) - 1 - self.shift) / self.scale for u in (a, b))
        total = torch.zeros(len(a), device=device)
        for n, (convolution, head) in enumerate(zip(self.convolutions, self.heads, strict=True)):
            if n in self.POOLED:
                x, y = (F.max_pool2d(z, 3, 2) for z in (x, y))
            x, y = (F.relu(convolution(z)) for z in (x, y))
            p, q = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
            total = total + ((p - q).square() * head).sum(1).mean((1, 2))
        return total


def inception(weights: Path, device: torch.device | str = "cpu") -> Callable[[Tensor], Tensor]:
    """Return the 2048 Inception features of FID (Heusel et al., NeurIPS 2017), through the package torch-fidelity.

    Args:
        weights: its file weights-inception-2015-12-05-6726825d.pth, or the same as .safetensors.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds something else.
        ModuleNotFoundError: torch-fidelity (or its torchvision) is missing.
    """
    if not pathlib.Path(weights).is_file():
        raise FileNotFoundError(f"there are no weights of FID's Inception at {weights}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        raise ModuleNotFoundError(f"FID needs torch-fidelity and a torchvision that fits torch ({error})") from error
    tensors = state_dict(weights)
    with tempfile.TemporaryDirectory() as folder:  # the package would execute what a file tells it to
        clean = f"{folder}/inception.pth"
        torch.save(tensors, clean)
        try:
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=clean)
        except RuntimeError as error:
            raise ValueError(f"{weights} is no state dict of FID's Inception: {str(error)[:300]}") from error
    network = network.eval().to(device)
    return lambda u: network((u.clamp(0, 1) * 255 + 0.5).to(torch.uint8).to(device))[0]
