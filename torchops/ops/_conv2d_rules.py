"""conv2d's fake kernels and vmap rules: what torch.compile and torch.func ask of its operators."""

from __future__ import annotations

import torch
from torch import Tensor

from torchops.ops._autograd import fold_batch, split_axis, unfold_batch
from torchops.ops._shape import convolved_size, is_channels_last, pair


def channels_last(input: Tensor, weight: Tensor) -> bool:
    """torch's rule for convolutions: one channels_last argument is enough."""
    return is_channels_last(input) or is_channels_last(weight)


# ---- fake kernels ------------------------------------------------------------------------


def output_size(input_size, weight_size, stride, padding, dilation):
    spatial = [
        convolved_size(input_size[i], weight_size[i], pair(stride)[i], pair(padding)[i],
                       pair(dilation)[i])
        for i in range(2 - len(input_size), 0)
    ]  # fmt: skip
    return (input_size[0], weight_size[0], *spatial)


def _empty(size, like: Tensor, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)


def fake_conv2d(input, weight, bias, stride, padding, dilation, groups):
    torch._check(
        input.dim() == weight.dim() and input.dim() in (3, 4),
        lambda: "conv2d: expected input and weight to be 4-D, or 3-D",
    )
    torch._check(
        input.shape[1] == weight.shape[1] * groups and weight.shape[0] % groups == 0,
        lambda: f"conv2d: {groups} groups do not fit input {input.shape} and weight {weight.shape}",
    )
    torch._check(input.dtype == weight.dtype, lambda: "conv2d: input and weight differ in dtype")
    torch._check(
        bias is None or (bias.dtype == weight.dtype and bias.shape == weight.shape[:1]),
        lambda: f"conv2d: expected a bias of {weight.dtype} with one element per output channel",
    )
    for length in (*weight.shape[2:], *stride, *dilation):
        torch._check(length > 0, lambda: "conv2d: kernel, stride and dilation must be positive")
    size = output_size(input.shape, weight.shape, stride, padding, dilation)
    for length in size[2:]:
        torch._check(length > 0, lambda: "conv2d: the kernel is larger than the input")
    # An empty batch stays contiguous.
    return _empty(size, input, channels_last(input, weight) and input.shape[0] > 0)


def fake_grad_input(
    grad_output, weight, input_size, stride, padding, dilation, groups, channels_last
):
    return _empty(input_size, grad_output, channels_last)


def fake_grad_weight(
    input, grad_output, weight_size, stride, padding, dilation, groups, channels_last
):
    # Native's double kernel keeps a layout that is both formats at once.
    either = weight_size[1] == 1 or all(length == 1 for length in weight_size[2:])
    keeps = input.dtype == torch.float64 and either
    return _empty(weight_size, input, channels_last and not keeps)


# ---- vmap: batched images are more images; batched weights are more groups -------------------


def _fold_channels(tensor: Tensor, in_dim: int | None, batch_size: int) -> Tensor:
    """[..., vmapped, ...] -> [N, vmapped * C, ...]; a tensor that is not vmapped is repeated."""
    if in_dim is None:
        tensor = tensor.unsqueeze(1).expand(-1, batch_size, *tensor.shape[1:])
    else:
        tensor = tensor.movedim(in_dim, 1)
    return tensor.flatten(1, 2)


def vmap_conv2d(info, in_dims, input, weight, bias, stride, padding, dilation, groups):
    op, batch_size = torch.ops.torchops.conv2d, info.batch_size
    shared_bias = bias if len(in_dims) < 3 or in_dims[2] is None else None
    if in_dims[1] is None:
        images = fold_batch(input, in_dims[0], batch_size)
        output = op(images, weight, shared_bias, stride, padding, dilation, groups)
        output, out_dim = unfold_batch(output, batch_size), 0
    else:
        output = op(
            _fold_channels(input, in_dims[0], batch_size),
            fold_batch(weight, in_dims[1], batch_size),
            None if shared_bias is None else shared_bias.repeat(batch_size),
            stride, padding, dilation, groups * batch_size,
        )  # fmt: skip
        output, out_dim = split_axis(output, 1, batch_size), 1
    if bias is not None and shared_bias is None:
        bias = bias.movedim(in_dims[2], 0)
        output = output.movedim(out_dim, 0)
        output, out_dim = output + bias.reshape(batch_size, 1, -1, *(1,) * (output.dim() - 3)), 0
    return output, out_dim


def vmap_grad_input(
    info, in_dims, grad_output, weight, input_size, stride, padding, dilation, groups, channels_last
):
    op, batch_size = torch.ops.torchops.conv2d_grad_input, info.batch_size
    window = (stride, padding, dilation)
    batch, channels, *spatial = input_size
    if in_dims[1] is None:
        grads = fold_batch(grad_output, in_dims[0], batch_size)
        size = (batch_size * batch, channels, *spatial)
        grad_input = op(grads, weight, size, *window, groups, channels_last)
        return unfold_batch(grad_input, batch_size), 0
    grads = _fold_channels(grad_output, in_dims[0], batch_size)
    weights = fold_batch(weight, in_dims[1], batch_size)
    size = (batch, batch_size * channels, *spatial)
    grad_input = op(grads, weights, size, *window, groups * batch_size, channels_last)
    return split_axis(grad_input, 1, batch_size), 1


def vmap_grad_weight(
    info, in_dims, input, grad_output, weight_size, stride, padding, dilation, groups, channels_last
):
    batch_size = info.batch_size
    images = _fold_channels(input, in_dims[0], batch_size)
    grads = _fold_channels(grad_output, in_dims[1], batch_size)
    size = (batch_size * weight_size[0], *weight_size[1:])
    grad_weight = torch.ops.torchops.conv2d_grad_weight(
        images, grads, size, stride, padding, dilation, groups * batch_size, channels_last
    )
    return unfold_batch(grad_weight, batch_size), 0
