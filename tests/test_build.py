"""Build and import problems: one readable error with the command that mends it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchops import _library
from torchops.ops._autograd import kernel

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("setuptools", reason="setup.py needs it")


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module; it calls setuptools only as a script."""
    spec = importlib.util.spec_from_file_location("torchops_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def site_packages(monkeypatch, setup, tmp_path):
    """The only place where setup.py can find torch."""
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def failure(call, *args):
    with pytest.raises(SystemExit) as caught:
        call(*args)
    message = str(caught.value)
    assert "torchops cannot be built: " in message
    assert "To mend it, run:  " in message
    return message


# ---- setup.py --------------------------------------------------------------------------------


def test_with_an_old_python(setup, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert "3.10 or newer is needed" in failure(setup.check_python)


def test_finds_the_torch_that_is_running(setup):
    assert setup.find_torch() == (Path(torch.__file__).parent, torch.__version__)


def test_without_torch(setup, site_packages):
    message = failure(setup.find_torch)
    assert "torch is not installed" in message
    assert f"{sys.executable} -m pip install 'torch>=2.11'" in message


def test_with_an_old_torch(setup, site_packages):
    (site_packages / "torch").mkdir()
    (site_packages / "torch" / "__init__.py").touch()
    (site_packages / "torch" / "version.py").write_text("__version__ = '2.4.1+cpu'\n")
    assert "torch 2.4.1+cpu is too old; 2.11 or newer" in failure(setup.find_torch)


def test_without_a_compiler(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler was found" in failure(setup.find_compiler)


def test_with_an_unknown_compiler(setup, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-g++ -O1")
    assert "there is no program no-such-g++" in failure(setup.find_compiler)


def test_with_a_compiler_that_does_not_compile(setup, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert "false does not compile C++20 with vector extensions" in failure(setup.find_compiler)


def test_arguments_within_cxx_become_a_cmake_list(setup, monkeypatch):
    monkeypatch.setenv("CXX", "g++ -O1")
    assert setup.find_compiler() == "g++;-O1"


def test_cmake_of_this_python_needs_no_path(setup, monkeypatch, tmp_path):
    """On a fresh machine only `.venv` has a cmake, and pip does not put it on the PATH."""
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path / name))
    cmake = tmp_path / "scripts" / "cmake"
    cmake.parent.mkdir()
    cmake.touch(mode=0o755)
    assert setup.find_tool("cmake") == str(cmake)


def test_without_cmake(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path / name))
    message = failure(setup.find_tool, "cmake")
    assert "cmake is not installed" in message
    assert "pip install" in message


def test_without_pybind11(setup, monkeypatch):
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert "pybind11 is not installed" in failure(setup.find_pybind11)


def test_without_python_headers(setup, site_packages):
    message = failure(setup.find_python_headers)
    assert f"not in {site_packages}" in message
    assert "apt-get install python3." in message


def test_bad_switches(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHOPS_CUDA", "yes")
    assert "TORCHOPS_CUDA=yes is not one of auto, 0, 1" in failure(setup.cuda_archs, tmp_path)
    monkeypatch.setenv("TORCHOPS_CUDA", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "nvcc is not on the PATH" in failure(setup.cuda_archs, tmp_path)
    monkeypatch.setenv("MAX_JOBS", "many")
    assert "MAX_JOBS=many" in failure(setup.compile_jobs)


@pytest.mark.parametrize(
    ("switch", "torch_cuda", "archs"),
    [
        ("auto", "'13.0'", "80;90a"),
        ("auto", "None", ""),
        ("1", "None", "80;90a"),
        ("0", "'13.0'", ""),
    ],
)
def test_cuda_is_built_where_torch_has_it(setup, monkeypatch, tmp_path, switch, torch_cuda, archs):
    (tmp_path / "version.py").write_text(
        f"__all__ = ['cuda']\ncuda: Optional[str] = {torch_cuda}\n"
    )
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("TORCHOPS_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("TORCHOPS_CUDA", switch)
    assert setup.cuda_archs(tmp_path) == archs


def test_compile_jobs(setup, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert 1 <= setup.compile_jobs() <= os.cpu_count()
    monkeypatch.setattr(setup, "available_memory", lambda: 3_000_000_000)
    assert setup.compile_jobs() == 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup.compile_jobs() == 3


# ---- what was built --------------------------------------------------------------------------


def test_sources_keep_to_the_stable_abi():
    included = {
        header
        for source in ROOT.glob("csrc/**/*.*")
        for header in re.findall(
            r'#include\s+[<"]((?:ATen|c10|torch|caffe2)/[^>"]+)', source.read_text()
        )
    }
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    assert {header for header in included if not header.startswith(stable)} == set()


# ---- torchops/_library.py --------------------------------------------------------------------


def test_import_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "HERE", tmp_path)
    with pytest.raises(ImportError, match="missing") as caught:
        _library.load()
    assert str(tmp_path) in str(caught.value)
    assert "pip install --no-build-isolation -e ." in str(caught.value)


def test_import_with_a_library_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "libtorchops.so").write_text("half a download")
    monkeypatch.setattr(_library, "HERE", tmp_path)
    with pytest.raises(ImportError, match="needs torch >= 2.11") as caught:
        _library.load()
    assert torch.__version__ in str(caught.value)
    assert _library.REBUILD in str(caught.value)


def test_import_with_an_older_library():
    with pytest.raises(ImportError, match="no operator transmogrify; it is older") as caught:
        kernel("transmogrify")
    assert _library.REBUILD in str(caught.value)


def test_import_with_an_unknown_isa():
    done = subprocess.run(
        [sys.executable, "-c", "import torchops"],
        env={**os.environ, "TORCHOPS_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "CPU ISA 'mmx' is not available here; expected one of: baseline" in done.stderr
