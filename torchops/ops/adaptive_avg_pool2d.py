"""adaptive_avg_pool1d, 2d and 3d: wrapper, autograd Functions, fake kernels, vmap rules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchops.ops._autograd import (
    Function,
    depending,
    fold_batch,
    kernel,
    register,
    unfold_batch,
)
from torchops.ops._drop_in import drop_in, native_only
from torchops.ops._shape import (
    adaptive_size,
    adaptive_size_1d,
    check_not_empty,
    is_channels_last,
)


@drop_in(F.adaptive_avg_pool2d)
def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    """Means over windows that share the input out evenly; as torch.nn.functional's.

    Args:
        input: [N, C, H, W] or [C, H, W]; f64, f32, bf16 or f16; contiguous or channels_last.
        output_size: int or pair; a None in a pair keeps that side of the input.

    Returns:
        [N, C, *output_size] in the input's format: output o of an axis is the mean over positions
        floor(o * in / out) to ceil((o + 1) * in / out), exclusive. Sums are fp32 (fp64 for double).
        output_size 1 is global average-pooling; as native's, its gradient is always contiguous.

    Raises:
        RuntimeError: native's own, for a bad rank, an empty spatial size or a negative output_size.

    Complexity: reads the input once and writes the output once; backward the reverse. Nothing is
        saved for backward.
    """
    size = adaptive_size(output_size, input)
    if size == (1, 1) and _only_a_mean(input):
        return F.adaptive_avg_pool2d(input, output_size)
    return AdaptiveAvgPool2dFunction.call(input, size)


@drop_in(F.adaptive_avg_pool1d)
def adaptive_avg_pool1d(input: Tensor, output_size: Any) -> Tensor:
    """adaptive_avg_pool2d over [N, C, L] or [C, L]; as torch.nn.functional's."""
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"adaptive_avg_pool1d: expected a 2-D or 3-D input, but got {input.dim()}-D"
        )
    size = adaptive_size_1d(output_size)
    return adaptive_avg_pool2d.__wrapped__(input.unsqueeze(-2), size).squeeze(-2)


def _only_a_mean(input: Tensor) -> bool:
    """Native's pool to 1x1 is a mean over the last two dimensions, of any rank and any size."""
    return input.dim() not in (3, 4) or input.shape[-1] == 0 or input.shape[-2] == 0


adaptive_avg_pool3d = native_only("adaptive_avg_pool3d", F.adaptive_avg_pool3d)


class AdaptiveAvgPool2dFunction(Function):
    """Linear in input; its adjoint spreads each output over its window."""

    forward = staticmethod(kernel("adaptive_avg_pool2d"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.output_size = inputs
        ctx.input_size = input.shape
        # Native's global pool is a mean, whose backward expands into a contiguous tensor.
        ctx.channels_last = is_channels_last(input) and ctx.output_size != (1, 1)

    @staticmethod
    def backward(ctx, grad_output):
        if ctx.output_size != (1, 1):  # native's mean needs nothing but the size of its input
            check_not_empty("adaptive_avg_pool2d_backward", grad_output)
            grad_output = depending(grad_output)
        grad_input = AdaptiveAvgPool2dBackwardFunction.call(
            grad_output, ctx.input_size, ctx.channels_last
        )
        return grad_input, None

    @staticmethod
    def tangent(ctx, input_tangent, _):
        return AdaptiveAvgPool2dFunction.call(input_tangent, ctx.output_size)


class AdaptiveAvgPool2dBackwardFunction(Function):
    """Linear in grad_output; its adjoint is the pooling."""

    forward = staticmethod(kernel("adaptive_avg_pool2d_backward"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, ctx.input_size, ctx.channels_last = inputs
        ctx.output_size = tuple(grad_output.shape[-2:])

    @staticmethod
    def backward(ctx, grad):
        return AdaptiveAvgPool2dFunction.call(grad, ctx.output_size), None, None

    @staticmethod
    def tangent(ctx, grad_output_tangent, *_):
        return AdaptiveAvgPool2dBackwardFunction.call(
            grad_output_tangent, ctx.input_size, ctx.channels_last
        )


# ---- fake kernels ------------------------------------------------------------------------


def _fake_adaptive_avg_pool2d(input, output_size):
    for size in input.shape[-2:]:
        torch._check(size > 0, lambda: f"adaptive_avg_pool2d: nothing to pool in {input.shape}")
    return torch.ops.aten._adaptive_avg_pool2d(input, output_size)


def _fake_backward(grad_output, input_size, channels_last):
    return torch.empty(
        input_size, dtype=grad_output.dtype, device=grad_output.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip


# ---- vmap: a further batch dimension is more images ----------------------------------------


def _vmap_adaptive_avg_pool2d(info, in_dims, input, output_size):
    images = fold_batch(input, in_dims[0], info.batch_size)
    output = torch.ops.torchops.adaptive_avg_pool2d(images, output_size)
    return unfold_batch(output, info.batch_size), 0


def _vmap_backward(info, in_dims, grad_output, input_size, channels_last):
    grads = fold_batch(grad_output, in_dims[0], info.batch_size)
    size = (info.batch_size * input_size[0], *input_size[1:])
    grad_input = torch.ops.torchops.adaptive_avg_pool2d_backward(grads, size, channels_last)
    return unfold_batch(grad_input, info.batch_size), 0


register("adaptive_avg_pool2d", fake=_fake_adaptive_avg_pool2d, vmap=_vmap_adaptive_avg_pool2d,
         autograd=AdaptiveAvgPool2dFunction.apply_here)  # fmt: skip
register("adaptive_avg_pool2d_backward", fake=_fake_backward, vmap=_vmap_backward,
         autograd=AdaptiveAvgPool2dBackwardFunction.apply_here)  # fmt: skip
