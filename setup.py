"""Drives CMake and Ninja; the only place that reads build switches.

TORCHOPS_CUDA=auto|0|1      build the CUDA library (auto: where nvcc is on the PATH)
TORCHOPS_CUDA_ARCHS="80;90a"  compute capabilities to build it for
TORCHOPS_DEBUG=1            -O0 -g
TORCHOPS_SANITIZE=address,undefined
MAX_JOBS=n                  compile jobs; default min(cores, free memory / 2 GB)
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
INSTALL_TORCH = f"{sys.executable} -m pip install 'torch>=2.11'"


def fail(problem: str, remedy: str) -> None:
    sys.exit(f"\ntorchops cannot be built: {problem}\nTo mend it, run:  {remedy}\n")


def find_torch() -> tuple[Path, str]:
    """Folder and version of the installed torch, also from inside pip's isolated build.

    pip hides the environment's packages from an isolated build; only torch's headers are needed,
    so looking into site-packages replaces importing it, and nothing is ever downloaded.
    """
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = importlib.machinery.PathFinder.find_spec("torch", paths)
    if spec is None or spec.origin is None:
        fail("torch is not installed in this Python.", INSTALL_TORCH)
    root = Path(spec.origin).parent
    version_file = (root / "version.py").read_text()
    version = re.search(r"__version__ = ['\"]([^'\"]+)", version_file).group(1)
    major, minor = map(int, version.split(".")[:2])
    if (major, minor) < (2, 11):
        fail(f"torch {version} is too old; 2.11 or newer is needed.", INSTALL_TORCH)
    return root, version


def find_compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None or shutil.which(compiler.split()[0]) is None:
        fail("no C++ compiler was found.", "apt-get install g++   (or set CXX to a C++20 compiler)")
    return compiler


def cuda_archs() -> str:
    """Semicolon-separated architectures of the CUDA library; empty to build without it."""
    switch = os.environ.get("TORCHOPS_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        fail(f"TORCHOPS_CUDA={switch} is not one of auto, 0, 1.", "unset TORCHOPS_CUDA")
    nvcc = shutil.which("nvcc")
    if switch == "1" and nvcc is None:
        fail("TORCHOPS_CUDA=1, but nvcc is not on the PATH.",
             "export PATH=/usr/local/cuda/bin:$PATH   (or TORCHOPS_CUDA=0)")
    if switch == "0" or nvcc is None or not (ROOT / "cmake" / "cuda.cmake").exists():
        return ""
    return os.environ.get("TORCHOPS_CUDA_ARCHS", "80;90a")


def compile_jobs() -> int:
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, free_bytes // 2_000_000_000))


class CMakeBuild(build_ext):
    def copy_extensions_to_source(self) -> None:
        """Editable installs: all three libraries move beside the Python sources."""
        for library in (Path(self.build_lib) / "torchops").glob("*.so"):
            self.copy_file(str(library), str(ROOT / "torchops" / library.name))

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        torch_root, torch_version = find_torch()
        output = Path(self.build_lib).resolve() / "torchops"
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        debug = os.environ.get("TORCHOPS_DEBUG", "0") == "1"
        settings = {
            "CMAKE_BUILD_TYPE": "Debug" if debug else "Release",
            "CMAKE_CXX_COMPILER": find_compiler(),
            "TORCHOPS_OUTPUT_DIRECTORY": output,
            "TORCHOPS_TORCH_ROOT": torch_root,
            "TORCHOPS_TORCH_VERSION": torch_version,
            "TORCHOPS_PYBIND11_INCLUDE": pybind11.get_include(),
            "TORCHOPS_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "TORCHOPS_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "TORCHOPS_CUDA_ARCHS": cuda_archs(),
            "TORCHOPS_SANITIZE": os.environ.get("TORCHOPS_SANITIZE", ""),
        }
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in settings.items()]
        try:
            subprocess.run(configure, check=True)
            jobs = str(compile_jobs())
            subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        except FileNotFoundError:
            fail("cmake is not installed.", f"{sys.executable} -m pip install cmake ninja")
        except subprocess.CalledProcessError as error:
            fail(f"the compiler's own message is above (exit {error.returncode}).",
                 "MAX_JOBS=1 pip install -v .   (one file at a time, full output)")


setup(
    ext_modules=[Extension("torchops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
