"""Gradients of every sample against float64; numerical differentiation of the small ones."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

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
