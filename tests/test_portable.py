"""The kernels where no torch is at hand for them: on aarch64 under qemu, and as AVX-512 would run
them on a machine without it."""

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests/portable"
# As in CMakeLists.txt, but for -O1: what differs between architectures is the code, not the speed.
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-DTORCHOPS_ISA=baseline", f"-I{ROOT}/csrc"]


def build(folder, compiler, *flags):
    """tests/portable/kernels.cpp linked with every CPU kernel."""

    def compile(source):
        target = folder / f"{source.stem}-{source.parent.name}.o"
        subprocess.run([*compiler, *flags, *FLAGS, "-c", source, "-o", target], check=True)
        return target

    sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), HERE / "kernels.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources))
    subprocess.run([*compiler, "-static", *objects, "-o", folder / "kernels"], check=True)
    return folder / "kernels"


def assert_all_right(*command):
    run = subprocess.run(command, capture_output=True, text=True)
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAIL")]
    assert run.returncode == 0 and not failed, run.stdout
    assert run.stdout.count("ok ") > 100


def test_kernels_are_right_on_aarch64(tmp_path):
    compiler = "aarch64-linux-gnu-g++"
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed: apt-get install g++-aarch64-linux-gnu")
    if emulator is None:
        pytest.skip("qemu-user is not installed: apt-get install qemu-user-static")
    assert_all_right(emulator, build(tmp_path, [compiler]))


def test_kernels_are_right_for_avx512(tmp_path):
    """tests/portable/avx512 has what the kernels use of it; test_isa.py runs them where it is."""
    if platform.machine() != "x86_64" or not torch.cpu._is_avx2_supported():
        pytest.skip("AVX-512 is emulated with AVX2, which this machine does not have")
    if torch.cpu._is_avx512_supported():
        pytest.skip("this machine has AVX-512: test_isa.py runs the kernels themselves")
    flags = ["-mavx2", "-mfma", "-mf16c", f"-I{HERE}/avx512"]
    assert_all_right(build(tmp_path, ["g++"], *flags))
