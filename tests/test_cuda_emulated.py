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

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# One operator of a family reaches every kernel of its file.
OPERATORS = {
    "adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "adaptive_max_pool2d": "adaptive_max_pool2d",
    "avg_pool2d": "avg_pool2d and not adaptive",
    "batch_norm": "batch_norm",
    "conv2d_depthwise": "conv2d or conv1d",
    "max_pool2d": "max_pool2d and not adaptive",
}
ASPECTS = [f"tests/test_{name}.py" for name in ("values", "gradients", "layouts", "special")]


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


@pytest.mark.parametrize(
    "operator", [name for name in OPERATORS if ROOT / "csrc" / "cuda" / f"{name}.cu" in SOURCES]
)
def test_operator(library, operator):
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *ASPECTS]
    done = emulated(library, *arguments, "-k", OPERATORS[operator])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_the_kernels_ran_emulated(library):
    call = (
        "import torch, torchops.functional as F;"
        "F.batch_norm(torch.randn(2, 3, 4, 4), None, None, training=True)"
    )
    done = emulated(library, "-c", call, EMULATOR_TRACE="1", TORCHOPS_BACKEND="own")
    assert done.stderr.count("cuda_emulator: launch of") == 2
