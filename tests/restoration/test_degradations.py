"""What each degradation does: kernels and borders against scipy, resolution, masks, low light, previews."""

from __future__ import annotations

import itertools

import numpy
import pytest
import torch
from degradations import dense, frames, gray_then, relative

from zsvr import operators
from zsvr.operators import kernels, make
from zsvr.operators.downscaling import reduction
from zsvr.operators.separable import convolution


def test_presets_are_odd_centred_and_complete():
    for name in kernels.PRESETS:
        image = kernels.as_image(name)
        assert all(n % 2 for n in image.shape), name
        assert float(image.sum()) == pytest.approx(1, abs=1e-14)
        for axis, n in enumerate(image.shape):  # no shift: the centre of mass is the middle
            where = torch.arange(n, dtype=torch.float64) - n // 2
            assert float((image.sum(1 - axis) * where).sum()) == pytest.approx(0, abs=1e-13), name
    taps = kernels.gaussian(9, 2.0)
    expected = numpy.exp(-0.5 * (numpy.arange(-4, 5) / 2) ** 2)
    assert numpy.allclose(taps, expected / expected.sum()) and (taps > 0).all() and len(taps) == 9
    assert kernels.uniform(9).tolist() == [1 / 9] * 9
    vertical, horizontal = kernels.parse("anisotropic")
    assert float(vertical.std()) < float(horizontal.std())  # the wider one is flatter


@pytest.mark.parametrize("taps", [1, 3, 9])
@pytest.mark.parametrize("n", [1, 2, 4, 9, 16])
def test_separable_blur_equals_scipy(taps, n):
    ndimage = pytest.importorskip("scipy.ndimage")
    kernel = torch.rand(taps, dtype=torch.float64, generator=torch.Generator().manual_seed(taps))
    x = frames((n, 3))
    expected = ndimage.convolve1d(x.numpy(), kernel.numpy(), axis=0, mode="reflect")  # their reflect is half-sample
    assert numpy.allclose(convolution(kernel, n) @ x, expected, atol=1e-13)


@pytest.mark.parametrize(("mode", "fft_pad"), [("wrap", "none"), ("reflect", "reflect")])
@pytest.mark.parametrize("shape", [(3, 3), (5, 1), (7, 3)])
def test_fourier_blur_equals_scipy(mode, fft_pad, shape):
    ndimage = pytest.importorskip("scipy.ndimage")
    kernel = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = frames((3, 16, 13))
    got = make("blur_fft", kernel=kernel, fft_pad=fft_pad).A(x)
    expected = [ndimage.convolve(c.numpy(), (kernel / kernel.sum()).numpy(), mode=mode) for c in x]
    assert numpy.allclose(got, numpy.stack(expected), atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (1, 2), (4, 5)])
def test_the_middle_of_a_kernel_is_at_half_its_size(shape):
    kernel = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = frames((3, 6, 7))
    expected = torch.zeros_like(x)
    for i in range(shape[0]):
        for j in range(shape[1]):
            moved = x.roll((i - shape[0] // 2, j - shape[1] // 2), (1, 2))
            expected += kernel[i, j] / kernel.sum() * moved
    assert torch.allclose(make("blur_fft", kernel=kernel).A(x), expected, atol=1e-14)


def test_a_kernel_larger_than_the_canvas_wraps_around():
    kernel = kernels.as_image("gaussian:9,2")
    x = frames((3, 4, 5))
    tiled = x.repeat(1, 5, 5)
    ndimage = pytest.importorskip("scipy.ndimage")
    expected = [ndimage.convolve(c.numpy(), kernel.numpy(), mode="wrap")[8:12, 10:15] for c in tiled]
    assert numpy.allclose(make("blur_fft").A(x), numpy.stack(expected), atol=1e-13)


def test_both_blurs_are_one_inside():
    x = frames((3, 40, 40))
    a, b = make("blur_sep").A(x), make("blur_fft").A(x)
    assert torch.allclose(a[:, 4:-4, 4:-4], b[:, 4:-4, 4:-4], atol=1e-13)
    assert torch.allclose(a, make("blur_fft", fft_pad="reflect").A(x), atol=1e-13)


def test_motion_lies_along_its_angle():
    y, x = torch.meshgrid(torch.arange(-7.0, 8), torch.arange(-7.0, 8), indexing="ij")
    for angle, slope in ((0, 0), (45, 1), (90, None), (-45, -1)):
        k = kernels.motion(15, angle)
        xx, yy, xy = (float((k * v).sum()) for v in (x * x, y * y, x * y))
        length2 = xx + yy
        if slope == 0:
            assert yy == pytest.approx(0, abs=1e-9)
        elif slope is None:
            assert xx == pytest.approx(0, abs=1e-9)
        else:
            assert xy == pytest.approx(slope * length2 / 2, rel=0.05)
        assert torch.equal(k, k.flip(0, 1))
        assert length2 == pytest.approx(14**2 / 12, rel=0.05)  # variance of an even motion over 14 pixels
    assert torch.equal(kernels.motion(1, 30), torch.ones(1, 1, dtype=torch.float64))


def test_wiener_is_its_formula():
    op = make("blur_fft", pinv="wiener", noise_std=0.1)
    y = frames((1, 3, 8, 9))
    h = op.transfer(8, 9)
    expected = torch.fft.ifft2(torch.fft.fft2(y) * h.conj() / (h.abs() ** 2 + 0.2**2 / 0.25)).real
    assert relative(op.pinv(y), expected) < 1e-12
    assert op.spectrum() is None


def test_corrections_never_grow():
    # x - A+ (A x - y), over and over, as a sampler does it: an inverse that is wrong at the borders would diverge.
    x = frames((1, 3, 32, 32))
    for kernel in kernels.PRESETS:
        for fft_pad in ("none", "reflect"):
            op = make("blur_fft", kernel=kernel, fft_pad=fft_pad, cg_iters=20)
            y = op.A(x)
            errors, found = [], torch.zeros_like(x)
            for _ in range(6):
                found = found - op.pinv(op.A(found) - y)
                errors.append(float((op.A(found) - y).norm()))
            assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors)), (kernel, fft_pad, errors)
            assert errors[0] < 0.2 * float(y.norm())


