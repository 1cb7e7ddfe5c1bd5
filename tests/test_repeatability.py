"""The same bits on every run and for every thread count."""

import pytest
import torch

import torchops
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


@pytest.mark.parametrize("channels", [(40, 70), (70, 40), (520, 130)], ids=str)
@each_format
def test_blocks_of_pixels_for_more_threads_give_the_same_bits(memory_format, channels):
    image = torch.randn(2, channels[0], 48, 47).to(memory_format=memory_format)
    weight = torch.randn(channels[1], channels[0], 1, 1)

    def compute(threads):
        torch.set_num_threads(threads)
        inputs = [image.detach().requires_grad_(), weight.detach().requires_grad_()]
        output = torchops.functional.conv2d(*inputs)
        return bits([output.detach(), *torch.autograd.grad(output, inputs, output.detach())])

    expected = compute(1)
    for threads in (2, 3, 17):
        assert all(map(torch.equal, compute(threads), expected)), f"{threads} threads"


@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 1)])
@each_format
def test_max_pools_of_one_image_give_the_same_bits_for_more_threads(memory_format, kernel, stride):
    image = torch.randn(1, 16, 61, 62).to(memory_format=memory_format)
    grads = torch.randn(1, 16, 61, 62)

    def compute(threads):
        torch.set_num_threads(threads)
        input = image.detach().requires_grad_()
        output = torchops.functional.max_pool2d(input, kernel, stride, kernel // 2)
        grad = grads[:, :, : output.shape[2], : output.shape[3]]
        return bits(torch.autograd.grad(output, input, grad))

    expected = compute(1)
    for threads in (2, 3):
        assert all(map(torch.equal, compute(threads), expected)), f"{threads} threads"


@pytest.mark.parametrize("channels, groups", [((128, 256), 8), ((48, 96), 3), ((130, 70), 2)])
@each_format
def test_groups_of_bfloat16_give_the_same_bits_for_more_threads(memory_format, channels, groups):
    image = torch.randn(5, channels[0], 29, 31).bfloat16().to(memory_format=memory_format)
    weight = torch.randn(channels[1], channels[0] // groups, 3, 3).bfloat16()

    def compute(threads):
        torch.set_num_threads(threads)
        inputs = [image.detach().requires_grad_(), weight.detach().requires_grad_()]
        with torchops.backend("own"):
            output = torchops.functional.conv2d(*inputs, padding=1, groups=groups)
            return bits([output.detach(), *torch.autograd.grad(output, inputs, output.detach())])

    expected = compute(1)
    for threads in (2, 3, 17):
        assert all(map(torch.equal, compute(threads), expected)), f"{threads} threads"
