"""The network of FVD: its padding, layout, end points and features, and files that do not fit."""

from __future__ import annotations

import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from zsvr import i3d, metrics

ENDPOINTS = {  # channels, frames, rows, columns after each layer for 16 frames of 224x224
    "Conv3d_1a_7x7": (64, 8, 112, 112), "MaxPool3d_2a_3x3": (64, 8, 56, 56), "Conv3d_2b_1x1": (64, 8, 56, 56),
    "Conv3d_2c_3x3": (192, 8, 56, 56), "MaxPool3d_3a_3x3": (192, 8, 28, 28), "Mixed_3b": (256, 8, 28, 28),
    "Mixed_3c": (480, 8, 28, 28), "MaxPool3d_4a_3x3": (480, 4, 14, 14), "Mixed_4b": (512, 4, 14, 14),
    "Mixed_4c": (512, 4, 14, 14), "Mixed_4d": (512, 4, 14, 14), "Mixed_4e": (528, 4, 14, 14),
    "Mixed_4f": (832, 4, 14, 14), "MaxPool3d_5a_2x2": (832, 2, 7, 7), "Mixed_5b": (832, 2, 7, 7),
    "Mixed_5c": (1024, 2, 7, 7),
}  # fmt: skip


def random_weights() -> dict[str, torch.Tensor]:
    """Return weights in the public layout; small variances make the batch norm's epsilon count."""
    generator = torch.Generator().manual_seed(4)
    weights = {}
    for name, x in i3d.I3D().state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("conv3d.weight"):
            weights[name] = torch.randn(x.shape, generator=generator) / math.sqrt(x[0].numel())
        elif name.endswith("running_var"):
            weights[name] = 0.002 + torch.rand(x.shape, generator=generator)
        else:
            weights[name] = torch.rand(x.shape, generator=generator) - 0.2
    return weights


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights()


@pytest.fixture(scope="module")
def features(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "rgb_imagenet.pt"
    torch.save(weights, path)
    return i3d.i3d(path)


def tensorflow_padding(n: int, k: int, s: int) -> int:
    """Return how many zeros TensorFlow's SAME puts before an axis, by its documented formula."""
    return max(k - (s if n % s == 0 else n % s), 0) // 2


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [
        ((7, 7, 7), (2, 2, 2)),
        ((1, 3, 3), (1, 2, 2)),
        ((3, 3, 3), (2, 2, 2)),
        ((2, 2, 2), (2, 2, 2)),
        ((3, 3, 3), (1, 1, 1)),
    ],
)
@pytest.mark.parametrize("size", [(4, 5, 6), (3, 2, 7), (1, 4, 3)])
def test_same_padding_is_tensorflows(kernel, stride, size):
    """Window by window: output i of an axis covers inputs i*s - before + 0..k-1; what lies outside is zero."""
    x = torch.rand(size, generator=torch.Generator().manual_seed(0))
    padded = i3d.same_pad(x[None, None], kernel, stride)
    summed = F.conv3d(padded, torch.ones(1, 1, *kernel), stride=stride)[0, 0]
    largest = i3d.Pool(kernel, stride)(x[None, None])[0, 0]
    before = [tensorflow_padding(n, k, s) for n, k, s in zip(size, kernel, stride, strict=True)]
    assert summed.shape == largest.shape == tuple(math.ceil(n / s) for n, s in zip(size, stride, strict=True))
    for index in torch.cartesian_prod(*(torch.arange(n) for n in summed.shape)).tolist():
        start = [i * s - b for i, s, b in zip(index, stride, before, strict=True)]
        window = x[tuple(slice(max(a, 0), a + k) for a, k in zip(start, kernel, strict=True))]
        assert float(summed[tuple(index)]) == pytest.approx(float(window.sum()), rel=1e-5)
        assert float(largest[tuple(index)]) == float(window.max())


def test_the_network_is_the_published_one(weights):
    """12,697,264 parameters, and at 16 x 224 x 224 the sizes of the paper's layers."""
    network = i3d.I3D().eval()
    assert sum(p.numel() for p in network.parameters()) == 12_697_264
    shapes = {}
    for name, layer in network.named_children():
        if name != "logits":
            layer.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 16, 224, 224)).shape == (1, 400)
    assert shapes == ENDPOINTS and list(shapes) == list(ENDPOINTS)
    assert weights["Mixed_3b.b1a.conv3d.weight"].shape == (96, 192, 1, 1, 1)
    assert weights["Mixed_5c.b2b.conv3d.weight"].shape == (128, 48, 3, 3, 3)
    assert weights["Mixed_4f.b3b.bn.running_mean"].shape == (128,)
    assert weights["logits.conv3d.bias"].shape == (400,) and len(weights) == 57 * 5 + 2