def test_conjugate_gradients_reach_the_pseudo_inverse():
    # Well conditioned: the closed inverse drops nothing, and both are A^-1.
    x = frames((2, 3, 12, 10))
    for name in ("blur_sep", "blur_fft"):
        closed, cg = (make(name, kernel="gaussian:3,0.5", pinv=p, cg_iters=200) for p in ("closed", "cg"))
        y = closed.A(x)
        assert relative(closed.pinv(y), x) < 1e-11
        assert relative(cg.pinv(y), x) < 1e-4
    # Rank deficient: the solution of smallest norm.
    op = make(
        "compose", operators=[make("blur_sep", kernel="gaussian:3,0.6"), make("inpaint", ratio=0.4)], cg_iters=500
    )
    assert op.inverse == "cg" and not op.exact_pinv
    canvas = (5, 6)
    y = op.A(frames((1, 3, *canvas)))
    expected = (torch.linalg.pinv(dense(op, canvas), rtol=1e-10) @ y.flatten()).reshape(1, 3, *canvas)
    assert relative(op.pinv(y), expected) < 1e-4
    assert relative(op.A(op.pinv(y)), y) < 1e-5


def test_iteration_of_a_frame_does_not_depend_on_the_others():
    op = make("blur_sep", pinv="cg")
    y = frames((3, 3, 8, 8), dtype=torch.float32)
    y[1] = 0
    assert torch.equal(op.pinv(y)[1], torch.zeros(3, 8, 8))
    hard = torch.cat((y[:1], 1e4 * y[2:]))
    assert relative(op.pinv(hard)[0], op.pinv(y[:1])[0]) < 1e-5


