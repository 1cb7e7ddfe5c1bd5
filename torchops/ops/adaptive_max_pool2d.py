"""adaptive_max_pool1d, 2d and 3d: wrapper and autograd Functions."""

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
    adaptive_size,
    adaptive_size_1d,
    check_not_empty,
    suggest_memory_format,
)

_adaptive_max_pool2d = kernel("adaptive_max_pool2d")
_indices = kernel("adaptive_max_pool2d_indices")


@drop_in(F.adaptive_max_pool2d)
def adaptive_max_pool2d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """Largest values of windows that share the input out evenly; as torch.nn.functional's.

    Args:
        input: [N, C, H, W] or [C, H, W]; f64, f32, bf16 or f16; contiguous or channels_last.
        output_size: int or pair; a None in a pair keeps that side of the input.
        return_indices: also return the int64 position of each maximum in its input plane.

    Returns:
        [N, C, *output_size] in the input's format; the windows are adaptive_avg_pool2d's. A NaN in
        a window wins; on ties the first.

    Raises:
        RuntimeError: native's own, for a bad rank, an empty dimension or a negative output_size.

    Complexity: reads the input once, writes the output once, and for backward one byte per output
    (four where the largest window may have more than 256 taps) instead of native's eight.
    """
    size = adaptive_size(output_size, input)
    if return_indices:
        if only_backward(input):
            return train_with_indices(input, size)
        output, offsets = AdaptiveMaxPool2dFunction.call(input, size)
        return output, _indices(offsets, input.shape)
    if only_backward(input):
        return train_adaptive_max_pool2d(input, size)
    if differentiable(input):
        return AdaptiveMaxPool2dFunction.apply(input, size)[0]
    return _adaptive_max_pool2d(input, size)


@drop_in(F.adaptive_max_pool1d)
def adaptive_max_pool1d(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
    """adaptive_max_pool2d over [N, C, L] or [C, L]; as torch.nn.functional's."""
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"adaptive_max_pool1d: expected a 2-D or 3-D input, but got {input.dim()}-D"
        )
    size = adaptive_size_1d(output_size)
    result = adaptive_max_pool2d.__wrapped__(input.unsqueeze(-2), size, return_indices)
    if return_indices:
        return tuple(tensor.squeeze(-2) for tensor in result)
    return result.squeeze(-2)


adaptive_max_pool3d = native_only("adaptive_max_pool3d", F.adaptive_max_pool3d)


class AdaptiveMaxPool2dFunction(Function):
    """(output, offsets) of the pooling; backward and tangent follow the winners."""

    forward = staticmethod(kernel("adaptive_max_pool2d_with_offsets"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, size = inputs
        _, offsets = output
        ctx.mark_non_differentiable(offsets)
        ctx.set_materialize_grads(False)
        ctx.rest = (input.shape, size)
        save(ctx, offsets)

    @staticmethod
    def backward(ctx, grad_output, _):
        if grad_output is None:
            return None, None
        check_not_empty("adaptive_max_pool2d_backward", grad_output)
        offsets, *_ = ctx.saved_tensors
        return AdaptiveMaxPool2dBackwardFunction.call(
            depending(grad_output), offsets, ctx.rest[0]
        ), None

    @staticmethod
    def tangent(ctx, input_tangent, _):
        (offsets,) = ctx.saved_tensors
        return AdaptiveMaxPool2dGatherFunction.call(input_tangent, offsets), None


train_adaptive_max_pool2d = backward_only("adaptive_max_pool2d", AdaptiveMaxPool2dFunction)
train_with_indices = with_indices(
    "adaptive_max_pool2d",
    AdaptiveMaxPool2dFunction,
    lambda offsets, input_size, _: _indices(offsets, input_size),
)


class AdaptiveMaxPool2dBackwardFunction(Function):
    """Scatter to the winners: linear in grad_output, its adjoint is the gather."""

    forward = staticmethod(kernel("adaptive_max_pool2d_backward"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, offsets, ctx.input_size = inputs
        save(ctx, offsets)

    @staticmethod
    def backward(ctx, grad):
        (offsets,) = ctx.saved_tensors
        return AdaptiveMaxPool2dGatherFunction.call(grad, offsets), None, None

    @staticmethod
    def tangent(ctx, grad_output_tangent, *_):
        (offsets,) = ctx.saved_tensors
        return AdaptiveMaxPool2dBackwardFunction.call(grad_output_tangent, offsets, ctx.input_size)


class AdaptiveMaxPool2dGatherFunction(Function):
    """input at the winners: linear in input, its adjoint is the scatter."""

    forward = staticmethod(kernel("adaptive_max_pool2d_gather"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, offsets = inputs
        ctx.input_size = input.shape
        save(ctx, offsets)

    @staticmethod
    def backward(ctx, grad_output):
        (offsets,) = ctx.saved_tensors
        return AdaptiveMaxPool2dBackwardFunction.call(grad_output, offsets, ctx.input_size), None

    @staticmethod
    def tangent(ctx, input_tangent, _):
        (offsets,) = ctx.saved_tensors
        return AdaptiveMaxPool2dGatherFunction.call(input_tangent, offsets)


def _derive(input, size):
    """The pooling that keeps no offsets: with them where a derivative may be asked for."""
    if differentiable(input):
        return AdaptiveMaxPool2dFunction.apply_here(input, size)[0]
    return _adaptive_max_pool2d(input, size)


def _taps(length, outputs):
    """Taps of the largest window; csrc/ops/adaptive_max_pool2d.h has the same rule."""
    if outputs == 0:
        return 1
    return length // outputs + (2 if length % outputs != 0 else 0)


def _fake_offsets(input, output_size):
    _, indices = torch.ops.aten.adaptive_max_pool2d(input, output_size)  # sizes, and refusals
    height, width = (_taps(input.shape[axis], output_size[axis]) for axis in (-2, -1))
    return torch.empty(
        indices.shape, device=input.device,
        dtype=torch.uint8 if height * width <= 256 else torch.int32,
        memory_format=suggest_memory_format(input),
    )  # fmt: skip


register_max("adaptive_max_pool2d", _fake_offsets, _derive, AdaptiveMaxPool2dFunction,
             AdaptiveMaxPool2dBackwardFunction, AdaptiveMaxPool2dGatherFunction)  # fmt: skip
