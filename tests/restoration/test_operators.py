"""Operators: adjoints, pseudo-inverses, spectra, borders, previews, files; against scipy and deepinv."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zsvr import operators
from zsvr.operators import Flat, Spectral, inner, kernels, make
from zsvr.operators.blur import FourierBlur
from zsvr.operators.downscaling import reduction
from zsvr.operators.separable import convolution

LOPSIDED = torch.tensor([0.5, 0.3, 0.1, 0.1, 0.0], dtype=torch.float64)  # not symmetric: shows flips and shifts
LOPSIDED_IMAGE = torch.tensor([[0.0, 0.3, 0.1], [0.2, 0.2, 0.1], [0.05, 0.05, 0.0]], dtype=torch.float64)


def gray_then(*more):
    return make("compose", operators=[make("gray"), *more])


# name -> (operator, multiple of both sides). Every operator in the registry is here; see the test that says so.
CASES = {
    "denoise": (lambda: make("denoise"), 1),
    "inpaint_random": (lambda: make("inpaint", ratio=0.4), 1),
    "inpaint_box": (lambda: make("inpaint", box=(1, 2, 3, 4)), 1),
    "gray": (lambda: make("gray"), 1),
    "gray_luma": (lambda: make("gray", weights=(0.299, 0.587, 0.114)), 1),
    "sr_avg": (lambda: make("sr_avg", scale=3), 3),
    "sr_bicubic_2": (lambda: make("sr_bicubic", scale=2), 2),
    "sr_bicubic_4": (lambda: make("sr_bicubic", scale=4), 4),
    "blur_sep": (lambda: make("blur_sep"), 1),
    "blur_sep_lopsided": (lambda: make("blur_sep", kernel=(LOPSIDED, kernels.gaussian(7, 1.0))), 1),
    "blur_sep_cg": (lambda: make("blur_sep", kernel="gaussian:3,0.6", pinv="cg", cg_iters=300), 1),
    "blur_fft": (lambda: make("blur_fft"), 1),
    "blur_fft_motion": (lambda: make("blur_fft", kernel="motion:7,30"), 1),
    "blur_fft_lopsided": (lambda: make("blur_fft", kernel=LOPSIDED_IMAGE), 1),
    "blur_fft_even": (lambda: make("blur_fft", kernel=torch.tensor([[0.1, 0.2], [0.3, 0.4]])), 1),
    "blur_fft_large": (lambda: make("blur_fft", kernel="dps"), 1),
    "blur_fft_reflect": (lambda: make("blur_fft", kernel=LOPSIDED_IMAGE, fft_pad="reflect"), 1),
    "blur_fft_wiener": (lambda: make("blur_fft", pinv="wiener", noise_std=0.05), 1),
    "lowlight": (lambda: make("lowlight", gain=0.3, offset=0.5 - 0.15), 1),  # an offset with which it is linear
    "gray_sr": (lambda: gray_then(make("sr_avg", scale=2)), 2),
    "sr_inpaint": (lambda: make("compose", operators=[make("sr_bicubic", scale=2), make("inpaint", ratio=0.3)]), 2),
    "blur_sr": (lambda: make("compose", operators=[make("blur_sep", kernel="gaussian:5,1"), make("sr_avg")]), 4),
}
EXACT = ["denoise", "inpaint_random", "inpaint_box", "gray", "gray_luma", "sr_avg", "sr_bicubic_2", "sr_bicubic_4"]
TRUNCATED = ["blur_sep", "blur_sep_lopsided", "blur_fft", "blur_fft_motion", "blur_fft_lopsided", "blur_fft_large"]
TRUNCATED += ["blur_fft_even"]
FULL_ROW_RANK = ["denoise", "gray", "gray_luma", "sr_avg", "sr_bicubic_2", "sr_bicubic_4", "gray_sr"]


def frames(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def case(name, height=11, width=13):
    build, multiple = CASES[name]
    return build(), (height * multiple, width * multiple)


def relative(a, b):
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp(min=1e-300))


def test_every_operator_is_tested():
    assert {build().name for build, _ in CASES.values()} == set(operators.REGISTRY)


@pytest.mark.parametrize("name", CASES)
@given(
    height=st.integers(5, 15),
    width=st.integers(6, 15),
    seed=st.integers(0, 99),
    leading=st.sampled_from([(), (2,), (2, 3)]),
)
@settings(deadline=None, max_examples=12)
def test_adjoint(name, height, width, seed, leading):
    op, canvas = case(name, height, width)
    x = frames((*leading, 3, *canvas), seed)
    shape = op.measured_shape(canvas)
    y = frames((*leading, *shape), seed + 1)
    Ax, Aty = op.A(x), op.adjoint(y)
    assert Ax.shape == y.shape and Aty.shape == x.shape and op.pinv(y).shape == x.shape
    assert op.canvas(shape[1:]) == canvas
    scale = float(torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y))
    assert abs(float(inner(Ax, y) - inner(x, Aty))) <= 1e-13 * scale


@pytest.mark.parametrize("name", CASES)
def test_linear_and_bounded_by_rho(name):
    op, canvas = case(name)
    x, other = frames((3, *canvas)), frames((3, *canvas), 1)
    assert torch.allclose(op.A(2 * x - other), 2 * op.A(x) - op.A(other), atol=1e-12)
    v = other
    for _ in range(60):  # power iteration reaches the largest eigenvalue from below
        v = op.adjoint(op.A(v))
        largest = float(torch.linalg.vector_norm(v))
        v = v / largest
    assert largest <= op.rho * (1 + 1e-9)
    assert largest > 0.9 * op.rho or op.name in ("compose",) or "lopsided" in name or "reflect" in name


@pytest.mark.parametrize("name", [*EXACT, "gray_sr", "sr_inpaint"])
@given(height=st.integers(5, 15), width=st.integers(6, 15), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=12)
def test_exact_pseudo_inverse(name, height, width, seed):
    op, canvas = case(name, height, width)
    assert op.exact_pinv and op.full_row_rank == (name in FULL_ROW_RANK)
    x = frames((2, 3, *canvas), seed)
    y = op.A(x)
    assert relative(op.A(op.pinv(y)), y) < 1e-12
    if op.full_row_rank:
        free = frames(tuple(y.shape), seed + 1)
        assert relative(op.A(op.pinv(free)), free) < 1e-12
    if op.name != "compose":  # the other three conditions of Penrose
        q = op.pinv(op.A(x))
        assert relative(op.pinv(op.A(q)), q) < 1e-12
        z = frames(tuple(x.shape), seed + 2)
        assert abs(float(inner(q, z) - inner(x, op.pinv(op.A(z))))) < 1e-10
        w = frames(tuple(y.shape), seed + 3)
        assert abs(float(inner(op.A(op.pinv(w)), y) - inner(w, op.A(op.pinv(y))))) < 1e-10


def dense(op, canvas):
    """Return A as a float64 matrix for one channel (or three where they mix)."""
    n = 3 * canvas[0] * canvas[1]
    return op.A(torch.eye(n, dtype=torch.float64).reshape(n, 3, *canvas)).reshape(n, -1).T


@pytest.mark.parametrize("name", [*EXACT, *TRUNCATED])
def test_pseudo_inverse_is_that_of_the_truncated_matrix(name):
    op, canvas = case(name, 5, 7)
    matrix = dense(op, canvas)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    cut = getattr(op, "svd_tol", 1e-9)
    assert not ((s > cut * 0.999) & (s < cut * 1.001)).any()
    kept = s > cut
    inverse = vt[kept].T / s[kept] @ u[:, kept].T
    y = frames((4, *op.measured_shape(canvas)))
    expected = (y.reshape(4, -1) @ inverse.T).reshape(4, 3, *canvas)
    assert relative(op.pinv(y), expected) < 1e-9
    assert name in EXACT or not op.exact_pinv
    truncated = (u[:, kept] * s[kept]) @ vt[kept]
    x = frames((4, 3, *canvas), 1)
    y = (x.reshape(4, -1) @ truncated.T).reshape(4, *op.measured_shape(canvas))
    assert relative(op.A(op.pinv(y)), y) < 1e-9


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n][0]().spectrum() is not None])
def test_spectrum_is_that_of_the_matrix(name):
    op, canvas = case(name, 5, 7)
    spectrum = op.spectrum()
    values = torch.linalg.svdvals(dense(op, canvas))
    if isinstance(spectrum, Flat):
        nonzero = values[values > 1e-9]
        assert torch.allclose(nonzero, torch.full_like(nonzero, spectrum.s), atol=1e-9)
        return
    assert isinstance(spectrum, Spectral)
    found = spectrum.values(canvas)
    assert found.dtype == torch.float32
    got = found.expand(3, *found.shape[-2:]).flatten().double().sort(descending=True).values
    expected = torch.nn.functional.pad(values, (0, got.numel() - values.numel()))
    expected = expected.masked_fill(expected < getattr(op, "svd_tol", 0), 0.0)
    assert torch.allclose(got, expected, atol=1e-6)

    x, z = frames((2, 3, *canvas)), frames((2, 3, *canvas), 1)
    c = spectrum.analyze(x)
    assert relative(spectrum.synthesize(c), x) < 1e-12
    assert float(c.abs().square().sum()) == pytest.approx(float(x.square().sum()), rel=1e-12)  # V is unitary
    # V s V^T x has the norm of the truncated A x, and V 1{s>0} V^T is A+ A.
    kept = (found > 0).double()
    assert relative(spectrum.synthesize(kept * c), op.pinv(op.A(x))) < 1e-9
    truncated = op.A(op.pinv(op.A(x)))
    assert float((found.double() * c).abs().square().sum()) == pytest.approx(float(truncated.square().sum()), rel=1e-5)
    # Real factors of s keep frames real.
    mixed = spectrum.synthesize(found.double() * spectrum.analyze(z))
    assert mixed.dtype == z.dtype and mixed.shape == z.shape


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_inputs_are_kept(name, dtype):
    op, canvas = case(name)
    x = frames((2, 3, *canvas)).to(dtype)
    before = x.clone()
    y = op.A(x)
    for result in (y, op.adjoint(y), op.pinv(y), op.preview(y)):
        assert result.dtype == dtype and result.device == x.device and torch.isfinite(result).all()
    assert torch.equal(x, before)
    exact, rough = op.A(before.double()), {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    assert relative(y.double(), exact) < rough


@pytest.mark.parametrize("name", CASES)
def test_frames_do_not_see_each_other(name):
    op, canvas = case(name)
    x = frames((4, 3, *canvas))
    y = op.A(x)
    for function, given_frames in ((op.A, x), (op.adjoint, y), (op.pinv, y)):
        whole = function(given_frames)
        for i in range(4):
            assert relative(function(given_frames[i]), whole[i]) < 1e-11  # products are summed in another order


@pytest.mark.parametrize("name", CASES)
def test_gradients_flow_through(name):
    op, canvas = case(name, 5, 6)
    x = frames((1, 3, *canvas)).requires_grad_()
    w = frames(tuple(op.A(x).shape), 1)
    (gradient,) = torch.autograd.grad((op.A(x) * w).sum(), x)
    assert relative(gradient, op.adjoint(w)) < 1e-12


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith(("inpaint", "sr_inpaint", "lowlight"))])
def test_constants_stay_constant(name):
    op, canvas = case(name)
    assert torch.allclose(op.A(torch.full((3, *canvas), 0.7, dtype=torch.float64)), torch.tensor(0.7).double())


# Kernels and borders.


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
        assert length2 == pytest.approx(14**2 / 12, rel=0.05)  # variance of an even motion over 14 pixels
    assert torch.equal(kernels.motion(1, 30), torch.ones(1, 1, dtype=torch.float64))


def test_wiener_is_its_formula():
    op = make("blur_fft", pinv="wiener", noise_std=0.1)
    y = frames((1, 3, 8, 9))
    h = op.transfer(8, 9)
    expected = torch.fft.ifft2(torch.fft.fft2(y) * h.conj() / (h.abs() ** 2 + 0.2**2 / 0.25)).real
    assert relative(op.pinv(y), expected) < 1e-12
    assert op.spectrum() is None


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
    with pytest.raises(ValueError, match="no picture"):
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


# Files and faults.


@pytest.mark.parametrize("name", CASES)
def test_saved_operators_come_back(name, tmp_path):
    op, canvas = case(name)
    operators.save(op, tmp_path / "operator.safetensors")
    back = operators.load(tmp_path / "operator.safetensors")
    x = frames((2, 3, *canvas))
    y = op.A(x)
    assert type(back) is type(op) and repr(back) == repr(op) and back.rho == op.rho
    assert torch.equal(back.A(x), y) and torch.equal(back.pinv(y), op.pinv(y))
    assert [p.name for p in tmp_path.iterdir()] == ["operator.safetensors"]


def test_saving_overwrites_only_when_asked(tmp_path):
    path = tmp_path / "operator.safetensors"
    operators.save(make("denoise"), path)
    with pytest.raises(FileExistsError, match="overwrite"):
        operators.save(make("gray"), path)
    assert operators.load(path).name == "denoise"
    operators.save(make("gray"), path, overwrite=True)
    assert operators.load(path).name == "gray"
    with pytest.raises(FileNotFoundError, match="no folder"):
        operators.save(make("gray"), tmp_path / "absent" / "x")


def test_foreign_and_damaged_files_are_refused(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "operator.safetensors"
    with pytest.raises(FileNotFoundError):
        operators.load(path)
    facts = {"format": "zsvr.operator 1", "operator": json.dumps({"name": "shrink"})}
    for write in (
        lambda: path.write_bytes(b"nothing of the kind"),
        lambda: save_file({"a": torch.zeros(1)}, str(path)),
        lambda: save_file({}, str(path), {"format": facts["format"]}),
        lambda: save_file({}, str(path), {**facts, "operator": "{"}),
        lambda: save_file({}, str(path), facts),
        lambda: save_file({}, str(path), {**facts, "operator": '{"name": "gray", "color": 1}'}),
        lambda: save_file({}, str(path), {**facts, "operator": '{"name": "inpaint", "mask": {"tensor": "x"}}'}),
        lambda: save_file({}, str(path), {**facts, "operator": "[]"}),
    ):
        write()
        with pytest.raises(ValueError, match=r"is no file of operators\.save, or it is damaged"):
            operators.load(path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make("shrink"), ValueError, "unknown task or operator 'shrink': expected one of"),
        (lambda: make("sr", factor=4), TypeError, "sr_bicubic does not take factor: it takes scale"),
        (lambda: make("denoise", sigma=1), TypeError, "denoise does not take sigma: it takes no arguments"),
        (lambda: make("sr", scale=0), ValueError, "scale must be an integer"),
        (lambda: make("sr", scale=2.0), ValueError, "scale must be an integer"),
        (lambda: make("sr", scale=4).measured_shape((30, 32)), ValueError, "30 x 32 is not, 32 x 32 is"),
        (lambda: make("sr_avg", scale=4).A(torch.zeros(3, 30, 32)), ValueError, "multiple of the scale 4"),
        (lambda: make("denoise").measured_shape((0, 4)), ValueError, "canvas is"),
        (lambda: make("inpaint"), ValueError, "exactly one of"),
        (lambda: make("inpaint", ratio=0.5, box=(0, 0, 1, 1)), ValueError, "exactly one of"),
        (lambda: make("inpaint", ratio=1.5), ValueError, "ratio"),
        (lambda: make("inpaint", ratio=0.5, invert=True), ValueError, "invert"),
        (lambda: make("inpaint", mask=torch.full((4, 4), 0.5)), ValueError, "0 .missing. and 1"),
        (lambda: make("inpaint", mask=torch.ones(4)), ValueError, "a mask is"),
        (lambda: make("inpaint", mask=torch.ones(4, 4)).A(torch.zeros(3, 5, 4)), ValueError, "4 x 4 pixels"),
        (lambda: make("inpaint", box=(3, 3, 4, 4)).A(torch.zeros(3, 5, 9)), ValueError, "leaves the canvas"),
        (lambda: make("gray", weights=(1, 1, 1)), ValueError, "sum 1"),
        (lambda: make("deblur", kernel="gauss"), ValueError, "unknown kernel 'gauss'"),
        (lambda: make("deblur", kernel="gaussian:8,2"), ValueError, "taps must be an odd integer"),
        (lambda: make("deblur", kernel="gaussian:9,0"), ValueError, "std must be a positive"),
        (lambda: make("deblur", kernel="gaussian:9,x"), ValueError, "gaussian:9,x"),
        (lambda: make("deblur", kernel="uniform:9,2"), ValueError, "uniform:9,2"),
        (lambda: make("deblur", kernel="motion:15,0"), ValueError, "blur_fft takes any kernel"),
        (lambda: make("deblur", kernel=torch.ones(4)), ValueError, "odd length"),
        (lambda: make("deblur", kernel=torch.zeros(3)), ValueError, "positive sum"),
        (lambda: make("blur_fft", kernel=torch.full((3, 3), float("nan"))), ValueError, "finite"),
        (lambda: make("deblur", svd_tol=0), ValueError, "operator.svd_tol"),
        (lambda: make("deblur", pinv="wiener"), ValueError, "operator.pinv must be one of closed, cg for blur_sep"),
        (lambda: make("blur_fft", pinv="wiener"), ValueError, "belong together"),
        (lambda: make("blur_fft", fft_pad="zero"), ValueError, "operator.fft_pad"),
        (lambda: make("deblur", cg_iters=0), ValueError, "operator.cg_iters"),
        (lambda: make("lowlight", gain=0), ValueError, "gain must be"),
        (lambda: make("compose", operators=[]), ValueError, "at least one operator"),
        (lambda: make("compose", operators=["gray"]), ValueError, "at least one operator"),
        (lambda: gray_then(make("gray")), ValueError, "gray once"),
        (lambda: gray_then(make("lowlight", gain=0.5)), ValueError, "linear operators only"),
        (lambda: make("compose", operators=[make("gray")], pinv="closed"), ValueError, "operator.pinv"),
    ],
)
def test_faults_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# An implementation nobody here wrote.


def test_operators_equal_deepinv():
    deepinv = pytest.importorskip("deepinv", reason="deepinv is not installed")
    x = frames((2, 3, 32, 32), dtype=torch.float32)
    kernel = kernels.as_image("gaussian:9,2").float()
    pairs = {
        "gray": (make("gray"), deepinv.physics.Decolorize(channels=3, srf="average")),
        "blur_fft": (
            FourierBlur("gaussian:9,2"),
            deepinv.physics.BlurFFT(img_size=(3, 32, 32), filter=kernel[None, None]),
        ),
        "inpaint": (
            make("inpaint", ratio=0.5),
            deepinv.physics.Inpainting(
                img_size=(3, 32, 32), mask=make("inpaint", ratio=0.5).known((32, 32)).float().expand(3, -1, -1)
            ),
        ),
    }
    for name, (ours, theirs) in pairs.items():
        y = ours.A(x)
        assert relative(theirs.A(x), y) < 1e-5, name
        assert relative(theirs.A_adjoint(y), ours.adjoint(y)) < 1e-5, name
        if name != "blur_fft":  # theirs truncates nothing
            assert relative(theirs.A_dagger(y), ours.pinv(y)) < 1e-5, name
