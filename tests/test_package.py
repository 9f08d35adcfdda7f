"""The installed package: what it says of itself, the capability switch, explain."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import zsvr
import zsvr_kernels as zk
from zsvr_kernels import _native, backends, testing

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_versions_agree():
    assert zsvr.__version__ == zk.__version__ == zk.build_info()["zsvr_kernels"]
    assert f"## {zk.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_build_info_says_what_is_there():
    info = zk.build_info()
    assert info["torch"] == torch.__version__
    text = run("-m", "zsvr_kernels")
    for key in ("native", "cpu_capability", "threads", "cuda_archs", "triton"):
        assert key in info and key in text
    if _native.is_available():
        assert info["cpu_capability"] in info["cpu_capabilities_compiled"].split(",")
        with testing.threads(1):
            assert zk.build_info()["threads"].startswith("1 ")


@pytest.mark.skipif(not _native.is_available(), reason="the native module is not built")
def test_the_capability_variable_lowers_the_level():
    code = "import zsvr_kernels as zk; print(zk.build_info()['cpu_capability'])"
    for name in testing.instruction_sets():
        assert run("-c", code, ZSVR_CPU_CAPABILITY=name).strip() == name
    assert run("-c", code, ZSVR_CPU_CAPABILITY="unknown").strip() == testing.instruction_sets()[-1]


def test_the_package_works_without_the_native_module():
    code = (
        "import sys; sys.modules['zsvr_kernels._C'] = None\n"
        "import torch, zsvr_kernels as zk\n"
        "q = torch.randn(1, 2, 6, 1, 8)\n"
        "assert zk.build_info()['native'].startswith('no: ')\n"
        "links = zk.Links.from_flow(*[torch.zeros(1, 1, 2, 8, 12)] * 2, grid=(2, 3))\n"
        "zk.trajectory_attention(q, q, q, zk.chain_links(links))\n"
        "zk.cross_frame_attention(q, q, q, zk.neighbors(2))\n"
        "try: zk.cross_frame_attention(q, q, q, zk.neighbors(2), backend='cpu')\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert "C++20 compiler" in run("-c", code)


@pytest.mark.parametrize(
    ("found", "said"), [("'3.6.0'", "3.6.0"), ("'3.2.1+rocm'", "3.2.1"), ("None", "not installed")]
)
def test_triton_may_come_from_a_distribution_of_another_name(found, said):
    code = (
        "import torch, importlib.metadata as m, importlib.machinery, sys, types\n"
        "real = m.version\n"
        "def version(name):\n"
        "    if name == 'triton': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "triton = types.ModuleType('triton')\n"
        "triton.__spec__ = importlib.machinery.ModuleSpec('triton', None)\n"
        f"if {found}: triton.__version__ = {found}\n"
        "sys.modules['triton'] = triton\n"
        "import zsvr_kernels as zk; print(zk.build_info()['triton'])\n"
    )
    assert said in run("-c", code)


def test_explain_names_the_choice_and_each_refusal(capsys):
    q = torch.randn(1, 2, 6, 1, 12)
    explanation = zk.explain("cross_frame_attention", q, q, q, zk.neighbors(2))
    printed = capsys.readouterr().out
    assert "auto runs: sdpa" in printed and printed.strip() == str(explanation)
    assert explanation.choice == "sdpa" and "multiples of 8" in explanation.refusals["cpu"]
    assert set(explanation.refusals) == {"cpu", "triton", "cuda"}
    wide = zk.explain("trajectory_attention", q.double()[..., :8])
    assert wide.choice == "reference" and "float64" in wide.refusals["cpu"]
    with pytest.raises(ValueError, match="op must be one of"):
        zk.explain("attention", q)


def test_explain_takes_what_the_call_takes(capsys):
    q = torch.randn(1, 2, 6, 1, 16)
    links = zk.Links.from_flow(*[torch.zeros(1, 1, 2, 8, 12)] * 2, grid=(2, 3))
    chained = zk.chain_links(links)
    for given in (links, links.forward):
        assert zk.explain("chain_links", given, window=1, rounding="nearest").call.dtype == torch.float32
    assert not zk.explain("trajectory_attention", q, q, q, chained, scale=0.5).call.needs_grad
    chained.positions.requires_grad_()
    assert zk.explain("trajectory_attention", q, q, q, chained).call.needs_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert zk.explain("cross_frame_attention", q, q, q, zk.neighbors(2)).call.dtype == torch.bfloat16
    for op in backends.OPERATORS:
        with pytest.raises(TypeError, match=f"{op} takes .* first, got NoneType"):
            zk.explain(op, None)
        with pytest.raises(TypeError, match="no keyword 'retrun_lse'"):
            zk.explain(op, links.forward, retrun_lse=True)
    with pytest.raises(TypeError, match="no keyword 'return_lse'"):
        zk.explain("chain_links", links, return_lse=True)
    with pytest.raises(ValueError, match="5 axes"):
        zk.explain("cross_frame_attention", q[0])


def test_python_blocks_of_the_documents_run(capsys):
    documents = [ROOT / "README.md", *(ROOT / "zsvr_kernels" / "ops").glob("*/README.md")]
    blocks = 0
    for path in documents:
        space: dict[str, object] = {"torch": torch, "zk": zk, "zsvr_kernels": zk}
        for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL):
            exec(compile(block, str(path), "exec"), space)
            blocks += 1
    assert blocks >= 4


def test_examples_of_the_docstrings_run():
    import doctest

    space = {"torch": torch, "zsvr_kernels": zk}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    things = [zk.cross_frame_attention, zk.trajectory_attention, zk.chain_links, zk.neighbors, zk.Links.from_flow]
    things += [zk.correspondence_search, zk.link_score]
    for thing in things:
        tests = doctest.DocTestFinder(recurse=False).find(thing, globs=dict(space))
        assert tests and tests[0].examples, thing
        for test in tests:
            runner.run(test)
    assert runner.failures == 0


def test_make_targets_that_the_documents_name_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"`(?:[A-Z]+=\S+ )?make ([a-z]+)", (ROOT / name).read_text()))
        assert named and named <= targets, named - targets


def documents() -> list[pathlib.Path]:
    folders = ("zsvr_kernels", "bench", "docs")
    return [*ROOT.glob("*.md"), *(p for folder in folders for p in (ROOT / folder).rglob("*.md"))]


def test_relative_links_and_pictures_of_the_documents_exist():
    links = 0
    for path in documents():
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:|#", target):
                continue
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.relative_to(ROOT)}: {target}"
            links += 1
    assert links >= 5


def test_the_picture_is_small():
    assert 20_000 < (ROOT / "docs" / "contact_sheet.png").stat().st_size < 1_000_000


def test_build_info_names_the_compiler():
    if _native.is_available():
        assert re.match(r"yes \(.*[A-Za-z].* ?\d", zk.build_info()["native"])
    else:
        assert _native.why_missing in zk.build_info()["native"]
