"""avg_pool1d, 2d and 3d: wrapper, autograd Functions, fake kernels, vmap rules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchops.ops._autograd import (
    BelowAutograd,
    Function,
    call_operator,
    depending,
    fold_batch,
    kernel,
    only_backward,
    operator,
    plain_apply,
    register,
    unfold_batch,
)
from torchops.ops._drop_in import drop_in, native_only
from torchops.ops._shape import (
    is_channels_last,
    single,
    strides_are_channels_last,
    window_numbers,
)


@drop_in(F.avg_pool2d)
def avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Mean of each window; the same as torch.nn.functional.avg_pool2d.

    Args:
        input: [N, C, H, W] or [C, H, W]; f64, f32, bf16 or f16; contiguous or channels_last.
        kernel_size, stride, padding: int or pair; stride defaults to kernel_size.
        ceil_mode: also count a last window that starts inside the input but ends outside.
        count_include_pad: divide by the window's size even where part of it is padding.
        divisor_override: divide by this instead.
        out: native's, undocumented, and native it is that writes there.

    Returns:
        [N, C, H_out, W_out] in the input's format. Sums are fp32 (fp64 for double).

    Raises:
        RuntimeError: native's own, for a bad rank, an empty spatial size, a padding of more than
            half the kernel, an output of size zero, or a divisor of zero.

    Complexity: reads the input once and writes the output once; backward the reverse. Nothing is
        saved for backward.
    """
    if out is not None:
        native: Any = F.avg_pool2d
        return native(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override,
            out=out,
        )  # fmt: skip
    pool = avg_pool_numbers(
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    if only_backward(input):
        return train_avg_pool2d(input, pool)
    return AvgPool2dFunction.call(input, pool)


def avg_pool_numbers(
    kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool,
    divisor_override: int | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The arguments as the operators take them: one list, in which 1 would pass for True."""
    if type(ceil_mode) is not bool or type(count_include_pad) is not bool:
        raise TypeError("avg_pool2d: ceil_mode and count_include_pad must be bool")
    if isinstance(divisor_override, bool):
        raise TypeError("avg_pool2d: divisor_override must be an int, not a bool")
    if divisor_override == 0:
        raise RuntimeError("divisor must be not zero")
    divisor = divisor_override or 0
    if type(kernel_size) is type(stride) is type(padding) is int:  # the usual case, 1 us sooner
        return (
            kernel_size, kernel_size, stride, stride, padding, padding, 1, 1,
            ceil_mode, count_include_pad, divisor,
        )  # fmt: skip
    window = window_numbers(kernel_size, stride, padding, 1)
    return (*window, ceil_mode, count_include_pad, divisor)


@drop_in(F.avg_pool1d)
def avg_pool1d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """avg_pool2d over [N, C, L] or [C, L]; the same as torch.nn.functional.avg_pool1d."""
    if input.dim() not in (2, 3):
        raise RuntimeError(f"avg_pool1d: expected a 2-D or 3-D input, but got {input.dim()}-D")
    kernel_size = single(kernel_size)
    stride = kernel_size if stride is None or stride == [] or stride == () else single(stride)
    output = avg_pool2d.__wrapped__(
        input.unsqueeze(-2), (1, *kernel_size), (1, *stride), (0, *single(padding)),
        ceil_mode, count_include_pad,
    )  # fmt: skip
    return output.squeeze(-2)


avg_pool3d = native_only("avg_pool3d", F.avg_pool3d)


class AvgPool2dFunction(Function):
    """Linear in input; its adjoint spreads each output over its window."""

    forward = staticmethod(kernel("avg_pool2d"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, pool = inputs
        ctx.rest = (input.shape, pool, is_channels_last(input))

    @staticmethod
    def backward(ctx, grad_output):
        return AvgPool2dBackwardFunction.call(depending(grad_output), *ctx.rest), None

    @staticmethod
    def tangent(ctx, input_tangent, *_):
        return AvgPool2dFunction.call(input_tangent, ctx.rest[1])


_operator = operator("avg_pool2d")._handle


class AvgPool2dBackwardOnly(torch.autograd.Function):
    """AvgPool2dFunction where only backward is asked for: in one frame, 2 us sooner."""

    @staticmethod
    def forward(ctx, input, pool):
        ctx.rest = input.shape, input.stride(), pool
        guard = BelowAutograd()
        try:
            return call_operator(_operator, input, pool)
        finally:
            del guard

    @staticmethod
    def backward(ctx, grad_output):
        size, strides, pool = ctx.rest
        channels_last = strides_are_channels_last(size, strides)
        return AvgPool2dBackwardFunction.call(
            depending(grad_output), size, pool, channels_last
        ), None


train_avg_pool2d = plain_apply(AvgPool2dBackwardOnly)


class AvgPool2dBackwardFunction(Function):
    """Linear in grad_output; its adjoint is the pooling."""

    forward = staticmethod(kernel("avg_pool2d_backward"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *ctx.rest = inputs

    @staticmethod
    def backward(ctx, grad):
        return AvgPool2dFunction.call(grad, ctx.rest[1]), None, None, None

    @staticmethod
    def tangent(ctx, grad_output_tangent, *_):
        return AvgPool2dBackwardFunction.call(grad_output_tangent, *ctx.rest)


# ---- fake kernels ------------------------------------------------------------------------


def _fake_avg_pool2d(input, pool):
    *_, ceil_mode, count_include_pad, divisor = pool
    window = (pool[:2], pool[2:4], pool[4:6])
    return torch.ops.aten.avg_pool2d(input, *window, ceil_mode, count_include_pad, divisor or None)


def _fake_backward(grad_output, input_size, pool, channels_last):
    return torch.empty(
        input_size, dtype=grad_output.dtype, device=grad_output.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )  # fmt: skip


# ---- vmap: a further batch dimension is more images ----------------------------------------


def _vmap_avg_pool2d(info, in_dims, input, pool):
    images = fold_batch(input, in_dims[0], info.batch_size)
    return unfold_batch(torch.ops.torchops.avg_pool2d(images, pool), info.batch_size), 0


def _vmap_backward(info, in_dims, grad_output, input_size, pool, channels_last):
    grads = fold_batch(grad_output, in_dims[0], info.batch_size)
    size = (info.batch_size * input_size[0], *input_size[1:])
    grad_input = torch.ops.torchops.avg_pool2d_backward(grads, size, pool, channels_last)
    return unfold_batch(grad_input, info.batch_size), 0


register("avg_pool2d", fake=_fake_avg_pool2d, vmap=_vmap_avg_pool2d,
         autograd=AvgPool2dFunction.apply_here)  # fmt: skip
register("avg_pool2d_backward", fake=_fake_backward, vmap=_vmap_backward,
         autograd=AvgPool2dBackwardFunction.apply_here)  # fmt: skip
