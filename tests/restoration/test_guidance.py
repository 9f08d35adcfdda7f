"""Consistency guidance: the formula against autograd, masks, the transpose of warping, the semantic level."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zsvr.temporal import guidance, semantic
from zsvr.temporal.guidance import ConsistencyGuidance, consistency_loss, consistency_shift
from zsvr.temporal.settings import GuidanceOptions
from zsvr_kernels.links import inside_pixels
from zsvr_kernels.sampling import warp

NORMS = ("l2", "l1", "charbonnier")
T, C, H, W = 4, 3, 9, 11


def clip(dtype: torch.dtype = torch.float64, seed: int = 0, frames: int = T) -> tuple[Tensor, ...]:
    """Frames, flows with targets off the canvas too, and masks."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(frames, C, H, W, generator=g, dtype=dtype)
    flows = [2.5 * torch.randn(frames - 1, 2, H, W, generator=g, dtype=dtype) for _ in range(2)]
    masks = [torch.rand(frames - 1, H, W, generator=g) < 0.7 for _ in range(2)]
    return x, *flows, *masks


def naive_warp(x: Tensor, flow: Tensor) -> Tensor:  # [C, H, W], [2, H, W], by its definition
    out = torch.zeros_like(x)
    for y in range(H):
        for c in range(W):
            px = min(max(c + float(flow[0, y, c]), 0.0), W - 1.0)
            py = min(max(y + float(flow[1, y, c]), 0.0), H - 1.0)
            x0, y0 = math.floor(px), math.floor(py)
            x1, y1 = min(x0 + 1, W - 1), min(y0 + 1, H - 1)
            fx, fy = px - x0, py - y0
            top = (1 - fx) * x[:, y0, x0] + fx * x[:, y0, x1]
            out[:, y, c] = (1 - fy) * top + fy * ((1 - fx) * x[:, y1, x0] + fx * x[:, y1, x1])
    return out


def naive_loss(
    x: Tensor, forward: Tensor, backward: Tensor, mf: Tensor, mb: Tensor, neighbors: tuple[int, ...]
) -> Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for i in range(len(x)):
        for o in neighbors:
            j = i + o
            if 0 <= j < len(x):
                flow, mask = (forward[i], mf[i]) if o == 1 else (backward[j], mb[j])
                d = x[i] - naive_warp(x[j], flow)
                total = total + (mask * (d / 2).square()).sum() / x[0].numel()
    return total


@pytest.mark.parametrize("neighbors", [(-1, 1), (-1,), (1,)])
def test_the_l2_loss_is_the_published_definition(neighbors):
    x, *fields = clip()
    got = consistency_loss(x, *fields, neighbors=neighbors)
    torch.testing.assert_close(got, naive_loss(x, *fields, neighbors), rtol=1e-12, atol=0)


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("neighbors", [(-1, 1), (-1,), (1,)])
@pytest.mark.parametrize("norm", NORMS)
def test_the_shift_is_the_scaled_gradient(norm, neighbors, detach):
    x, *fields = clip()
    x.requires_grad_(True)
    options = {"neighbors": neighbors, "norm": norm, "detach_neighbor": detach}
    (gradient,) = torch.autograd.grad(consistency_loss(x, *fields, **options), x)
    shift = consistency_shift(x.detach(), *fields, gain=0.03, **options)
    torch.testing.assert_close(shift, -2 * 0.03 * C * H * W * gradient, rtol=1e-11, atol=1e-13)
    assert shift.abs().max() > 1e-4


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_has_the_gradient_of_finite_differences(norm):
    x, *fields = (part[:2, ..., :5, :6] for part in clip())
    x, fields = x[:, :1].requires_grad_(True), [field[:1] for field in fields]
    assert torch.autograd.gradcheck(lambda x: consistency_loss(x, *fields, norm=norm), x)


