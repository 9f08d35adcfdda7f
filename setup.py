"""Build the native module with CMake; everything else is in pyproject.toml.

ZSVR_NATIVE=auto (default): build it if a C++20 compiler is there, else install the pure-Python package
and say so. 1: fail when it cannot be built. 0: do not try.
ZSVR_CUDA=auto (default) | 1 | 0: CUDA C++ kernels. There are none yet, so 1 fails and says that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def setting(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 1 or 0, got {value!r}")
    return value


class CMakeBuild(build_ext):
    def run(self) -> None:
        if setting("ZSVR_CUDA") == "1":
            raise SystemExit("ZSVR_CUDA=1: this version has no CUDA C++ kernels to build")
        if setting("ZSVR_NATIVE") == "0":
            self.announce("ZSVR_NATIVE=0: installing without the native module", level=3)
            self.extensions.clear()
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self.build_with_cmake(target)
        except (OSError, subprocess.CalledProcessError) as error:
            if setting("ZSVR_NATIVE") == "1":
                raise SystemExit(f"ZSVR_NATIVE=1 but the native module cannot be built: {error}") from error
            self.announce(
                f"zsvr_kernels: no native module ({error}); the pure-PyTorch backends remain. "
                "Install a C++20 compiler and reinstall, or set ZSVR_NATIVE=1 to make this an error.",
                level=3,
            )
            # An editable or repeated build must not leave an older module behind.
            target.unlink(missing_ok=True)
            ext.optional = True
            self.extensions = [e for e in self.extensions if e is not ext]

    def build_with_cmake(self, target: Path) -> None:
        import pybind11

        build = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 2))
        configure = [
            "cmake",
            "--fresh",
            "-GNinja",
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "-j", jobs, "--target", "_C"], check=True)
        if not target.exists():
            raise OSError(f"cmake succeeded but {target} is missing")


setup(ext_modules=[Extension("zsvr_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
