"""Gradients of every sample against float64; numerical differentiation of the small ones."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torchops.functional
from support import (
    as_function,
    assert_within_rule,
    each_dtype,
    each_format,
    each_sample,
    each_small_sample,
    gradients,
)


@each_sample
@each_dtype
@each_format
def test_gradients(case, sample, dtype, memory_format):
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} is not defined for {dtype}")
    tensors = case.tensors(sample, dtype, memory_format)
    assert_within_rule(case, sample, tensors, dtype, gradients)


@each_small_sample
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(case, sample, use_reentrant):
    """Recomputed in the backward; not reentrant, each saved tensor may be unpacked once."""
    call, inputs = differentiable_call(case, sample, torch.contiguous_format)
    expected = torch.autograd.grad(first_output(call(*inputs)).sin().sum(), inputs)
    output = first_output(checkpoint(call, *inputs, use_reentrant=use_reentrant))
    output.sin().sum().backward()
    assert all(map(torch.equal, [input.grad for input in inputs], expected))


def first_output(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def differentiable_call(case, sample, memory_format):
    tensors = case.tensors(sample, torch.float64, memory_format)
    call, inputs = as_function(case, case.own, sample, tensors)
    return call, [input.detach().requires_grad_() for input in inputs]


@each_small_sample
@each_format
def test_first_derivatives(case, sample, memory_format):
    call, inputs = differentiable_call(case, sample, memory_format)
    torch.autograd.gradcheck(
        call,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@each_small_sample
@each_format
def test_second_derivatives(case, sample, memory_format):
    call, inputs = differentiable_call(case, sample, memory_format)
    torch.autograd.gradgradcheck(call, inputs, check_fwd_over_rev=True, check_batched_grad=True)


IMAGE, WEIGHT = torch.ones(1, 2, 3, 3), torch.ones(4, 2, 3, 3, requires_grad=True)
LINEAR = {
    "avg_pool2d": lambda ops, x: ops.avg_pool2d(x, 2),
    "max_pool2d": lambda ops, x: ops.max_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda ops, x: ops.adaptive_avg_pool2d(x, 3),
    "adaptive_max_pool2d": lambda ops, x: ops.adaptive_max_pool2d(x, 3),
    "global average": lambda ops, x: ops.adaptive_avg_pool2d(x, 1),
    "image": lambda ops, x: ops.conv2d(x, torch.ones(2, 3, 3, 3)),
    "weight": lambda ops, x: ops.conv2d(torch.ones(1, 3, 9, 9), x),
    "weight of rows": lambda ops, x: ops.conv1d(torch.ones(1, 3, 9), x[..., 0]),
    "bias": lambda ops, x: ops.conv2d(IMAGE, WEIGHT, x),
    "bias alone": lambda ops, x: ops.conv2d(IMAGE, WEIGHT.detach(), x),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("create_graph", [True, False])
def test_a_linear_gradient_requires_grad_where_native_has_it(name, create_graph):
    x = torch.randn(4 if "bias" in name else (2, 3, 8, 6), requires_grad=True)
    needs = []
    for ops in (torchops.functional, torch.nn.functional):
        output = LINEAR[name](ops, x)
        (gradient,) = torch.autograd.grad(
            output, x, torch.ones_like(output), create_graph=create_graph
        )
        needs.append((gradient.requires_grad, gradient.is_leaf))
    assert needs[0] == needs[1]


def test_second_derivatives_of_no_images():
    x, weight = torch.empty(0, 3, 8, 6, requires_grad=True), torch.ones(2, 3, 3, 3)
    for leaves in ([x], [x, weight.requires_grad_()]):
        output = torchops.functional.conv2d(x, weight)
        gradients = torch.autograd.grad(output.sum(), leaves, create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()


@pytest.mark.parametrize("name", ["max_pool2d", "adaptive_max_pool2d"])
def test_third_derivative_of_a_max_pool(name):
    """The gather that a second derivative takes is differentiable, too."""
    x, g, v = (torch.randn(2, 3, size, size, requires_grad=True) for size in (6, 3, 6))
    pool = LINEAR[name](torchops.functional, x)
    (grad_input,) = torch.autograd.grad(pool, x, g, create_graph=True)
    (gathered,) = torch.autograd.grad(grad_input, g, v, create_graph=True)
    (scattered,) = torch.autograd.grad(gathered, v, g)
    torch.testing.assert_close(scattered, grad_input)


@pytest.mark.parametrize("name", ["max_pool", "adaptive_max_pool"])
@pytest.mark.parametrize("dims", [1, 2])
def test_backward_refuses_indices_that_were_changed(name, dims):
    """It does not read them, but native's does."""
    input = torch.randn(2, 3, *(8,) * dims, requires_grad=True)
    pool = getattr(torchops.functional, f"{name}{dims}d")
    output, indices = pool(input, 2, return_indices=True)
    assert not indices.requires_grad
    output.sum().backward(retain_graph=True)
    assert torch.equal(input.grad.sign().sum(), torch.tensor(1.0 * output.numel()))
    indices.add_(1)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        output.sum().backward()
