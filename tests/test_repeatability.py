"""The same bits on every run and for every thread count."""

import pytest
import torch

from cases import Sample
from support import each_format, each_sample, gradients, results


def enlarged(case, sample, dtype, memory_format):
    """The sample with 24 times the images: enough work to be split over threads."""
    shape = sample.shapes[0]
    if len(shape) == 4:
        sample = Sample(
            tuple((24 * s[0], *s[1:]) if s == shape else s for s in sample.shapes), sample.kwargs
        )
    return sample, case.tensors(sample, dtype, memory_format)


def bits(tensors):
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    return [tensor.contiguous().view(width[tensor.element_size()]) for tensor in tensors]


@each_sample
@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("compute", [results, gradients], ids=["forward", "backward"])
def test_every_run_and_thread_count_gives_the_same_bits(
    case, sample, memory_format, dtype, compute
):
    sample, tensors = enlarged(case, sample, dtype, memory_format)
    torch.set_num_threads(1)
    expected = bits(compute(case, case.own, sample, tensors))
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        found = bits(compute(case, case.own, sample, tensors))
        assert all(map(torch.equal, found, expected)), f"{threads} threads"
