"""The CUDA kernels, run on the CPU by tests/cuda_emulator, through the tests of their operators.

The emulator takes the place of libtorchops.so's CPU kernels for a whole process: hence pytest in
pytest. Sample inputs, references and tolerances are those of every other test.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "cuda_emulator"))
from build import ROOT, build

# One operator of a family reaches every kernel of its file; bfloat16 has the widest packs. An
# emulated thread is slow, so this is a part of what the same variable can run by hand:
#     LD_PRELOAD=$(python tests/cuda_emulator/build.py) python -m pytest tests/test_gradients.py
VALUES = ["tests/test_values.py", "-k"]
SELECTIONS = {
    "adaptive_avg_pool2d": [*VALUES, "bfloat16 and adaptive_avg_pool2d"],
    "adaptive_max_pool2d": [*VALUES, "bfloat16 and adaptive_max_pool2d"],
    "avg_pool2d": [*VALUES, "bfloat16 and avg_pool2d and not adaptive"],
    "batch_norm": [*VALUES, "bfloat16 and batch_norm"],
    # bfloat16 and float16 have the tensor cores' kernels in common: each takes one format.
    "conv2d": [
        "tests/test_conv2d_shapes.py",
        "-k",
        "aligned-contiguous and not torch.float16"
        " or aligned-channels_last-torch.float16 and not misaligned",
    ],
    "max_pool2d": [*VALUES, "bfloat16 and max_pool2d and not adaptive"],
}


@pytest.fixture(scope="module")
def library():
    return build()


def emulated(library, *command, **environment):
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "LD_PRELOAD": str(library), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("operator", SELECTIONS)
def test_operator(library, operator):
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SELECTIONS[operator]]
    done = emulated(library, *arguments)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_kernels_ran_emulated(library):
    call = (
        "import torch, torchops.functional as F;"
        "F.batch_norm(torch.randn(2, 3, 4, 4), torch.zeros(3), torch.ones(3), training=True)"
    )
    done = emulated(library, "-c", call, EMULATOR_TRACE="1", TORCHOPS_BACKEND="own")
    # Statistics, which update the running ones by the way, and the output.
    assert done.stderr.count("cuda_emulator: launch of") == 2
