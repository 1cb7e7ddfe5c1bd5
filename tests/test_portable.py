"""The kernels' plain C++ on another architecture: compiled for aarch64, run under qemu."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
# As in CMakeLists.txt, but for -O1: what differs between architectures is the code, not the speed.
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-DTORCHOPS_ISA=baseline", f"-I{ROOT}/csrc"]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"{COMPILER} is not installed: apt-get install g++-aarch64-linux-gnu")
    folder = tmp_path_factory.mktemp("aarch64")

    def compile(source):
        target = folder / f"{source.stem}-{source.parent.name}.o"
        subprocess.run([COMPILER, *FLAGS, "-c", source, "-o", target], check=True)
        return target

    sources = [*sorted((ROOT / "csrc/cpu").glob("*.cpp")), ROOT / "tests/portable/kernels.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile, sources))
    subprocess.run([COMPILER, "-static", *objects, "-o", folder / "kernels"], check=True)
    return folder / "kernels"


def test_kernels_are_right_on_aarch64(program):
    if EMULATOR is None:
        pytest.skip("qemu-user is not installed: apt-get install qemu-user-static")
    run = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    failed = [line for line in run.stdout.splitlines() if line.startswith("FAIL")]
    assert run.returncode == 0 and not failed, run.stdout
    assert run.stdout.count("ok ") > 100
