"""Compile descriptions in an environment that needs nothing but Triton; a line of JSON in, a line of JSON out.

``python -m gates.worker CACHE_FOLDER`` reads ``{"target": ..., "description": ...}`` lines and answers each with what
the compiled kernel consists of, or with ``{"error": ...}``. Kernel files are imported under their own names, but past
their packages, whose ``__init__`` would need torch.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from gates import sass

HERE = pathlib.Path(__file__).resolve().parent
BINARIES = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def gpu_target(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def load(folder: str, module: str, kernel: str) -> Any:
    """Import a kernel from its file; the packages above it are empty stand-ins that know where their files are."""
    parts = module.split(".")
    for n in range(1, len(parts)):
        package = ".".join(parts[:n])
        if package not in sys.modules:
            stand_in = types.ModuleType(package)
            stand_in.__path__ = [str(pathlib.Path(folder, *parts[:n]))]
            sys.modules[package] = stand_in
    if len(parts) == 1 and folder not in sys.path:
        sys.path.insert(0, folder)
    return getattr(importlib.import_module(module), kernel)


def source(description: dict[str, Any], target: GPUTarget) -> ASTSource:
    """Return what Triton compiles, exactly as its JIT would pass it on."""
    kernel = load(description["folder"], description["module"], description["kernel"])
    names = list(description["signature"])
    backend = make_backend(target)
    constants = {
        (names.index(name),): tl.dtype(value["dtype"]) if isinstance(value, dict) else value
        for name, value in description["constants"].items()
    }
    marks = {(names.index(name),): backend.parse_attr(mark) for name, mark in description["marks"].items()}
    return ASTSource(kernel, description["signature"], constants, marks)


def _disassemble(cubin: bytes, num_warps: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(tool: str, *arguments: str) -> str:
            command = [str(BINARIES / tool), *arguments, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        return sass.usage(run("cuobjdump", "--dump-resource-usage")) | sass.analyse(run("nvdisasm", "-c"), num_warps)


def compile_description(description: dict[str, Any], target_name: str) -> dict[str, Any]:
    """Return shared memory, registers, stack and instruction counts of a description on a target."""
    target = gpu_target(target_name)
    compiled = triton.compile(source(description, target), target=target, options=dict(description["options"]))
    num_warps = compiled.metadata.num_warps
    found = {
        "num_warps": num_warps,
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
    }
    if target.backend == "cuda":
        return found | {"spills": 0} | _disassemble(compiled.asm["cubin"], num_warps)
    return found | sass.analyse_amd(compiled.asm["amdgcn"])


def cached(request: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    """Compile, or read what an earlier run found for the same kernel source, description and tools."""
    description = request["description"]
    kernel = load(description["folder"], description["module"], description["kernel"])
    tools = [(HERE / name).read_text() for name in ("worker.py", "sass.py")]
    content = {name: value for name, value in description.items() if name != "folder"}
    parts = [triton.__version__, kernel.cache_key, request["target"], json.dumps(content, sort_keys=True), *tools]
    path = folder / f"{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:32]}.json"
    if path.exists():
        return json.loads(path.read_text())
    found = compile_description(description, request["target"])
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
        json.dump(found, file)
    os.replace(file.name, path)
    return found


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    # Whatever else prints does so elsewhere: standard output carries answers alone.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"triton": triton.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = cached(json.loads(line), folder)
        except Exception as error:  # a kernel that does not compile is an answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
