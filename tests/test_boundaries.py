"""What may import what, how long files get, and what an operator consists of."""

from __future__ import annotations

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

import zsvr_kernels as zk
from zsvr_kernels import backends

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHON = sorted(p for folder in ("zsvr_kernels", "python") for p in (ROOT / folder).rglob("*.py"))
OUTSIDE = [p for folder in ("tests", "bench", "gates", "examples") for p in (ROOT / folder).rglob("*.py")]
EVERY_PYTHON = [*PYTHON, *OUTSIDE, ROOT / "setup.py"]
NATIVE = sorted((*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")))
OPERATORS = sorted(p.name for p in (ROOT / "zsvr_kernels" / "ops").iterdir() if (p / "__init__.py").exists())


def imports(path: pathlib.Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def package(name: str) -> str:
    return name.split(".")[0]


def is_triton_kernel(path: pathlib.Path) -> bool:
    return path.stem.startswith("triton_") and path.stem not in ("triton_launch", "triton_configs")


def test_triton_kernels_need_triton_alone():
    # So that another release of Triton can compile them where there is no torch.
    for path in filter(is_triton_kernel, (ROOT / "zsvr_kernels").rglob("triton_*.py")):
        for name in imports(path):
            assert package(name) in ("__future__", "triton") or ".triton_" in name, f"{path} imports {name}"


def test_triton_kernels_open_with_the_five_lines():
    for path in filter(is_triton_kernel, (ROOT / "zsvr_kernels").rglob("triton_*.py")):
        for kernel in re.findall(r"def \w+_kernel\(.*?\n(?=@|def |\Z)", path.read_text(), re.S):
            for label in ("Computes:", "Grid:", "Tiles:", "Traffic:", "Numerics:"):
                assert f"# {label}" in kernel, f"{path}: {kernel.splitlines()[0]} lacks {label}"


def test_files_stay_short():
    long = [(p, n) for p in EVERY_PYTHON if (n := len(p.read_text().splitlines())) > 500]
    long += [(p, n) for p in NATIVE if (n := len(p.read_text().splitlines())) > 700]
    assert not long


def test_no_module_has_a_name_that_says_nothing():
    banned = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert not [p for p in EVERY_PYTHON if p.stem in banned]


@pytest.mark.parametrize("pattern", [r"\bprint\(", r"breakpoint\(", "NotImplementedError", r"\bTODO\b", r"\bFIXME\b"])
def test_packages_hold_no_leftovers(pattern):
    assert not [p for p in PYTHON if re.search(pattern, p.read_text())]


def test_native_code_holds_no_leftovers():
    assert not [p for p in NATIVE if re.search(r"#if 0|\bTODO\b|\bFIXME\b|std::cout", p.read_text())]


def test_kernels_never_import_the_framework():
    for path in (ROOT / "zsvr_kernels").rglob("*.py"):
        assert "zsvr" not in {package(name) for name in imports(path)}, path


def test_only_the_demo_needs_more_than_torch():
    allowed = {"torch", "zsvr_kernels", *sys.stdlib_module_names}
    for path in (ROOT / "zsvr_kernels").rglob("*.py"):
        if "demo" in path.parts or is_triton_kernel(path):
            continue
        extra = {package(n) for n in imports(path, top_level_only=True)} - allowed
        assert not extra, f"{path} imports {extra}"


def test_operators_point_one_way():
    for op in OPERATORS:
        folder = ROOT / "zsvr_kernels" / "ops" / op
        inside = f"zsvr_kernels.ops.{op}"
        for path in folder.glob("*.py"):
            names = imports(path)
            if path.stem in ("cpu", "sdpa", "sdpa_kernels", "cuda"):
                used = [name for name in names if name.startswith("zsvr_kernels.ops")]
                assert all(path.stem == "sdpa" and name.startswith(f"{inside}.sdpa_") for name in used), path
            if path.stem == "triton_launch":
                used = [name for name in names if name.startswith("zsvr_kernels.ops")]
                assert all(name.startswith(f"{inside}.triton_") for name in used), path
            if path.stem == "registration":
                assert not any(name.startswith(inside) for name in names), path
            if path.stem == "reference":
                assert not any(name.startswith("zsvr_kernels.ops") for name in names), path
            if path.stem != "__init__":
                others = [name for name in names if name.startswith("zsvr_kernels.ops.")]
                assert all(name.startswith(inside) for name in others), path


def test_what_operators_stand_on_knows_no_operator():
    allowed = {"__init__", "__main__", "testing"}  # the public face, and what tests import
    allowed |= {"correction", "context", "combination", "slr", "serial", "patching"}  # what is built from operators
    for path in (ROOT / "zsvr_kernels").glob("*.py"):
        if path.stem not in allowed:
            assert not any(name.startswith("zsvr_kernels.ops") for name in imports(path)), path


def test_modules_import_each_other_without_a_cycle():
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "zsvr_kernels").rglob("*.py")}
    graph = {name: imports(path) & names.keys() - {name} for name, path in names.items()}
    assert graph["zsvr_kernels.trajectories"] >= {"zsvr_kernels.validation"}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the cycle


def test_one_file_knows_python_and_none_knows_torch():
    for path in NATIVE:
        text = path.read_text()
        if path.name != "module.cpp":
            assert "pybind11" not in text and "Python.h" not in text, path
        assert not re.search(r"#include <(torch|ATen|c10)", text), path


def test_kernels_open_with_the_five_lines():
    for path in (ROOT / "csrc").rglob("*_isa.cpp"):
        head = path.read_text()[:2500]
        if "probes" in path.parts:
            continue
        for label in ("Computes:", "Tasks:", "Tiles:", "Traffic:", "Numerics:"):
            assert f"// {label}" in head, f"{path}: {label}"


def test_importing_takes_torch_alone_and_no_network():
    script = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('network at import')\n"
        "socket.socket.connect = refuse\n"
        "import zsvr_kernels\n"
        "banned = {'triton', 'diffusers', 'transformers', 'accelerate', 'safetensors', 'cv2', 'av', 'tqdm', 'PIL'}\n"
        "banned |= {'pytest'}\n"
        "before = set(sys.modules)\n"
        "print(sorted(banned & {n for n in sys.modules}))\n"
        "import zsvr\n"
    )
    torch_alone = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print(sorted(m for m in sys.modules if '.' not in m))"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(ast.literal_eval(done.stdout.splitlines()[0]))
    assert loaded <= set(ast.literal_eval(torch_alone))


