"""What setup.py puts into wheels and source archives, with and without a compiler."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

pytest.importorskip("setuptools", minversion="77")
pytest.importorskip("pybind11")
pytest.importorskip("cmake")
pytest.importorskip("ninja")

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
BUILD_FOLDER = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/zsvr_kernels"
# A project in which finding the compiler works and compiling fails.
BROKEN = """cmake_minimum_required(VERSION 3.22)
project(zsvr_kernels LANGUAGES CXX)
add_library(_C MODULE broken.cpp)
"""


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    """Give a copy of what a build reads."""
    copy = tmp_path / "tree"
    built = shutil.ignore_patterns("__pycache__", "*.so", "_native_build.txt")
    for name in ("zsvr_kernels", "python", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=built)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, copy)
    return copy


def build(tree: pathlib.Path, what: str = "wheel", **environment: str) -> tuple[set[str], str, int]:
    """Run one build hook without a compiler in PATH; return (files of the archive, output, exit status)."""
    code = f"from setuptools import build_meta; build_meta.build_{what}('dist')"
    clean = {k: v for k, v in os.environ.items() if k not in ("PATH", "CXX", "ZSVR_NATIVE", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**clean, "PATH": "", **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    names: set[str] = set()
    for path in (tree / "dist").glob("*"):
        if path.suffix == ".whl":
            names |= set(zipfile.ZipFile(path).namelist())
        else:
            with tarfile.open(path) as archive:
                names |= {name.partition("/")[2] for name in archive.getnames()}
    return names, done.stdout, done.returncode


def note(tree: pathlib.Path) -> str:
    (wheel,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel).read("zsvr_kernels/_native_build.txt").decode()


def test_native_0_leaves_no_older_module_behind(tree):
    (tree / BUILD_FOLDER).mkdir(parents=True)
    for folder in (tree / BUILD_FOLDER, tree / "zsvr_kernels"):
        (folder / MODULE).write_bytes(b"stale")
    names, printed, status = build(tree, ZSVR_NATIVE="0")
    assert status == 0, printed
    assert "zsvr_kernels/ops/chain_links/reference.py" in names
    assert not [name for name in names if name.endswith(".so")]
    assert "ZSVR_NATIVE=0" in note(tree)


def test_an_editable_install_without_kernels_drops_the_module_in_place(tree):
    stale = tree / "zsvr_kernels" / MODULE
    stale.write_bytes(b"stale")
    _, printed, status = build(tree, "editable", ZSVR_NATIVE="0")
    assert status == 0, printed
    assert not stale.exists() and "ZSVR_NATIVE=0" in (tree / "zsvr_kernels" / "_native_build.txt").read_text()


def test_native_1_fails_with_the_reason(tree):
    names, printed, status = build(tree, ZSVR_NATIVE="1", CXX="")
    assert status != 0 and not names
    assert "ZSVR_NATIVE=1 but the native module cannot be built: no C++ compiler was found" in printed


def test_native_auto_without_a_compiler_is_pure_and_keeps_the_reason(tree):
    (tree / BUILD_FOLDER).mkdir(parents=True)
    (tree / BUILD_FOLDER / MODULE).write_bytes(b"stale")
    names, printed, status = build(tree, CXX="")
    assert status == 0, printed
    assert not [name for name in names if name.endswith(".so")]
    assert note(tree).strip() == "no C++ compiler was found"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_native_auto_says_what_did_not_compile(tree):
    (tree / "CMakeLists.txt").write_text(BROKEN)
    (tree / "broken.cpp").write_text("#error seeded by a test\n")
    names, printed, status = build(tree, PATH=os.environ["PATH"])
    assert status == 0 and not [name for name in names if name.endswith(".so")]
    why = note(tree).strip()
    assert "no native module (compiling failed" in printed and why in printed
    assert why.startswith("compiling failed: ") and "broken.cpp:1" in why and "seeded by a test" in why
    # The installed package repeats it.
    (tree / "zsvr_kernels" / "_native_build.txt").write_text(why)
    code = (
        "import sys; sys.modules['zsvr_kernels._C'] = None\n"
        "import zsvr_kernels as zk; print(zk.__file__); print(zk.build_info()['native'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, text=True, capture_output=True, check=True)
    path, native = done.stdout.splitlines()
    assert path.startswith(str(tree)) and native.startswith("no: ") and why in native


def test_the_source_archive_can_build_the_native_module(tree):
    names, printed, status = build(tree, "sdist")
    assert status == 0, printed
    needed = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h")}
    needed |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    needed |= {"zsvr_kernels/demo/assets/cat.png", "python/zsvr/__init__.py"}
    assert needed <= names, needed - names
    assert not [name for name in names if name.endswith((".so", "_native_build.txt"))]
