"""max_pool1d, 2d and 3d: wrapper and autograd Functions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchops.ops._autograd import (
    Function,
    depending,
    differentiable,
    kernel,
    only_backward,
    save,
)
from torchops.ops._drop_in import drop_in, native_only
from torchops.ops._max_rules import backward_only, register_max, with_indices
from torchops.ops._shape import (
    single,
    suggest_memory_format,
    window_numbers,
)

_max_pool2d = kernel("max_pool2d")
_indices = kernel("max_pool2d_indices")


@drop_in(F.max_pool2d)
def max_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Largest value of each window; the same as torch.nn.functional.max_pool2d.

    Args:
        input: [N, C, H, W] or [C, H, W]; f64, f32, bf16 or f16; contiguous or channels_last.
        kernel_size, stride, padding, dilation: int or pair; stride defaults to kernel_size.
        ceil_mode: also count a last window that starts inside the input but ends outside.
        return_indices: also return the int64 position of each maximum in its input plane.

    Returns:
        [N, C, H_out, W_out] in the input's format. A NaN in a window wins; on ties the first.

    Raises:
        RuntimeError: native's own, for a bad rank, an empty spatial size, a padding of more than
            half the kernel, or an output of size zero.

    Complexity: reads the input once, writes the output once, and for backward one byte per output
    (four where the window has more than 256 taps) instead of native's eight.
    """
    pool = max_pool_numbers(kernel_size, stride, padding, dilation, ceil_mode)
    if return_indices:
        if only_backward(input):
            return train_with_indices(input, pool)
        output, offsets = MaxPool2dFunction.call(input, pool)
        return output, _indices(offsets, input.shape, pool)
    if only_backward(input):
        return train_max_pool2d(input, pool)
    if differentiable(input):
        return MaxPool2dFunction.apply(input, pool)[0]
    return _max_pool2d(input, pool)


def max_pool_numbers(
    kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple[Any, ...]:
    """The arguments as the operators take them: one list, in which 1 would pass for True."""
    if type(ceil_mode) is not bool:
        raise TypeError("max_pool2d: ceil_mode must be bool")
    if type(kernel_size) is type(stride) is type(padding) is type(dilation) is int:
        return (
            kernel_size, kernel_size, stride, stride, padding, padding, dilation, dilation,
            ceil_mode,
        )  # fmt: skip  # the usual case, 1 us sooner
    return (*window_numbers(kernel_size, stride, padding, dilation), ceil_mode)


@drop_in(F.max_pool1d)
def max_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """max_pool2d over [N, C, L] or [C, L]; the same as torch.nn.functional.max_pool1d."""
    if input.dim() not in (2, 3):
        raise RuntimeError(f"max_pool1d: expected a 2-D or 3-D input, but got {input.dim()}-D")
    if stride is None or stride in ([], ()):
        stride = kernel_size
    needs_grad = differentiable(input) or (torch.is_grad_enabled() and input.requires_grad)
    if not (return_indices or needs_grad) and input.is_cpu:
        input = input.contiguous()  # native's strides there: it has a kernel without indices
    row = [(1, *single(v)) for v in (kernel_size, stride)]
    row += [(0, *single(padding)), (1, *single(dilation))]
    result = max_pool2d.__wrapped__(input.unsqueeze(-2), *row, ceil_mode, return_indices)
    if return_indices:
        return tuple(tensor.squeeze(-2) for tensor in result)
    return result.squeeze(-2)


max_pool3d = native_only("max_pool3d", F.max_pool3d)


class MaxPool2dFunction(Function):
    """(output, offsets) of the pooling; backward and tangent follow the winners."""

    forward = staticmethod(kernel("max_pool2d_with_offsets"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, pool = inputs
        _, offsets = output
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(False)
        ctx.rest = (input.shape, pool)
        save(ctx, offsets)

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return None, None
        offsets, *_ = ctx.saved_tensors
        return MaxPool2dBackwardFunction.call(depending(grad_output), offsets, *ctx.rest), None

    @staticmethod
    def tangent(ctx, input_tangent, *_):
        (offsets,) = ctx.saved_tensors
        return MaxPool2dGatherFunction.call(input_tangent, offsets, ctx.rest[1]), None


train_max_pool2d = backward_only("max_pool2d", MaxPool2dFunction)
train_with_indices = with_indices("max_pool2d", MaxPool2dFunction, _indices)


class MaxPool2dBackwardFunction(Function):
    """Scatter to the winners: linear in grad_output, its adjoint is the gather."""

    forward = staticmethod(kernel("max_pool2d_backward"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, offsets, *ctx.rest = inputs
        save(ctx, offsets)

    @staticmethod
    def backward(ctx, grad):
        (offsets,) = ctx.saved_tensors
        return MaxPool2dGatherFunction.call(grad, offsets, ctx.rest[1]), None, None, None

    @staticmethod
    def tangent(ctx, grad_output_tangent, *_):
        (offsets,) = ctx.saved_tensors
        return MaxPool2dBackwardFunction.call(grad_output_tangent, offsets, *ctx.rest)


class MaxPool2dGatherFunction(Function):
    """input at the winners: linear in input, its adjoint is the scatter."""

    forward = staticmethod(kernel("max_pool2d_gather"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, offsets, pool = inputs
        ctx.rest = (input.shape, pool)
        save(ctx, offsets)

    @staticmethod
    def backward(ctx, grad_output):
        (offsets,) = ctx.saved_tensors
        grad_input = MaxPool2dBackwardFunction.call(grad_output, offsets, *ctx.rest)
        return grad_input, None, None

    @staticmethod
    def tangent(ctx, input_tangent, *_):
        (offsets,) = ctx.saved_tensors
        return MaxPool2dGatherFunction.call(input_tangent, offsets, ctx.rest[1])


def _derive(input, pool):
    """The pooling that keeps no offsets: with them where a derivative may be asked for."""
    if differentiable(input):
        return MaxPool2dFunction.apply_here(input, pool)[0]
    return _max_pool2d(input, pool)


def _fake_offsets(input, pool):
    window = (pool[:2], pool[2:4], pool[4:6], pool[6:8], pool[8])
    _, indices = torch.ops.aten.max_pool2d_with_indices(input, *window)  # sizes, and refusals
    return torch.empty(
        indices.shape, device=input.device,
        dtype=torch.uint8 if pool[0] * pool[1] <= 256 else torch.int32,
        memory_format=suggest_memory_format(input),
    )  # fmt: skip


register_max("max_pool2d", _fake_offsets, _derive, MaxPool2dFunction,
             MaxPool2dBackwardFunction, MaxPool2dGatherFunction)  # fmt: skip
