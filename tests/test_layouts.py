"""Inputs as they come: whatever their strides, values are right and strides are native's."""

import functools

import pytest
import torch

import torchops.functional
from support import as_function, assert_within_rule, each_sample, gradients, results


def sliced(tensor):
    """Every other element of a larger tensor."""
    larger = torch.full([2 * size for size in tensor.shape], 99.0, dtype=tensor.dtype)
    view = larger[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def offset(tensor):
    """Dense, but not at the start of its storage."""
    larger = torch.full((tensor.numel() + 3,), 99.0, dtype=tensor.dtype)
    return larger[3:].view(tensor.shape).copy_(tensor)


def expanded(tensor):
    """Its first row for all rows, by stride 0."""
    return tensor[:1].expand(tensor.shape)


def channels_last(tensor):
    format = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.contiguous(memory_format=format.get(tensor.dim(), torch.contiguous_format))


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": channels_last,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "outer_transposed": lambda t: (
        t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t
    ),
    "sliced": sliced,
    "offset": offset,
    "expanded": expanded,
    "negated": lambda t: torch._neg_view(-t),
}


@each_sample
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(case, sample, layout):
    tensors = case.tensors(sample, torch.float32)
    tensors = [None if t is None else LAYOUTS[layout](t) for t in tensors]
    assert_within_rule(case, sample, tensors, torch.float32, results)
    assert_within_rule(case, sample, tensors, torch.float32, gradients)


@each_sample
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_natives(case, sample, layout):
    tensors = case.tensors(sample, torch.float32)
    tensors = [None if t is None else LAYOUTS[layout](t) for t in tensors]
    for compute in (results, functools.partial(gradients, like_output=True)):
        own = compute(case, case.own, sample, tensors)
        native = compute(case, case.native, sample, tensors)
        assert [t.stride() for t in own] == [t.stride() for t in native], compute


@each_sample
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
def test_gradient_of_an_output_in_any_layout(case, sample, layout):
    tensors = case.tensors(sample, torch.float64)
    found = []
    for function in (case.own, case.native):
        call, inputs = as_function(case, function, sample, tensors)
        inputs = [input.detach().requires_grad_() for input in inputs]
        outputs = call(*inputs)
        output = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        grad_output = LAYOUTS[layout](
            torch.linspace(-1, 1, output.numel()).double().view_as(output)
        )
        found.append(torch.autograd.grad(output, inputs, grad_output))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 4, 3), (1, 3, 2, 1), (2, 4, 3, 1), (2, 1, 3, 5)])
def test_batch_norm_of_images_of_one_row_or_column(shape, training):
    """channels_last by their strides, but for those of the one row or column."""
    strides = []
    for ops, device in (
        (torch.nn.functional, "cpu"),
        (torchops.functional, "cpu"),
        (torchops.functional, "meta"),
    ):
        images = torch.randn(shape, device=device).permute(0, 2, 1, 3)
        mean, var = torch.zeros(shape[2], device=device), torch.ones(shape[2], device=device)
        strides.append(ops.batch_norm(images, mean, var, training=training).stride())
    assert strides[0] == strides[1] == strides[2]