def test_features_are_the_logits_by_the_definition(features, weights):
    """The whole network from torch's functions, with the padding of 24 x 224 x 224 in numbers; two steps of time."""

    def unit(x, name, before=0, after=0, stride=1):
        x = F.conv3d(F.pad(x, (before, after) * 3), weights[f"{name}.conv3d.weight"], stride=stride)
        mean, var, scale, shift = (
            weights[f"{name}.bn.{k}"][:, None, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 0.001).sqrt() * scale + shift).relu()

    def pool(x, kernel, stride, padding):
        return F.max_pool3d(F.pad(x, padding, value=-math.inf), kernel, stride)

    def mixed(x, name):
        third = unit(unit(x, f"{name}.b2a"), f"{name}.b2b", 1, 1)
        second = unit(unit(x, f"{name}.b1a"), f"{name}.b1b", 1, 1)
        fourth = unit(pool(x, 3, 1, (1,) * 6), f"{name}.b3b")
        return torch.cat((unit(x, f"{name}.b0"), second, third, fourth), 1)

    clip = torch.rand(3, 24, 20, 31, generator=torch.Generator().manual_seed(6))
    frames = torch.stack([F.interpolate(f[None], (224, 224), mode="bilinear")[0] for f in clip.unbind(1)], 1)
    x = unit(2 * frames[None] - 1, "Conv3d_1a_7x7", 2, 3, 2)
    x = unit(pool(x, (1, 3, 3), (1, 2, 2), (0, 1, 0, 1, 0, 0)), "Conv3d_2b_1x1")
    x = pool(unit(x, "Conv3d_2c_3x3", 1, 1), (1, 3, 3), (1, 2, 2), (0, 1, 0, 1, 0, 0))
    x = pool(mixed(mixed(x, "Mixed_3b"), "Mixed_3c"), 3, 2, (0, 1) * 3)
    for name in ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"):
        x = mixed(x, name)
    x = mixed(mixed(F.max_pool3d(x, 2), "Mixed_5b"), "Mixed_5c")[0].mean((2, 3))
    assert x.shape == (1024, 3)
    steps = (x[:, :2].mean(1), x[:, 1:].mean(1))
    logits = [weights["logits.conv3d.weight"][:, :, 0, 0, 0] @ step + weights["logits.conv3d.bias"] for step in steps]
    expected = (logits[0] + logits[1]) / 2
    got = features(clip[None])
    assert got.shape == (1, 400) and got.dtype == torch.float32 and not got.requires_grad
    assert torch.allclose(got[0], expected, rtol=1e-3, atol=1e-4 * float(expected.std()))


def test_fvd_is_zero_between_equals_and_not_between_others(features):
    generator = torch.Generator().manual_seed(8)
    truth = F.interpolate(torch.rand(32, 3, 4, 5, generator=generator), (16, 18), mode="bilinear")
    seen = []
    result = metrics.evaluate(truth * 0.7, truth, i3d=lambda x: seen.append(features(x)) or seen[-1], estimator=Still())
    output, reference = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert metrics.frechet_distance(reference, reference) == pytest.approx(0, abs=1e-6 * float(reference.var(0).sum()))
    assert result["fvd"] == metrics.frechet_distance(output, reference)
    assert result["fvd"] > (output.mean(0) - reference.mean(0)).square().sum() > 0


class Still:
    name = "still"

    def describe(self):
        return {"name": self.name}

    def __call__(self, u):
        return (torch.zeros(len(u) - 1, 2, *u.shape[2:]),) * 2


def test_files_that_are_something_else_are_refused(weights, tmp_path):
    name = "Mixed_3b.b1a.conv3d.weight"
    path = tmp_path / "i3d.pt"

    def refused(found, message):
        torch.save(found, path)
        with pytest.raises(ValueError, match=message):
            i3d.i3d(path)

    refused({k: x for k, x in weights.items() if k != name}, f"{name} is missing$")
    refused(weights | {"Mixed_3b.b4.bias": torch.zeros(2)}, "Mixed_3b.b4.bias is unknown$")
    refused(weights | {name: torch.zeros(96, 192, 3, 3, 3)}, r"is \(96, 192, 3, 3, 3\), not \(96, 192, 1, 1, 1\)$")
    charades = {"logits.conv3d.weight": torch.zeros(157, 1024, 1, 1, 1), "logits.conv3d.bias": torch.zeros(157)}
    refused(weights | charades, r"400 classes: logits.conv3d.weight is \(157, 1024, 1, 1, 1\)")
    refused({"fc.weight": torch.zeros(2)}, r"conv3d.weight is missing; .*; and 283 more$")
    refused([weights], "no state dict of tensors, but list")
    torch.jit.script(torch.nn.ReLU()).save(str(path))  # the form in which another FVD comes
    with pytest.raises(ValueError, match="holds no tensors that can be read safely"):
        i3d.i3d(path)
    with pytest.raises(FileNotFoundError, match="no file of weights"):
        i3d.i3d(tmp_path / "missing.pt")


def test_counts_of_batches_are_optional_and_safetensors_are_read(weights, tmp_path):
    counted = weights | {"Conv3d_1a_7x7.bn.num_batches_tracked": torch.tensor(7)}
    safetensors.torch.save_file(counted, str(tmp_path / "i3d.safetensors"))
    network = i3d.I3D()
    i3d._load(network, tmp_path / "i3d.safetensors")
    own = network.state_dict()
    assert all(torch.equal(own[name], x) for name, x in weights.items())


def test_clips_that_do_not_fit_are_refused(features):
    for shape in ((3, 16, 8, 8), (1, 1, 16, 8, 8), (1, 3, 8, 8, 8)):
        with pytest.raises(ValueError, match=r"floating \[N, 3, T, H, W\] with T of at least 9, got"):
            features(torch.rand(shape))
    with pytest.raises(ValueError, match=r"got .* of torch\.uint8"):
        features(torch.zeros(1, 3, 16, 8, 8, dtype=torch.uint8))
