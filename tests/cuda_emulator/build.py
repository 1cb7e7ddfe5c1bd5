"""Compiles csrc/cuda with g++ for the emulator, what changed only; prints the library's path."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUTPUT = ROOT / "build" / "cuda_emulator"
LIBRARY = OUTPUT / "libtorchops_emulated.so"

FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=fast", "-fno-gnu-unique"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"),
    *(f"-I{ROOT / 'csrc'}", f"-I{HERE}"),
    *("-DTORCHOPS_CUDA_EMULATOR", '-DTORCHOPS_CUDA_ARCHS="emulated"'),
    "-Dcuda=cuda_emulated",  # a namespace apart from that of real kernels, where they are loaded
    f'-DTORCHOPS_LIBRARY="{ROOT / "torchops" / "libtorchops.so"}"',
]


def newest(paths):
    return max((path.stat().st_mtime for path in paths), default=0.0)


def compile_one(source):
    target = OUTPUT / f"{source.stem}.o"
    command = [os.environ.get("CXX", "g++"), *FLAGS, "-x", "c++", "-c", source, "-o", target]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        target.unlink(missing_ok=True)
        sys.exit(f"{source.name} does not compile for the emulator:\n{done.stderr}")
    sys.stderr.write(done.stderr)


def build():
    """The path of the up-to-date library."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), HERE / "interpose.cpp"]
    headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), *HERE.glob("*.h")]
    changed = newest([*headers, HERE / "build.py"])
    objects = [OUTPUT / f"{source.stem}.o" for source in sources]
    stale = [
        source
        for source, target in zip(sources, objects, strict=True)
        if not target.exists() or target.stat().st_mtime < max(changed, source.stat().st_mtime)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, stale))
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < newest(objects):
        subprocess.run(
            [os.environ.get("CXX", "g++"), "-shared", *objects, "-o", LIBRARY, "-ldl"], check=True
        )
    return LIBRARY


if __name__ == "__main__":
    print(build())
