"""LPIPS and Inception from local files: against their definitions, and files that hold something else."""

from __future__ import annotations

import pathlib
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from saved_folders import saved_lpips

from zsvr import encoders, metrics
from zsvr.flow import Zero


def test_lpips_and_its_temporal_form(tmp_path):
    """LPIPS against its definition with torch's own layers; tLPIPS from its parts."""
    trunk, heads = saved_lpips(tmp_path)
    distance = encoders.LPIPS(trunk, heads)
    output, truth = torch.rand(2, 3, 3, 64, 72, generator=torch.Generator().manual_seed(5))
    result = metrics.evaluate(output, truth, estimator=Zero(), lpips=distance)
    o, g = metrics.quantize(output), metrics.quantize(truth)
    assert result["lpips"] == pytest.approx(float(distance(o, g).mean()), rel=1e-5)
    expected = (distance(o[:-1], o[1:]) - distance(g[:-1], g[1:])).abs().mean()
    assert result["tlpips"] == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(distance(o, o), torch.zeros(3)) and (distance(o, g) > 0).all()
    weights, w = torch.load(trunk, weights_only=True), torch.load(heads, weights_only=True)
    alexnet = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 11, 4, 2), torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2), torch.nn.Conv2d(64, 192, 5, 1, 2),
        torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2), torch.nn.Conv2d(192, 384, 3, 1, 1), torch.nn.ReLU(),
        torch.nn.Conv2d(384, 256, 3, 1, 1), torch.nn.ReLU(), torch.nn.Conv2d(256, 256, 3, 1, 1), torch.nn.ReLU(),
    )  # fmt: skip
    alexnet.load_state_dict({k.removeprefix("features."): x for k, x in weights.items()})
    mean, std = torch.tensor((-0.030, -0.088, -0.188)), torch.tensor((0.458, 0.448, 0.450))
    x, y = ((2 * u - 1 - mean[:, None, None]) / std[:, None, None] for u in (o, g))
    total, taps = torch.zeros(3), (1, 4, 7, 9, 11)
    with torch.no_grad():
        for n, layer in enumerate(alexnet):
            x, y = layer(x), layer(y)
            if n in taps:
                d = (F.normalize(x, dim=1, eps=1e-10) - F.normalize(y, dim=1, eps=1e-10)).square()
                total += F.conv2d(d, w[f"lin{taps.index(n)}.model.1.weight"])[:, 0].mean((1, 2))
    assert torch.allclose(distance(o, g), total, rtol=1e-4)
    with pytest.raises(ValueError, match=r"no state dict of torchvision's alexnet: features.0.weight is nothing"):
        encoders.LPIPS(heads, trunk)
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        encoders.LPIPS(tmp_path / "missing.pth", heads)
    (tmp_path / "bad.pth").write_bytes(b"junk")
    with pytest.raises(ValueError, match="holds no tensors"):
        encoders.LPIPS(tmp_path / "bad.pth", heads)


def test_fid_weights_that_are_missing_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights of FID's Inception"):
        encoders.inception(tmp_path / "missing.pth")


class Unpickler:
    """In place of torch-fidelity's network, which loads whatever a file holds."""

    def __init__(self, name, features, feature_extractor_weights_path):
        self.found = torch.load(feature_extractor_weights_path, weights_only=False)
        if set(self.found) != {"fc.bias"}:
            raise RuntimeError("Missing key(s) in state_dict")

    def eval(self):
        return self

    def to(self, device):
        return self

    def __call__(self, u):
        assert u.dtype == torch.uint8
        return (u.flatten(1)[:, :2] + self.found["fc.bias"],)


class Trap:
    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_files_of_fids_inception_are_read_and_not_executed(tmp_path, monkeypatch):
    fake = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    fake.FeatureExtractorInceptionV3 = Unpickler
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", fake)
    path = tmp_path / "inception.pth"
    torch.save({"fc.bias": torch.tensor((1.0, 2.0))}, path)
    assert encoders.inception(path)(torch.tensor([0.1, 2.0])[None, :, None, None]).tolist() == [[27, 257]]
    torch.save({"fc.bias": Trap(tmp_path / "executed")}, path)
    with pytest.raises(ValueError, match="holds no tensors that can be read safely"):
        encoders.inception(path)
    assert not (tmp_path / "executed").exists()
    torch.save({"other": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no state dict of FID's Inception: Missing"):
        encoders.inception(path)
