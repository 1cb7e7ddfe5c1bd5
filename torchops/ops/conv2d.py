"""conv2d and its relatives: wrappers and autograd Functions.

The convolution and the gradients of its input and its weight are bilinear, and each one's
derivatives are the other two: three operators close all orders of differentiation.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from torchops.ops import _conv2d_rules as rules
from torchops.ops._autograd import Function, depending, kernel, register, save
from torchops.ops._drop_in import drop_in, native_only
from torchops.ops._shape import pair, single


@drop_in(F.conv2d)
def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Cross-correlation of images with a bank of kernels; the same as torch.nn.functional.conv2d.

        output[n, o, y, x] = bias[o] + sum over c, i, j of
            weight[o, c, i, j] * input[n, c, y * stride + i * dilation - padding, ...]

    Args:
        input: [N, C, H, W] or [C, H, W]; f64, f32, bf16 or f16; contiguous or channels_last.
        weight: [O, C / groups, kH, kW], of the input's dtype.
        bias: [O] or None.
        stride, padding, dilation: int or pair; padding also "valid" or, with stride 1, "same".
        groups: blocks of channels that do not see each other; divides C and O.

    Returns:
        [N, O, H_out, W_out]; channels_last where input or weight is. Sums are in float32 (float64
        for double), the same bits for every thread count.

    Raises:
        RuntimeError, ValueError, TypeError: native's own, for shapes, dtypes, devices or arguments
            that do not fit, before any memory is touched.

    Complexity: 2 * N * O * H_out * W_out * C / groups * kH * kW operations, 4/9 of them for 3x3
    windows of stride 1 in float32 and float64 (Winograd, F(2x2, 3x3); Lavin and Gray,
    arXiv:1509.09308). Bytes: the input, the weight and the output once each, where the kernel for
    the shape reads the memory format as it is; else one more copy of input and output, in the other
    format, or of the pixels that a strided 1x1 window sees. The input is never unfolded as a whole.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"conv2d: weight must be a Tensor, not {type(weight).__name__}")
    if isinstance(groups, bool):
        raise TypeError("conv2d: groups must be an int, not a bool")
    if input.dim() in (3, 4) and input.shape[-3] == 0:  # native's output has no channels either
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if not isinstance(padding, str):
        padding = pair(padding)
    window = (pair(stride), padding, pair(dilation), groups)
    if input.dim() == 3:
        return _convolve(input.unsqueeze(0), weight, bias, *window).squeeze(0)
    return _convolve(input, weight, bias, *window)


cross_correlation2d = conv2d


@drop_in(F.conv1d)
def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """conv2d over [N, C, L] or [C, L]; the same as torch.nn.functional.conv1d."""
    if input.dim() not in (2, 3) or weight.dim() != 3:
        raise RuntimeError("conv1d: expected a 2-D or 3-D input and a 3-D weight")
    if input.shape[-2] == 0:
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    if not isinstance(padding, str):
        padding = (0, *single(padding))
    window = ((1, *single(stride)), padding, (1, *single(dilation)), groups)
    if weight.stride(-1) != 1:
        # As images of height 1, which such a weight may make channels_last; rows are 15 us sooner.
        rows, kernels = input.contiguous().unsqueeze(-2), weight.unsqueeze(-2)
        return conv2d.__wrapped__(rows, kernels, bias, *window).squeeze(-2)
    if input.dim() == 2:
        return _convolve(input.unsqueeze(0), weight, bias, *window).squeeze(0)
    return _convolve(input, weight, bias, *window)


def _native_convolution2d(input, weight, *args, **kwargs):
    return F.conv2d(input, weight.flip((-2, -1)), *args, **kwargs)


@drop_in(_native_convolution2d)
def convolution2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """The convolution of mathematics: conv2d with every kernel rotated by 180 degrees.

    Arguments, result, errors and complexity are those of `conv2d`.
    """
    flipped = weight.flip((-2, -1))
    return conv2d.__wrapped__(input, flipped, bias, stride, padding, dilation, groups)


def _native_conv1x1(input, weight, bias=None, stride=1):
    return F.conv2d(input, weight, bias, stride)


@drop_in(_native_conv1x1)
def conv1x1(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1) -> Tensor:
    """The pointwise convolution: one matrix product over the channels of every pixel.

    Args:
        input: [N, C, H, W] or [C, H, W], as `conv2d` takes it.
        weight: [O, C, 1, 1].
        bias: [O] or None.
        stride: int or pair.

    Returns:
        What conv2d returns; conv2d picks the same kernel by itself.

    Raises:
        ValueError: for a weight whose window is not 1 x 1; otherwise as `conv2d`.
    """
    if tuple(weight.shape[2:]) != (1, 1):
        raise ValueError(
            f"conv1x1: expected a weight of shape [O, C, 1, 1], but got {list(weight.shape)}; "
            "call conv2d for larger windows"
        )
    return conv2d.__wrapped__(input, weight, bias, stride)


conv3d = native_only("conv3d", F.conv3d)


def _convolve(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple, padding: Any,
    dilation: tuple, groups: int,
) -> Tensor:  # fmt: skip
    """Of images or, all tensors 3-D, of rows: images of height 1. The arguments are pairs."""
    if autocasts(input):
        input, weight, bias = _autocast(input.device.type, input, weight, bias)
    if isinstance(padding, str):
        input, padding = _named_padding(input, weight, stride, padding, dilation)
    return Conv2dFunction.call(input, weight, bias, stride, padding, dilation, groups)


def autocasts(input: Tensor) -> bool:
    """Whether autocast is on for a tensor's device; torch refuses to say of some, as meta."""
    device = "cpu" if input.is_cpu else input.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def _autocast(device: str, *tensors: Any) -> Any:
    """As torch's autocast before its own convolution: all but float64 to the region's dtype."""
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


