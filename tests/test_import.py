"""What `import torchops` costs, and what it leaves alone."""

import os
import subprocess
import sys

MEASURE = """
import time, torch
start = time.process_time()
import torchops
print(time.process_time() - start)
"""


def run(code: str) -> str:
    # An installed package has its bytecode: without it, most of an import is compiling.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_import_adds_under_100_ms_to_torch():
    # Processor time, the least of several: what other processes take away is not the import's cost.
    assert min(float(run(MEASURE)) for _ in range(4)) < 0.1


def test_import_leaves_optional_packages_alone():
    loaded = run("import sys, torchops; print(*sys.modules)").split()
    assert {"rich", "matplotlib", "torchops.bench", "torchops.demo", "torchops._verify"}.isdisjoint(
        loaded
    )


def test_import_leaves_triton_alone():
    """It comes with torch.utils.flop_counter where torch has CUDA, and takes 160 ms."""
    code = "import sys, torchops; print(*sys.modules)"
    assert {"triton", "torch.utils.flop_counter"}.isdisjoint(run(code).split())


def test_import_keeps_the_global_state_of_torch():
    code = """
import torch
before = torch.get_num_threads(), torch.random.get_rng_state(), torch.is_grad_enabled()
import torchops
after = torch.get_num_threads(), torch.random.get_rng_state(), torch.is_grad_enabled()
print(all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(before, after)))
"""
    assert run(code).strip() == "True"
