"""Drives CMake and Ninja; the only place that reads build switches.

TORCHOPS_CUDA=auto|0|1      build the CUDA library (auto: torch has CUDA, nvcc is on the PATH)
TORCHOPS_CUDA_ARCHS="80;90a"  compute capabilities to build it for
TORCHOPS_DEBUG=1            -O0 -g
TORCHOPS_SANITIZE=address,undefined
MAX_JOBS=n                  compile jobs; default min(cores, free memory / 2 GB)
"""

from __future__ import annotations

import importlib.machinery
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
INSTALL_TORCH = f"{sys.executable} -m pip install 'torch>=2.11'"
INSTALL_TOOLS = f"{sys.executable} -m pip install 'setuptools>=77' 'cmake>=3.24' ninja pybind11"


def fail(problem: str, remedy: str) -> NoReturn:
    sys.exit(f"\ntorchops cannot be built: {problem}\nTo mend it, run:  {remedy}\n")


def check_python() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036
        fail(
            f"Python {platform.python_version()} is too old; 3.10 or newer is needed.",
            "python3.12 -m venv .venv && .venv/bin/pip install .   (or another newer Python)",
        )


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


# C++20, and what the kernels shuffle registers with: GCC has it from version 12 on.
COMPILER_PROBE = b"""
#include <bit>
typedef float Four __attribute__((vector_size(16)));
Four swap(Four v) { return __builtin_shufflevector(v, v, 1, 0, 3, 2); }
"""


def find_compiler() -> str:
    """The compiler for CMake, a semicolon-separated list where CXX holds arguments too."""
    remedy = "apt-get install g++   (or set CXX to a C++20 compiler, such as g++ 12 or newer)"
    command = (os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "").split()
    if not command:
        fail("no C++ compiler was found.", remedy)
    if shutil.which(command[0]) is None:
        fail(f"CXX={os.environ['CXX']}, but there is no program {command[0]}.", remedy)
    probe = [*command, "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    if subprocess.run(probe, input=COMPILER_PROBE, capture_output=True).returncode != 0:
        fail(f"{' '.join(command)} does not compile C++20 with vector extensions.", remedy)
    return ";".join(command)


def find_tool(name: str) -> str:
    """A program that pip installs; this Python's own first, as in an activated environment.

    Without build isolation pip leaves PATH alone, and the system's may be too old or absent.
    """
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    path = shutil.which(name, path=os.pathsep.join(folders))
    if path is None:
        fail(f"{name} is not installed.", INSTALL_TOOLS)
    return path


def find_pybind11() -> str:
    try:
        import pybind11
    except ModuleNotFoundError:
        fail("pybind11 is not installed.", INSTALL_TOOLS)
    return pybind11.get_include()


def find_python_headers() -> str:
    include = sysconfig.get_path("include")
    if not (Path(include) / "Python.h").exists():
        version = "{}.{}".format(*sys.version_info)
        fail(
            f"the headers of Python {version} are not in {include}.",
            f"apt-get install python{version}-dev",
        )
    return include


def torch_has_cuda(torch_root: Path) -> bool:
    """A CPU-only torch never loads the CUDA library, which takes minutes to build."""
    return (
        re.search(r"^cuda\b.*= *['\"]", (torch_root / "version.py").read_text(), re.M) is not None
    )


def cuda_archs(torch_root: Path) -> str:
    """Semicolon-separated architectures of the CUDA library; empty to build without it."""
    switch = os.environ.get("TORCHOPS_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        fail(f"TORCHOPS_CUDA={switch} is not one of auto, 0, 1.", "unset TORCHOPS_CUDA")
    nvcc = shutil.which("nvcc")
    if switch == "1" and nvcc is None:
        fail(
            "TORCHOPS_CUDA=1, but nvcc is not on the PATH.",
            "export PATH=/usr/local/cuda/bin:$PATH   (or TORCHOPS_CUDA=0)",
        )
    if switch == "0" or (switch == "auto" and not (nvcc and torch_has_cuda(torch_root))):
        return ""
    return os.environ.get("TORCHOPS_CUDA_ARCHS", "80;90a")


def compile_jobs() -> int:
    jobs = os.environ.get("MAX_JOBS")
    if jobs is None:
        return max(1, min(os.cpu_count() or 1, available_memory() // 2_000_000_000))
    if not jobs.isdecimal() or int(jobs) < 1:
        fail(f"MAX_JOBS={jobs} is not a number of compile jobs.", "unset MAX_JOBS")
    return int(jobs)


def available_memory() -> int:
    """Bytes that can be had without swapping; MemAvailable counts the page cache, which can go."""
    meminfo = Path("/proc/meminfo")
    found = meminfo.exists() and re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())
    if found:
        return 1024 * int(found.group(1))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def build_variant() -> dict[str, str]:
    """The settings that keep a build folder of their own, so that none overwrites another's."""
    debug = os.environ.get("TORCHOPS_DEBUG", "0") == "1"
    return {
        "CMAKE_BUILD_TYPE": "Debug" if debug else "Release",
        "TORCHOPS_SANITIZE": os.environ.get("TORCHOPS_SANITIZE", ""),
    }


class CMakeBuild(build_ext):
    def copy_extensions_to_source(self) -> None:
        """Editable installs: all three libraries move beside the Python sources."""
        for library in (Path(self.build_lib) / "torchops").glob("*.so"):
            self.copy_file(str(library), str(ROOT / "torchops" / library.name))

    def build_extension(self, ext: Extension) -> None:
        torch_root, torch_version = find_torch()
        variant = build_variant()
        # Not setuptools' own build_temp, which an editable install deletes: rebuilds are quick.
        folder = [sys.implementation.cache_tag, *filter(None, variant.values())]
        build = ROOT / "build" / "-".join(folder).lower()
        cmake = find_tool("cmake")
        settings = {
            **variant,
            # Given on every build: pip's isolated environment lives only until the build is done.
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "CMAKE_CXX_COMPILER": find_compiler(),
            "TORCHOPS_OUTPUT_DIRECTORY": Path(self.build_lib).resolve() / "torchops",
            "TORCHOPS_TORCH_ROOT": torch_root,
            "TORCHOPS_TORCH_VERSION": torch_version,
            "TORCHOPS_PYBIND11_INCLUDE": find_pybind11(),
            "TORCHOPS_PYTHON_INCLUDE": find_python_headers(),
            "TORCHOPS_PYTHON_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "TORCHOPS_CUDA_ARCHS": cuda_archs(torch_root),
        }
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in settings.items()]
        try:
            subprocess.run(configure, check=True)
            jobs = str(compile_jobs())
            subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            fail(
                f"the compiler's own message is above (exit {error.returncode}).",
                "MAX_JOBS=1 pip install -v .   (one file at a time, full output)",
            )


if __name__ == "__main__":  # pip's name for it too; tests import the functions above
    check_python()
    setup(ext_modules=[Extension("torchops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
