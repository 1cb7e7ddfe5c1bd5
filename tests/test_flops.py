"""torch.utils.flop_counter gives the same counts as for torch's own convolutions."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import torchops.functional as TF


def flops(call, *tensors, **window):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    with FlopCounterMode(display=False) as counter:
        output = call(*leaves, **window)
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolution(groups):
    input, weight = torch.randn(2, 8, 9, 7), torch.randn(16, 8 // groups, 3, 2)
    expected = flops(F.conv2d, input, weight, stride=2, groups=groups)
    assert flops(TF.conv2d, input, weight, stride=2, groups=groups) == expected
    assert expected[0] > 0


@pytest.mark.parametrize("first", ["torchops", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first):
    code = f"""
import {first}
import torchops, torch.utils.flop_counter
print(torch.ops.torchops.conv2d in torch.utils.flop_counter.flop_registry)
"""
    call = [sys.executable, "-c", code]
    assert subprocess.run(call, capture_output=True, text=True, check=True).stdout == "True\n"
