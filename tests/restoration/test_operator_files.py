"""Operators by name and from files, and what they refuse."""

from __future__ import annotations

import json

import pytest
import torch
from degradations import CASES, case, frames, gray_then

from zsvr import operators
from zsvr.operators import make


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
        (lambda: make("blur_sep", kernel="motion:15,0"), ValueError, "blur_fft takes any kernel"),
        (lambda: make("deblur", kernel=torch.ones(4)), ValueError, "odd length"),
        (lambda: make("deblur", kernel=torch.zeros(3)), ValueError, "positive sum"),
        (lambda: make("blur_fft", kernel=torch.full((3, 3), float("nan"))), ValueError, "finite"),
        (lambda: make("deblur", svd_tol=0), ValueError, "operator.svd_tol"),
        (lambda: make("deblur", pinv="wiener"), ValueError, "operator.pinv must be one of closed, cg for blur_sep"),
        (lambda: make("blur_fft", pinv="wiener"), ValueError, "belong together"),
        (
            lambda: make("blur_fft", kernel="motion:5,30", fft_pad="reflect", pinv="closed"),
            ValueError,
            "symmetric along each axis",
        ),
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