# Resolution.


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_bicubic_rows_and_agreement_with_torch(scale):
    matrix = reduction(scale * 8, scale)
    assert torch.allclose(matrix.sum(1), torch.ones(8).double(), atol=1e-14)
    assert int(torch.linalg.matrix_rank(matrix)) == 8
    # torch cuts the kernel at the border and renormalizes, we mirror: rows that do not reach it are equal.
    x = frames((1, 3, 8 * scale, 6 * scale))
    expected = torch.nn.functional.interpolate(x, scale_factor=1 / scale, mode="bicubic", antialias=True)
    got = make("sr_bicubic", scale=scale).A(x)
    assert torch.allclose(got[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-12)


def test_average_downscale_equals_pooling():
    x = frames((2, 3, 12, 8))
    expected = torch.nn.functional.avg_pool2d(x, 4)
    assert torch.allclose(make("sr_avg", scale=4).A(x), expected, atol=1e-15)


# Missing pixels.


def test_random_mask_has_its_ratio_and_seed():
    for ratio in (0.0, 0.25, 0.9, 1.0):
        known = make("inpaint", ratio=ratio, seed=3).known((200, 200))
        assert float(known.float().mean()) == pytest.approx(1 - ratio, abs=0.01)
    a, b = (make("inpaint", ratio=0.5, seed=s).known((20, 20)) for s in (0, 1))
    assert not torch.equal(a, b) and torch.equal(a, make("inpaint", ratio=0.5).known((20, 20)))


def test_box_is_missing():
    known = make("inpaint", box=(1, 2, 3, 4)).known((6, 8))
    assert int((~known).sum()) == 12 and not known[1:4, 2:6].any()


def test_a_mask_for_each_frame():
    masks = torch.rand(4, 6, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    op = make("inpaint", mask=masks)
    x = frames((4, 3, 6, 7))
    assert torch.equal(op.A(x), x * masks[:, None])
    some = op.select([2, 0])
    assert torch.equal(some.A(x[[2, 0]]), x[[2, 0]] * masks[[2, 0], None])
    assert torch.equal(op.select([3]).A(x[3:]), x[3:] * masks[3])
    with pytest.raises(ValueError, match="4 frames"):
        op.A(x[:2])
    chain = make("compose", operators=[make("denoise"), op])
    assert torch.equal(chain.select([1, 2]).A(x[1:3]), x[1:3] * masks[1:3, None])
    assert make("compose", operators=[make("denoise")]).select([0]).describe()["name"] == "compose"


def test_a_mask_from_a_file(tmp_path):
    av, cv2 = pytest.importorskip("av"), pytest.importorskip("cv2")
    mask = (numpy.random.default_rng(0).random((12, 17)) < 0.6).astype(numpy.uint8)
    cv2.imwrite(str(tmp_path / "mask.png"), mask * 255)
    op = make("inpaint", mask=tmp_path / "mask.png")
    assert torch.equal(op.known((12, 17)), torch.from_numpy(mask).bool())
    inverted = make("inpaint", mask=str(tmp_path / "mask.png"), invert=True)
    assert torch.equal(inverted.known((12, 17)), ~torch.from_numpy(mask).bool())
    video = numpy.kron(numpy.random.default_rng(1).integers(0, 2, (3, 4, 4)), numpy.ones((1, 8, 8))).astype(numpy.uint8)
    with av.open(str(tmp_path / "mask.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "gray"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame * 255, format="gray")))
        container.mux(stream.encode())
    assert torch.equal(make("inpaint", mask=tmp_path / "mask.mkv").known((32, 32)), torch.from_numpy(video).bool())
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read"):
        make("inpaint", mask=tmp_path / "text.png")
    with pytest.raises(FileNotFoundError):
        make("inpaint", mask=tmp_path / "absent.png")


# Pictures.


def test_previews():
    u = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(u[..., :4, :4], (24, 24), mode="bicubic").clamp(0, 1)
    x = operators.to_model(smooth)

    def shown(op):
        p = op.preview(op.A(x))
        assert p.shape == x.shape and float(p.min()) >= 0 and float(p.max()) <= 1
        return p

    assert torch.allclose(shown(make("denoise")), smooth, atol=1e-6)
    gray = shown(make("gray"))
    assert torch.allclose(gray, smooth.mean(1, keepdim=True).expand_as(gray), atol=1e-6)
    assert relative(shown(make("sr", scale=2)), smooth) < 0.05
    assert relative(shown(make("inpaint", ratio=0.5)), smooth) < 0.5
    assert torch.allclose(shown(make("inpaint", ratio=0.0)), smooth, atol=1e-6)
    low = make("lowlight", gain=0.1)
    y = low.A(x)
    assert float(low.preview(y).mean()) == pytest.approx(0.4, abs=0.02)
    chain = gray_then(make("sr_avg", scale=2))
    assert relative(shown(chain), gray) < 0.1
    assert torch.equal(chain.preview(chain.A(x))[:, 0], chain.preview(chain.A(x))[:, 1])


def test_holes_are_filled_with_what_is_around():
    constant = torch.full((1, 3, 40, 40), 0.2)
    op = make("inpaint", box=(10, 10, 12, 12))
    assert torch.allclose(op.preview(op.A(operators.to_model(constant))), constant, atol=1e-5)


def test_measurements_from_pictures():
    u = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make("denoise").from_picture(u), 2 * u - 1)
    assert torch.allclose(make("gray").from_picture(u), 2 * u.mean(1, keepdim=True) - 1, atol=1e-6)
    assert torch.equal(make("gray").from_picture(u[:, :1]), 2 * u[:, :1] - 1)
    inpaint = make("inpaint", ratio=0.5)
    assert torch.equal(inpaint.from_picture(u), inpaint.A(2 * u - 1))
    chain = make("compose", operators=[make("sr", scale=2), make("gray"), inpaint])
    assert torch.allclose(chain.from_picture(u), inpaint.A(2 * u.mean(1, keepdim=True) - 1), atol=1e-6)


def test_low_light_is_gain_and_offset():
    u = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    op = make("lowlight", gain=0.3, offset=0.05)
    assert torch.allclose((op.A(2 * u - 1) + 1) / 2, 0.3 * u + 0.05)
    assert torch.allclose(op.pinv(op.A(u)), u)
    with pytest.raises(ValueError, match="gain of this low-light operator is unknown"):
        make("lowlight").A(u)
