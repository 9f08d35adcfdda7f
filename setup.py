"""Build the native module with CMake; everything else is in pyproject.toml.

ZSVR_NATIVE=auto (default): build it if a C++20 compiler is there, else install the pure-Python package, say
why, and keep the reason in zsvr_kernels/_native_build.txt, which `zk.build_info()` repeats. 1: fail when it
cannot be built. 0: leave it out. An older native module never stays behind in the pure package.
ZSVR_CUDA=auto (default) | 1 | 0: CUDA C++ kernels. There are none yet, so 1 fails and says that.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NOTE = "_native_build.txt"  # in the package: why there is no native module


class BuildFailure(Exception):
    """The native module cannot be built; the text is one line that says why."""


def setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 1 or 0, got {value!r}")
    return value


def program(name: str, folder: str) -> str:
    """Return the path of a build tool: of this Python's package of that name, else from PATH."""
    try:
        found = shutil.which(name, path=str(getattr(importlib.import_module(name), folder)))
    except (ImportError, AttributeError):
        found = None
    found = found or shutil.which(name)
    if found is None:
        raise BuildFailure(f"{name} is not installed")
    return found


def reason(step: str, output: list[str]) -> str:
    """Return in one line why a step failed, from what CMake or the compiler printed."""
    text = "\n".join(output)
    if "No CMAKE_CXX_COMPILER could be found" in text:
        return "no C++ compiler was found"
    if "Could NOT find Python" in text:
        return "Python.h was not found: install python3-dev (Debian, Ubuntu) or your system's like of it"
    lines = [line.strip() for line in output]
    for n, line in enumerate(lines):
        if "error:" in line or "CMake Error" in line:
            follow = [x for x in lines[n + 1 :] if x][:3] if line.startswith("CMake Error") else []
            said = " ".join([line, *follow]).replace(f"{ROOT}{os.sep}", "")
            return f"{step} failed: {said[:400]}"
    return f"{step} failed: {' '.join(lines[-3:])[:400]}"


def call(step: str, command: list[str]) -> None:
    """Run a command, show what it prints, and raise BuildFailure with the reason where it fails."""
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            output = []
            for line in process.stdout or ():
                sys.stdout.write(line)
                output.append(line.rstrip())
    except OSError as error:
        raise BuildFailure(f"{step} failed: {error}") from error
    if process.returncode:
        raise BuildFailure(reason(step, output))


class CMakeBuild(build_ext):
    def run(self) -> None:
        if setting("ZSVR_CUDA") == "1":
            raise SystemExit("ZSVR_CUDA=1: this version has no CUDA C++ kernels to build")
        self.forget_older_builds()
        if setting("ZSVR_NATIVE") == "0":
            self.warn("ZSVR_NATIVE=0: installing without the native module")
            self.note("ZSVR_NATIVE=0 left it out")
            self.extensions = []
            return
        super().run()

    def packages(self) -> list[Path]:
        """Return the package folders this build fills: the one in build/, the source tree's if editable."""
        folders = [Path(self.build_lib).resolve() / "zsvr_kernels"]
        if self.inplace or getattr(self, "editable_mode", False):
            folders.append(ROOT / "zsvr_kernels")
        return folders

    def forget_older_builds(self) -> None:
        for folder in self.packages():
            for ext in self.extensions:
                (folder / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
            (folder / NOTE).unlink(missing_ok=True)

    def note(self, why: str) -> None:
        for folder in self.packages():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / NOTE).write_text(f"{why}\n")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.build_with_cmake(target)
        except BuildFailure as error:
            if setting("ZSVR_NATIVE") == "1":
                raise SystemExit(f"ZSVR_NATIVE=1 but the native module cannot be built: {error}") from error
            self.warn(
                f"no native module ({error}); the pure-PyTorch backends remain. "
                "Install a C++20 compiler and reinstall, or set ZSVR_NATIVE=1 to make this an error."
            )
            target.unlink(missing_ok=True)
            self.note(str(error))
            ext.optional = True
            self.extensions = [e for e in self.extensions if e is not ext]

    def build_with_cmake(self, target: Path) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise BuildFailure("pybind11 is not installed") from error
        cmake, ninja = program("cmake", "CMAKE_BIN_DIR"), program("ninja", "BIN_DIR")
        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 2))
        configure = [
            cmake,
            "--fresh",
            "-GNinja",
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        call("configuring", configure)
        call("compiling", [cmake, "--build", str(build), "-j", jobs, "--target", "_C"])
        if not target.exists():
            raise BuildFailure(f"cmake succeeded but {target.name} is missing")


if __name__ == "__main__":
    setup(ext_modules=[Extension("zsvr_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