@pytest.mark.parametrize("op", OPERATORS)
def test_an_operator_is_complete(op):
    folder = ROOT / "zsvr_kernels" / "ops" / op
    for name in ("README.md", "api.py", "reference.py", "registration.py", "cpu.py"):
        assert (folder / name).is_file(), f"{op} lacks {name}"
    for path in (
        ROOT / "csrc" / op / f"{op}.h",
        ROOT / "csrc" / "tests" / f"{op}_test.cpp",
        ROOT / "tests" / "kernels" / f"test_{op}.py",
        ROOT / "bench" / f"bench_{op}.py",
    ):
        assert path.is_file(), f"{op} lacks {path.relative_to(ROOT)}"
    assert (op, "cpu") in backends.PREFERENCE and op in backends.OPERATORS
    assert hasattr(zk, op) and op in zk.__all__
    text = (folder / "README.md").read_text().lower()
    for word in ("backward", "memory", "roofline"):
        assert word in text, f"{op}/README.md says nothing of {word}"
    assert f"zsvr::{op}" in " ".join(f"zsvr::{name}" for name in _schemas(folder / "registration.py"))


def _schemas(path: pathlib.Path) -> list[str]:
    return re.findall(r'"(\w+)\(Tensor', path.read_text()) + re.findall(r'"(\w+)\(', path.read_text())


def test_public_names_are_documented():
    for name in zk.__all__:
        thing = getattr(zk, name)
        assert name == "__version__" or (thing.__doc__ or "").strip(), name
