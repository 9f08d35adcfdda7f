"""Operators: adjoints, pseudo-inverses, spectra, dtypes, gradients; every one in the registry, and against deepinv."""

from __future__ import annotations

import pytest
import torch
from degradations import CASES, EXACT, FULL_ROW_RANK, LOPSIDED_IMAGE, TRUNCATED, case, dense, frames, relative
from hypothesis import given, settings
from hypothesis import strategies as st

from zsvr import operators
from zsvr.operators import Flat, Spectral, inner, kernels, make


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


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_gives_the_same(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    op, canvas = case(name)
    x = frames((2, 3, *canvas))
    y = op.A(x)
    for function, given_frames in ((op.A, x), (op.adjoint, y), (op.pinv, y), (op.preview, y)):
        result = function(given_frames.cuda())
        assert result.is_cuda and torch.allclose(result.cpu(), function(given_frames), atol=1e-6)


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


def test_operators_equal_deepinv():
    deepinv = pytest.importorskip("deepinv", reason="deepinv is not installed")
    x = frames((2, 3, 32, 32), dtype=torch.float32)
    kernel = kernels.as_image("gaussian:9,2").float()
    blur = deepinv.physics.BlurFFT
    small = kernels.as_image("gaussian:5,0.7").float()
    pairs = {
        "gray": (make("gray"), deepinv.physics.Decolorize(channels=3, srf="average")),
        "blur": (make("blur_fft"), blur(img_size=(3, 32, 32), filter=kernel[None, None])),
        "small blur": (
            make("blur_fft", kernel="gaussian:5,0.7", svd_tol=1e-3),
            blur(img_size=(3, 32, 32), filter=small[None, None]),
        ),
        "lopsided blur": (
            make("blur_fft", kernel=LOPSIDED_IMAGE),
            deepinv.physics.Blur(filter=LOPSIDED_IMAGE.float()[None, None], padding="circular"),
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
        if name not in ("blur", "lopsided blur"):  # theirs drop no singular value
            assert relative(theirs.A_dagger(y), ours.pinv(y)) < 1e-5, name