def test_without_the_transpose_only_the_frame_itself_moves():
    x, *fields = clip()
    shift = consistency_shift(x, *fields, gain=0.5, detach_neighbor=True)
    by_hand = torch.zeros_like(x)
    for i in range(T - 1):
        by_hand[i] -= 0.5 * fields[2][i] * (x[i] - naive_warp(x[i + 1], fields[0][i]))
        by_hand[i + 1] -= 0.5 * fields[3][i] * (x[i + 1] - naive_warp(x[i], fields[1][i]))
    torch.testing.assert_close(shift, by_hand, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(shift, consistency_shift(x, *fields, gain=0.5))


@pytest.mark.parametrize("norm", NORMS)
def test_perfectly_warped_frames_are_not_shifted(norm):
    wide = torch.randn(C, H, W + 2 * T, generator=torch.Generator().manual_seed(3))
    x = torch.stack([wide[:, :, 2 * i : 2 * i + W] for i in range(T)])  # moves by two pixels to the left
    forward = torch.zeros(T - 1, 2, H, W)
    forward[:, 0] = -2
    masks = inside_pixels(forward), inside_pixels(-forward)
    assert 0 < masks[0].float().mean() < 1
    shift = consistency_shift(x, forward, -forward, *masks, gain=0.1, norm=norm)
    assert torch.equal(shift, torch.zeros_like(x))
    everywhere = torch.ones_like(masks[0])
    assert consistency_shift(x, forward, -forward, everywhere, everywhere, gain=0.1, norm=norm).abs().max() > 1e-4


@pytest.mark.parametrize("norm", NORMS)
def test_masked_pixels_contribute_nothing(norm):
    x, forward, backward, mf, mb = clip()
    options = {"gain": 0.1, "norm": norm}
    expected = consistency_shift(x, forward, backward, mf, mb, **options)
    wild = [torch.where(m[:, None], f, torch.full_like(f, 5.25)) for f, m in ((forward, mf), (backward, mb))]
    torch.testing.assert_close(consistency_shift(x, *wild, mf, mb, **options), expected, rtol=0, atol=0)
    nothing = torch.zeros_like(mf)
    assert not consistency_shift(x, forward, backward, nothing, nothing, **options).any()


@pytest.mark.parametrize("reach", [0.7, 4.0, 100.0])
def test_the_transposed_warp_is_the_transpose(reach):
    g = torch.Generator().manual_seed(1)
    flow = reach * torch.randn(2, 2, H, W, generator=g, dtype=torch.float64)
    a, b = (torch.randn(2, C, H, W, generator=g, dtype=torch.float64) for _ in range(2))
    left, right = (guidance.transposed_warp(a, flow) * b).sum(), (a * warp(b, flow)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)
    columns = torch.eye(H * W, dtype=torch.float64).reshape(H * W, 1, H, W)
    matrix = warp(columns, flow[:1].expand(H * W, 2, H, W)).reshape(H * W, -1).mT
    once = guidance.transposed_warp(a[:1, :1], flow[:1]).reshape(-1)
    torch.testing.assert_close(once, matrix.mT @ a[0, 0].reshape(-1), rtol=1e-12, atol=1e-13)


def test_the_transpose_sums_in_the_same_order_for_any_number_of_threads():
    flow = 30 * torch.randn(3, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    field = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(guidance.transposed_warp(field, flow))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[1], results[2])


def test_the_sorted_sum_for_gpus_equals_the_one_by_line():
    g = torch.Generator().manual_seed(1)
    index = torch.randint(0, 50, (2, 300), generator=g)
    values = torch.randn(2, C, 300, generator=g, dtype=torch.float64)
    by_line, ordered = guidance._add_by_line(index, values, 50), guidance._add_sorted(index, values, 50)
    torch.testing.assert_close(ordered, by_line, rtol=1e-12, atol=1e-13)
    expected = (F.one_hot(index, 50).double().mT @ values.mT).mT
    torch.testing.assert_close(by_line, expected, rtol=1e-12, atol=1e-13)


def test_descent_never_overshoots_at_the_largest_gain():
    """The eigenvalues of the map in brackets stay below 8 for shifts: 2 of them at gain 1/8 never raise the loss."""
    x = torch.randn(5, C, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    shifts = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    forward = shifts[:, :, None, None].expand(4, 2, H, W)
    masks = inside_pixels(forward), inside_pixels(-forward)
    gain = guidance.effective_gain(1.0, 10)
    assert gain == 1 / 8
    losses = []
    for _ in range(30):
        losses.append(float(consistency_loss(x, forward, -forward, *masks)))
        x = x + consistency_shift(x, forward, -forward, *masks, gain=gain)
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.05 * losses[0]


def test_gains_scale_with_the_number_of_steps_up_to_their_cap():
    assert guidance.effective_gain(0.01, 1000) == 0.01
    assert guidance.effective_gain(0.01, 100) == pytest.approx(0.1)
    assert guidance.effective_gain(0.01, 50) == 0.125
    assert guidance.effective_gain(0.01, 50, detach_neighbor=True) == pytest.approx(0.2)
    assert guidance.effective_gain(1, 50, detach_neighbor=True) == 0.25


def test_real_frames_with_their_true_flow_average_their_noise(real_data):
    """Two noisy frames that are pulled together along the measured flow lose up to half of the noise's energy."""
    image = pytest.importorskip("PIL.Image")
    folder = real_data / "gt_rubberwhale"
    data = np.fromfile(folder / "flow10.flo", dtype="<f4")
    width, height = data[1:3].view("<i4")
    flow = torch.from_numpy(data[3:].reshape(height, width, 2).copy()).permute(2, 0, 1)[None]
    known = (flow.abs() < 1e9).all(1)
    flow = flow.masked_fill(~known[:, None], 0.0)
    files = sorted((folder / "frames").iterdir())
    names = [next(p for p in files if str(n) in p.stem) for n in (10, 11)]
    clean = torch.stack([torch.from_numpy(np.array(image.open(p).convert("RGB"))).permute(2, 0, 1) for p in names])
    clean = clean.float() / 127.5 - 1
    box = (..., slice(100, 260), slice(200, 360))
    clean, flow, known = clean[box], flow[box], known[box]
    mask = known & inside_pixels(flow)
    x = clean + 0.3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    before = (x - clean)[0, :, mask[0]].square().mean()
    fields = flow, flow, mask, torch.zeros_like(mask)
    for _ in range(12):
        x = x + consistency_shift(x, *fields, gain=1 / 8, neighbors=(1,))
    after = (x - clean)[0, :, mask[0]].square().mean()
    assert mask.float().mean() > 0.8
    assert 0.3 < float(after / before) < 0.65


# ---- the guidance of a window ----


def guide(encoder=None, ids=None, frames=T, decode=None, **options) -> tuple[Tensor, ConsistencyGuidance]:
    x, *fields = clip(frames=frames)
    return x, ConsistencyGuidance(GuidanceOptions(**options), *fields, encoder=encoder, ids=ids, decode=decode)


def test_held_frames_pull_but_do_not_move():
    x, guided = guide()
    free = guided.shift(x, 0, 100)
    held = torch.tensor([True, False, False, True])
    shift = guided.shift(x, 0, 100, held=held)
    assert not shift[held].any()
    assert torch.equal(shift[~held], free[~held]) and free[held].any()
    torch.testing.assert_close(free, consistency_shift(x, *guided._fields, gain=0.1), rtol=0, atol=0)


def test_it_acts_within_its_range_only():
    x, guided = guide(active=(0.25, 0.5))
    acts = [bool(guided.shift(x, k, 8).any()) for k in range(8)]
    assert acts == [False, False, True, True, False, False, False, False]
    x, guided = guide(active=(0.5, 1.0))
    assert guided.shift(x, 7, 8).any()
    x, guided = guide(gain=0.0)
    assert not guided.shift(x, 0, 8).any()
    x, guided = guide(frames=1)
    assert not guided.shift(x, 0, 8).any()


def test_the_variance_scales_the_shift_if_asked_to():
    x, guided = guide()
    _, scaled = guide(scale_by_variance=True)
    expected = guided.shift(x, 0, 100, variance=0.3)
    torch.testing.assert_close(scaled.shift(x, 0, 100, variance=0.3), 0.3 * expected)


def test_frames_that_are_not_adjacent_do_not_meet():
    x, guided = guide(ids=[0, 5, 6, 7])
    shift = guided.shift(x, 0, 100)
    assert not shift[0].any() and shift[1].any()
    moved = x.clone()
    moved[0] += 1
    assert torch.equal(guided.shift(moved, 0, 100), shift)


def test_broken_flow_is_not_followed():
    x, forward, backward, mf, mb = clip()
    forward[0, 0, 2, 3], backward[1, 1, 4, 4] = math.nan, math.inf
    shift = ConsistencyGuidance(GuidanceOptions(), forward, backward, mf, mb).shift(x, 0, 100)
    assert torch.isfinite(shift).all()
    mf[0, 2, 3] = mb[1, 4, 4] = False
    clean = [f.nan_to_num(0, 0, 0) for f in (forward, backward)]
    assert torch.equal(shift, consistency_shift(x, *clean, mf, mb, gain=0.1))


def test_through_the_network_the_gradient_is_that_of_the_sample():
    x, guided = guide(target="x")
    x = x.requires_grad_(True)
    weight = torch.randn(C, C, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    x0 = F.conv2d(x, weight).tanh()
    assert guided.needs_network_gradient(0, 100)
    shift = guided.shift_through(x, x0, 0, 100)
    loss = consistency_loss(x0, *guided._fields)
    held = torch.tensor([False, True, False, False])
    assert not guided.shift_through(x, x0, 0, 100, held=held)[1].any()
    (gradient,) = torch.autograd.grad(loss, x)  # the graph is still there
    torch.testing.assert_close(shift, -2 * 0.1 * C * H * W * gradient)
    assert not guided.shift(x0.detach(), 0, 100).any(), "one target at a time"
    _, direct = guide()
    assert not direct.needs_network_gradient(0, 100)
    assert not direct.shift_through(x, x0, 0, 100).any()


def test_blending_goes_in_frame_order_while_progress_is_below_the_bound():
    x, guided = guide(x0_blend=0.1)
    _, backward, _, mask = (guided._fields[n] for n in range(4))
    expected = x.clone()
    for i in range(1, T):
        expected[i] = torch.where(mask[i - 1], naive_warp(expected[i - 1], backward[i - 1]), x[i])
    torch.testing.assert_close(guided.blend(x, 0, 100), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(guided.blend(x, 9, 100), expected, rtol=1e-12, atol=1e-13)
    assert guided.blend(x, 10, 100) is x
    assert guide()[1].blend(x, 0, 100) is x
    assert not torch.equal(expected, x)


def test_fields_that_do_not_fit_are_refused():
    x, forward, backward, mf, mb = clip()
    with pytest.raises(ValueError, match=r"\[T-1, 2, Hc, Wc\]"):
        ConsistencyGuidance(GuidanceOptions(), forward, backward[1:], mf, mb)
    with pytest.raises(ValueError, match="4 numbers"):
        ConsistencyGuidance(GuidanceOptions(), forward, backward, mf, mb, ids=[0, 1])
    with pytest.raises(ValueError, match="give its image encoder"):
        ConsistencyGuidance(GuidanceOptions(clip="x"), forward, backward, mf, mb)
    with pytest.raises(ValueError, match=r"flow must be \[3, 2, 9, 10\]"):
        consistency_shift(x[..., :-1], forward, backward, mf, mb, gain=1)


# ---- semantic level ----


class Embedding(nn.Module):
    """Any image encoder: pools, and mixes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3 * 16, 7, dtype=torch.float64)
        with torch.no_grad():
            for p in self.mix.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(F.adaptive_avg_pool2d(x, 4).flatten(1))


def semantic_guide(**options):
    encoder = semantic.SemanticEncoder(Embedding(), (8, 8))
    return guide(encoder, gain=0.0, clip="given", **options)


def pair_distances(x: Tensor, encoder) -> Tensor:
    e = encoder(((x + 1) / 2).clamp(0, 1)).float()
    e = e / e.norm(dim=1, keepdim=True)
    return 1 - (e[1:] * e[:-1]).sum(1)


def test_the_plain_semantic_shift_is_the_gradient():
    x, guided = semantic_guide(sem_normalize=False, sem_gain=0.3)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(pair_distances(leaf, guided.encoder).sum(), leaf)
    torch.testing.assert_close(guided.shift(x, 0, 100), -0.3 * gradient, rtol=1e-4, atol=1e-9)
    assert gradient.abs().max() > 1e-5
    assert torch.equal(gradient == 0, (guided.shift(x, 0, 100) == 0))  # clipped pixels stay


def test_the_normalised_semantic_shift_has_the_distance_as_its_size():
    x, guided = semantic_guide(sem_gain=0.3)
    distances = pair_distances(x, guided.encoder)
    mean = torch.stack([distances[0], distances[:2].mean(), distances[1:].mean(), distances[2]])
    shift = guided.shift(x, 5, 100)
    rms = shift.square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, 0.3 * mean.double(), rtol=1e-4, atol=0)
    assert [bool(guided.shift(x, k, 100).any()) for k in range(11)] == [k % 5 == 0 for k in range(11)]
    small = x / 4
    before = float(pair_distances(small, guided.encoder).sum())
    for _ in range(20):
        small = small + guided.shift(small, 0, 100)
    assert float(pair_distances(small, guided.encoder).sum()) < 0.9 * before


def test_the_semantic_level_works_within_inference_mode():
    x, guided = semantic_guide()
    expected = guided.shift(x, 0, 100)
    with torch.inference_mode():
        x, guided = guide(guided.encoder, gain=0.0, clip="given")
        assert torch.equal(guided.shift(x, 0, 100), expected)


def test_semantic_pairs_that_are_not_adjacent_do_not_count():
    x, guided = semantic_guide(ids=[0, 5, 6, 9])
    shift = guided.shift(x, 0, 100)
    assert not shift[0].any() and not shift[3].any() and shift[1].any()


def test_both_levels_add_and_latents_are_decoded_first():
    encoder = semantic.SemanticEncoder(Embedding(), (8, 8))
    x, both = guide(encoder, clip="given")
    _, pixel = guide()
    _, meaning = guide(encoder, clip="given", gain=0.0)
    torch.testing.assert_close(both.shift(x, 0, 100), pixel.shift(x, 0, 100) + meaning.shift(x, 0, 100))
    _, latent = guide(encoder, clip="given", gain=0.0, decode=lambda z: z.flip(1))
    torch.testing.assert_close(latent.shift(x.flip(1), 0, 100).flip(1), meaning.shift(x, 0, 100))


def test_through_the_network_the_semantic_level_acts_too():
    encoder = semantic.SemanticEncoder(Embedding(), (8, 8))
    x, guided = guide(encoder, clip="given", gain=0.0, target="x", sem_normalize=False)
    leaf = x.requires_grad_(True)
    shift = guided.shift_through(leaf, leaf * 0.5, 0, 100)
    (gradient,) = torch.autograd.grad(pair_distances(leaf * 0.5, encoder).sum(), leaf)
    torch.testing.assert_close(shift, -0.02 * gradient, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("size", "target"), [((31, 47), (14, 14)), ((9, 30), (28, 12)), ((16, 16), (16, 16))])
def test_resizing_is_that_of_torch(size, target):
    u = torch.rand(2, 3, *size, dtype=torch.float64)
    expected = F.interpolate(u, target, mode="bicubic", antialias=True)
    torch.testing.assert_close(semantic.resize_bicubic(u, target), expected, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**vision, "vocab_size": 50, "max_position_embeddings": 8}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 32, "patch_size": 8}, projection_dim=12
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return folder


def test_clip_embeds_as_transformers_does_and_lets_gradients_through(clip_folder):
    import transformers

    encoder = semantic.open_clip_encoder(clip_folder)
    whole = transformers.CLIPModel.from_pretrained(clip_folder, local_files_only=True).eval()
    u = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        pixels = (F.interpolate(u, (32, 32), mode="bicubic", antialias=True) - 0.5) / 0.25
        expected = whole.visual_projection(whole.vision_model(pixel_values=pixels).pooler_output)
        torch.testing.assert_close(encoder(u), expected, rtol=1e-4, atol=1e-5)
        by_features = semantic.SemanticEncoder(whole, (32, 32), (0.5,) * 3, (0.25,) * 3)
        torch.testing.assert_close(by_features(u), expected, rtol=1e-4, atol=1e-5)
    assert encoder(u).shape == (3, 12)
    x, *fields = clip(torch.float32)
    guided = ConsistencyGuidance(GuidanceOptions(gain=0.0, clip=str(clip_folder)), *fields, encoder=encoder)
    assert guided.shift(x, 0, 100).abs().max() > 0


@pytest.mark.parametrize("side", [20, 32, 80])
def test_clip_prepares_square_frames_as_its_processor_does(side, clip_folder):
    """Up to 1.25 levels of 8 bits: the processor rounds after each axis, and cubic weights add up to 1.5 at most."""
    import transformers

    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)  # the latter's name in 4
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = kind(**sizes, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    u = 0.3 + 0.4 * torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(2))  # nothing is clipped
    u = (255 * u).round() / 255
    images = [(255 * frame).round().byte().permute(1, 2, 0).numpy() for frame in u]
    encoder = semantic.open_clip_encoder(clip_folder)
    encoder.model = torch.nn.Identity()
    error = (encoder(u) - processor(images=images, return_tensors="pt").pixel_values).abs().max()
    assert error < 1.25 / 255 / 0.25


def test_a_damaged_encoder_says_which_file(clip_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="has no weights"):
        semantic.open_clip_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors: it is damaged"):
        semantic.open_clip_encoder(tmp_path)


def test_folders_without_an_image_encoder_are_refused(clip_folder, tmp_path):
    import transformers

    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        semantic.open_clip_encoder(tmp_path / "nothing")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)  # has no projection
    with pytest.raises(
        ValueError, match=r"lacks weights of the CLIPVisionModelWithProjection: visual_projection\.weight"
    ):
        semantic.open_clip_encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="of type 'bert'"):
        semantic.open_clip_encoder(tmp_path)


def test_outputs_of_either_version_are_understood():
    class Output:
        image_embeds = None
        pooler_output = torch.ones(2, 3)

    assert torch.equal(semantic.embedding_of(Output()), torch.ones(2, 3))
    assert torch.equal(semantic.embedding_of(torch.zeros(1)), torch.zeros(1))
    with pytest.raises(TypeError, match="returned a tuple"):
        semantic.embedding_of((torch.zeros(1),))


def test_blended_estimates_have_gradients():
    x, flow = torch.randn(3, 2, 5, 6, dtype=torch.float64, requires_grad=True), 0.7 * torch.randn(2, 2, 5, 6)
    mask = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    assert torch.autograd.gradcheck(lambda x: guidance.blend_with_previous(x, flow.double(), mask), x)
