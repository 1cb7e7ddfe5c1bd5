"""batch_norm at the seams of its CPU kernels: outputs that are written past the cache, odd planes
and rows, more images than are read at once, values that are all far from zero."""

import pytest
import torch
import torch.nn.functional as F

import torchops
import torchops.functional as TF

# Of the sizes below, the first two reach the size from which outputs are streamed. The last three
# have small planes: several slabs of channels, and more images than float sums are kept of.
SHAPES = [
    (9, 72, 65, 65),
    (2, 1001, 33, 33),
    (3, 5, 3, 2),
    (2, 3, 2, 1),
    (5, 70, 7, 7),
    (7, 13, 14, 14),
    (131, 9, 3, 3),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("activation, residual", [(None, 0), ("relu", 1), ("silu", 0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, activation, residual, memory_format, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw():
        values = torch.randn(shape, generator=generator).to(dtype)
        return values.contiguous(memory_format=memory_format)

    images = [draw() for _ in range(1 + residual)]
    grad = draw()
    weight, bias = (0.5 + torch.rand(shape[1], generator=generator) for _ in range(2))
    inputs = [tensor.requires_grad_() for tensor in (*images, weight, bias)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]

    def call(function, tensors):
        x, *added, weight, bias = tensors
        return function(x, weight, bias, *added)

    def own(x, weight, bias, residual=None):
        return TF.batch_norm(
            x, None, None, weight, bias, True, activation=activation, residual=residual
        )

    def native(x, weight, bias, residual=0):
        output = F.batch_norm(x, None, None, weight, bias, True) + residual
        return output if activation is None else getattr(F, activation)(output)

    with torchops.backend("own"):
        output = call(own, inputs)
        results = (output, *torch.autograd.grad(output, inputs, grad))
    expected = call(native, exact)
    expected = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    for result, target in zip(results, expected, strict=True):
        scale = target.abs().max().item()
        torch.testing.assert_close(result.double(), target, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("first", [1e4, 0.0])
def test_mean_far_from_zero(first, memory_format):
    generator = torch.Generator().manual_seed(0)
    x = (1e4 + torch.randn(8, 24, 31, 17, generator=generator)).to(memory_format=memory_format)
    x[0, :, 0, 0] = first
    mean, var = torch.zeros(24), torch.zeros(24)
    with torchops.backend("own"):
        TF.batch_norm(x, mean, var, training=True, momentum=1.0)
    expected = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(var.double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), expected[1], rtol=1e-7, atol=0)
