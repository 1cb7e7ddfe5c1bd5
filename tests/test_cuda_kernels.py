"""Calls on the GPU that have no kernel in the CUDA library run natively."""

import re
from pathlib import Path

import torch

from torchops import _cuda

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def kernels(pattern, macro):
    text = "".join(path.read_text() for path in sorted(CSRC.glob(pattern)))
    return set(re.findall(rf"^{macro}\((\w+)", text, re.MULTILINE))


def test_every_kernel_has_a_cuda_side_and_a_family():
    """An operator without one would say on a GPU that no CUDA library was built."""
    declared = kernels("ops/*.h", "TORCHOPS_KERNEL")
    assert len(declared) > 20
    assert kernels("cuda/*.cu", "TORCHOPS_CUDA_KERNEL") == declared
    assert {name for names in _cuda.FAMILIES.values() for name in names} == declared


def test_the_family_that_a_call_takes():
    input, vector = torch.zeros(2, 8, 5, 5), torch.zeros(2, 8, 5)
    assert _cuda.family_of("conv2d", input, torch.zeros(8, 1, 3, 3), groups=8) == "conv2d_depthwise"
    assert _cuda.family_of("conv1d", vector, torch.zeros(8, 1, 3)) == "conv2d_depthwise"
    assert _cuda.family_of("conv2d", input, weight=torch.zeros(4, 8, 1, 1)) == "conv2d_pointwise"
    assert _cuda.family_of("conv2d", input, torch.zeros(4, 8, 3, 3)) == "conv2d"
    assert _cuda.family_of("conv2d", input, torch.zeros(4, 4, 1, 1), groups=2) == "conv2d_grouped"
    assert _cuda.family_of("max_pool1d", vector, 2) == "max_pool2d"


def test_a_missing_family_is_handed_over_and_named(monkeypatch):
    call = ("conv2d", (torch.zeros(2, 8, 5, 5), torch.zeros(4, 8, 3, 3)), {})
    monkeypatch.setattr(_cuda, "available", frozenset({"batch_norm"}))
    assert _cuda.missing(*call) == "conv2d on CUDA"
    assert _cuda.missing("batch_norm", (torch.zeros(2, 8),), {}) is None
    assert _cuda.missing("conv2d", (torch.zeros(2, 8, 5, 5), None), {}) is None


def test_without_a_cuda_library_the_error_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(_cuda, "available", frozenset())
    assert _cuda.missing("conv2d", (torch.zeros(2, 8, 5, 5), torch.zeros(4, 8, 3, 3)), {}) is None


def test_every_pointer_is_exported_and_empty_without_the_cuda_library():
    from torchops._library import HERE

    registered = _cuda.registered(HERE / "libtorchops.so")
    assert registered == _cuda.available
