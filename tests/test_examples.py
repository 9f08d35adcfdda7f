"""The examples: each runs as it stands, and says what it should."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"


def run(name: str) -> str:
    """Run an example without network, where nothing is cached, and return what it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": os.devnull, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def drifts(printed: str) -> tuple[float, float]:
    """Return the drift of spatial and of SLR attention that an example prints."""
    spatial = re.search(r"spatial attention: ([\d.]+)$", printed, re.MULTILINE)
    slr = re.search(r"SLR attention: ([\d.]+)$", printed, re.MULTILINE)
    assert spatial and slr, printed
    return float(spatial[1]), float(slr[1])


def test_every_example_is_tested_and_named_in_the_readme():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"unet2d.py", "stable_diffusion.py", "own_unet.py"}
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert all(f"](examples/{name})" in readme for name in names)


def test_unet2d():
    pytest.importorskip("diffusers")
    pytest.importorskip("cv2")
    printed = run("unet2d")
    assert re.search(r"down_blocks\.1\.attentions\.0 +diffusers Attention +32x32 +2 +16 +\S+ +yes\n", printed)
    assert re.search(r"mid_block\.attentions\.0 +diffusers Attention +8x8 +4 +16 +\S+ +yes\n", printed)
    assert "10 of 10 attention layers patched" in printed
    spatial, slr = drifts(printed)
    assert slr < spatial


def test_stable_diffusion():
    pytest.importorskip("diffusers")
    pytest.importorskip("cv2")
    printed = run("stable_diffusion")
    assert re.search(r"attn1 +diffusers Attention +24x24 +4 +8 +\S+ +yes\n", printed)
    assert re.search(r"attn2 .*no: it is cross-attention", printed)
    assert re.search(r"\d+ of \d+ attention layers patched", printed)
    assert "VideoContext(B=1, T=6, k=5/6" in printed
    moved = re.search(r"moved the links on 24x24 by ([\d.]+) tokens", printed)
    assert moved and 0 < float(moved[1]) < 24
    spatial, slr = drifts(printed)
    assert slr < spatial


def test_own_unet():
    pytest.importorskip("cv2")
    printed = run("own_unet")
    spatial, slr = drifts(printed)
    assert slr < spatial
    assert "VideoContext(B=1, T=6, k=3/4, grids: 16x16, 32x32" in printed
    assert "gradients of 40 tensors" in printed
    assert "largest difference with activation checkpointing: 0.0\n" in printed
