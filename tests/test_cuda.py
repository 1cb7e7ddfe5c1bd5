"""Every case on a GPU: the CPU's samples, reference and tolerance rule, with the tensors moved."""

import pytest
import torch

from support import assert_within_rule, each_dtype, each_format, each_nonempty_sample, results
from support import gradients as cpu_gradients

pytestmark = [
    pytest.mark.cuda,
    # What has no kernel yet: its native call is not what is tested here.
    pytest.mark.filterwarnings("ignore::torchops.FallbackWarning"),
]


def on_gpu(case, sample, tensors, compute):
    """Ours from the GPU, back on the CPU."""
    moved = [None if tensor is None else tensor.cuda() for tensor in tensors]
    return tuple(result.cpu() for result in compute(case, case.own, sample, moved))


def gradients(case, function, sample, tensors):
    """With a grad_output of the output's own strides, so on its device too."""
    return cpu_gradients(case, function, sample, tensors, like_output=True)


@each_nonempty_sample
@each_dtype
@each_format
@pytest.mark.parametrize("compute", [results, gradients], ids=["values", "gradients"])
def test_on_cuda(case, sample, dtype, memory_format, compute):
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} is not defined for {dtype}")
    tensors = case.tensors(sample, dtype, memory_format)
    own = on_gpu(case, sample, tensors, compute)
    assert_within_rule(case, sample, tensors, dtype, compute, own=own)
    again = on_gpu(case, sample, tensors, compute)
    for first, second in zip(own, again, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