# Native's text.
_UNEVEN_PADDING = (
    "Using padding='same' with even kernel lengths and odd dilation may require a zero-padded copy"
    " of the input be created"
)


def _named_padding(
    input: Tensor, weight: Tensor, stride: tuple, padding: str, dilation: tuple
) -> tuple[Tensor, tuple[int, ...]]:
    """The input and the numbers for padding="valid" or "same".

    "same" with an even extent needs one element more on the right; the input gets it beforehand.
    """
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"Invalid padding string: '{padding}'")
    if any(s != 1 for s in stride):
        raise RuntimeError("padding='same' is not supported for strided convolutions")
    window = weight.shape[2:] if weight.dim() == 4 else (1, weight.shape[2])
    total = [d * (k - 1) for d, k in zip(dilation, window, strict=True)]
    if any(t % 2 for t in total):
        if not is_dynamo_compiling():
            warnings.warn(_UNEVEN_PADDING, stacklevel=2)
        input = F.pad(input, (0, total[1] % 2, 0, total[0] % 2))
    return input, (total[0] // 2, total[1] // 2)


def _bilinear_tangent(function: type[Function], ctx: Any, tangents: tuple, *rest: Any) -> Any:
    """The product rule for the two tensors that ctx saved; a tangent that is None is zero."""
    first, second = ctx.saved_tensors
    first_tangent, second_tangent = tangents
    return _sum(
        None if first_tangent is None else function.call(first_tangent, second, *rest),
        None if second_tangent is None else function.call(first, second_tangent, *rest),
    )


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    return first + second


class Conv2dFunction(Function):
    """output = conv2d(input, weight) + bias."""

    tensors = 3
    forward = staticmethod(kernel("conv2d"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, *ctx.window = inputs
        save(ctx, input, weight)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        linear = grad_output
        if needs_input or needs_weight:  # native's gradients depend on both
            linear = depending(grad_output)
        grad_input = grad_weight = grad_bias = None
        if needs_bias:
            grad_bias = linear.sum([0, *range(2, grad_output.dim())])
        if input.shape[0] == 0:  # torch answers in the layouts of the arguments
            zeros = depending(torch.zeros_like(input)), depending(torch.zeros_like(weight))
            return *zeros, grad_bias, None, None, None, None
        if needs_input != needs_weight:
            grad_output = linear
        channels_last = rules.channels_last(input, weight)
        if needs_input:
            grad_input = Conv2dGradInputFunction.call(
                grad_output, weight, input.shape, *ctx.window, channels_last
            )
        if needs_weight:
            grad_weight = Conv2dGradWeightFunction.call(
                input, grad_output, weight.shape, *ctx.window, channels_last
            )
        return grad_input, grad_weight, grad_bias, None, None, None, None

    @staticmethod
    def tangent(ctx, input_tangent, weight_tangent, bias_tangent, *_):
        tangents = (input_tangent, weight_tangent)
        output = _bilinear_tangent(Conv2dFunction, ctx, tangents, None, *ctx.window)
        if bias_tangent is None:
            return output
        input, weight = ctx.saved_tensors
        return _sum(output, _bias_image(bias_tangent, input, weight, ctx.window))


def _bias_image(bias: Tensor, input: Tensor, weight: Tensor, window: list) -> Tensor:
    size = rules.output_size(input.shape, weight.shape, *window[:3])
    return bias.view(-1, *(1,) * (len(size) - 2)).expand(size)


class Conv2dGradInputFunction(Function):
    """grad_input, bilinear in grad_output and weight."""

    tensors = 2
    forward = staticmethod(kernel("conv2d_grad_input"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, weight, ctx.input_size, *ctx.window, ctx.channels_last = inputs
        save(ctx, grad_output, weight)

    @staticmethod
    def backward(ctx, grad):
        grad_output, weight = ctx.saved_tensors
        needs_grad_output, needs_weight, *_ = ctx.needs_input_grad
        for_grad_output = for_weight = None
        if needs_grad_output:
            for_grad_output = Conv2dFunction.call(grad, weight, None, *ctx.window)
        if needs_weight:
            for_weight = Conv2dGradWeightFunction.call(
                grad, grad_output, weight.shape, *ctx.window, ctx.channels_last
            )
        return for_grad_output, for_weight, *(None,) * 6

    @staticmethod
    def tangent(ctx, grad_output_tangent, weight_tangent, *_):
        tangents = (grad_output_tangent, weight_tangent)
        rest = (ctx.input_size, *ctx.window, ctx.channels_last)
        return _bilinear_tangent(Conv2dGradInputFunction, ctx, tangents, *rest)


class Conv2dGradWeightFunction(Function):
    """grad_weight, bilinear in input and grad_output."""

    tensors = 2
    forward = staticmethod(kernel("conv2d_grad_weight"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, grad_output, ctx.weight_size, *ctx.window, ctx.channels_last = inputs
        save(ctx, input, grad_output)

    @staticmethod
    def backward(ctx, grad):
        input, grad_output = ctx.saved_tensors
        needs_input, needs_grad_output, *_ = ctx.needs_input_grad
        for_input = for_grad_output = None
        if needs_input:
            for_input = Conv2dGradInputFunction.call(
                grad_output, grad, input.shape, *ctx.window, ctx.channels_last
            )
        if needs_grad_output:
            for_grad_output = Conv2dFunction.call(input, grad, None, *ctx.window)
        return for_input, for_grad_output, *(None,) * 6

    @staticmethod
    def tangent(ctx, input_tangent, grad_output_tangent, *_):
        tangents = (input_tangent, grad_output_tangent)
        rest = (ctx.weight_size, *ctx.window, ctx.channels_last)
        return _bilinear_tangent(Conv2dGradWeightFunction, ctx, tangents, *rest)


register(
    "conv2d", fake=rules.fake_conv2d, vmap=rules.vmap_conv2d, autograd=Conv2dFunction.apply_here
)
register("conv2d_grad_input", fake=rules.fake_grad_input, vmap=rules.vmap_grad_input,
         autograd=Conv2dGradInputFunction.apply_here)  # fmt: skip
register("conv2d_grad_weight", fake=rules.fake_grad_weight, vmap=rules.vmap_grad_weight,
         autograd=Conv2dGradWeightFunction.apply_here)  # fmt: skip
