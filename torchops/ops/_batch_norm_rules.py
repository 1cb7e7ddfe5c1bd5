"""batch_norm's fake kernels and vmap rules: what torch.compile and torch.func ask of it."""

from __future__ import annotations

import torch
from torch import Tensor

from torchops.ops._autograd import split_axis
from torchops.ops._shape import suggest_memory_format

# Bits of batch_norm_backward's output_mask.
INPUT, WEIGHT, BIAS, RESIDUAL = 1, 2, 4, 8


# ---- fake kernels ------------------------------------------------------------------------


def _like_output(input):
    memory_format = suggest_memory_format(input)
    if input.is_contiguous():
        memory_format = torch.contiguous_format
    elif input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
        memory_format = torch.channels_last
    return torch.empty(
        input.shape, dtype=input.dtype, device=input.device, memory_format=memory_format
    )


def _check_sizes(input, **per_channel):
    torch._check(input.dim() >= 2, lambda: f"expected at least 2 dimensions, got {input.dim()}")
    for name, tensor in per_channel.items():
        torch._check(
            tensor is None or tensor.shape == input.shape[1:2],
            lambda name=name: f"{name} should contain {input.shape[1]} elements",
        )


def fake_batch_norm(input, weight, bias, residual, eps, activation):
    _check_sizes(input, weight=weight, bias=bias)
    mean = input.new_empty(input.shape[1], dtype=torch.float64)
    return _like_output(input), mean, torch.empty_like(mean)


def fake_and_update(
    input, weight, bias, residual, eps, activation, running_mean, running_var, momentum
):
    output, mean, var = fake_batch_norm(input, weight, bias, residual, eps, activation)
    fake_update(running_mean, running_var, mean, var, 1, momentum)
    return output, mean, var


def fake_apply(input, mean, var, weight, bias, residual, eps, activation):
    _check_sizes(input, running_mean=mean, running_var=var, weight=weight, bias=bias)
    return _like_output(input)


def fake_backward(
    grad_output, input, mean, var, weight, bias, residual, eps, training, activation, mask
):
    def gradient(bit, like, shape):
        if not mask & bit:
            return like.new_empty(0)
        return torch.empty(
            shape, dtype=like.dtype, device=like.device, memory_format=suggest_memory_format(like)
        )

    channels = (input.shape[1],)
    return (
        gradient(INPUT, input, input.shape),
        gradient(WEIGHT, mean if weight is None else weight, channels),
        gradient(BIAS, mean if bias is None else bias, channels),
        gradient(RESIDUAL, input, input.shape),
    )


def fake_update(running_mean, running_var, mean, var, count, momentum):
    for running in (running_mean, running_var):
        torch._check(
            running is None or running.numel() == mean.numel(),
            lambda: "running_mean and running_var should contain one element per channel",
        )


# ---- vmap: a further batch dimension is more channels ---------------------------------------


def _fold_channels(tensor: Tensor | None, in_dim: int | None, batch_size: int, axis: int):
    """[..., vmapped, ..., C, ...] -> [..., vmapped * C, ...], C at `axis`; else repeated."""
    if tensor is None:
        return None
    if in_dim is None:
        tensor = tensor.unsqueeze(axis)
        shape = list(tensor.shape)
        shape[axis] = batch_size
        tensor = tensor.expand(shape)
    else:
        tensor = tensor.movedim(in_dim, axis)
    return tensor.flatten(axis, axis + 1)


def _fold_all(info, in_dims, tensors, axes):
    return [
        _fold_channels(tensor, in_dim, info.batch_size, axis)
        for tensor, in_dim, axis in zip(tensors, in_dims, axes, strict=False)
    ]


def vmap_batch_norm(info, in_dims, input, weight, bias, residual, eps, activation):
    folded = _fold_all(info, in_dims, (input, weight, bias, residual), (1, 0, 0, 1))
    outputs = torch.ops.torchops.batch_norm(*folded, eps, activation)
    axes = (1, 0, 0)
    unfolded = (split_axis(t, axis, info.batch_size) for t, axis in zip(outputs, axes, strict=True))
    return tuple(unfolded), axes


def vmap_and_update(
    info, in_dims, input, weight, bias, residual, eps, activation, running_mean, running_var,
    momentum,
):  # fmt: skip
    outputs, dims = vmap_batch_norm(info, in_dims, input, weight, bias, residual, eps, activation)
    output, mean, var = outputs
    update_dims = (*in_dims[6:8], *dims[1:])
    count = output.numel() // mean.numel()
    vmap_update(info, update_dims, running_mean, running_var, mean, var, count, momentum)
    return outputs, dims


def vmap_apply(info, in_dims, input, mean, var, weight, bias, residual, eps, activation):
    tensors = (input, mean, var, weight, bias, residual)
    folded = _fold_all(info, in_dims, tensors, (1, 0, 0, 0, 0, 1))
    output = torch.ops.torchops.batch_norm_apply(*folded, eps, activation)
    return split_axis(output, 1, info.batch_size), 1


def vmap_backward(
    info, in_dims, grad_output, input, mean, var, weight, bias, residual, eps, training,
    activation, mask,
):  # fmt: skip
    tensors = (grad_output, input, mean, var, weight, bias, residual)
    folded = _fold_all(info, in_dims, tensors, (1, 1, 0, 0, 0, 0, 1))
    gradients = torch.ops.torchops.batch_norm_backward(*folded, eps, training, activation, mask)
    results, dims = [], []
    for bit, (gradient, axis) in enumerate(zip(gradients, (1, 0, 0, 1), strict=True)):
        wanted = mask & 1 << bit
        results.append(split_axis(gradient, axis, info.batch_size) if wanted else gradient)
        dims.append(axis if wanted else None)
    return tuple(results), tuple(dims)


def vmap_update(info, in_dims, running_mean, running_var, mean, var, count, momentum):
    tensors = (running_mean, running_var, mean, var)
    for running, in_dim in zip((running_mean, running_var), in_dims, strict=False):
        if running is not None and in_dim is None and any(d is not None for d in in_dims[2:4]):
            raise RuntimeError(
                "Batch norm got a batched tensor as input while the running_mean or running_var, "
                "which will be updated in place, were not batched."
            )
    moved = [t if d is None else t.movedim(d, 0) for t, d in zip(tensors, in_dims, strict=False)]
    for index in range(info.batch_size):
        one = [t if d is None else t[index] for t, d in zip(moved, in_dims, strict=False)]
        torch.ops.torchops.batch_norm_update(*one, count, momentum)
    return None, None
