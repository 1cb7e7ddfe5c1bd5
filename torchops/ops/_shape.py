"""Window arguments and memory formats, as torch understands them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._prims_common import are_strides_like_channels_last_or_false
from torch._prims_common import suggest_memory_format as _suggest_memory_format


def pair(value: Any) -> tuple[Any, ...]:
    """An int, or a sequence of one or two, as torch's int[2] arguments take them."""
    if type(value) is int:
        return (value, value)
    if isinstance(value, (tuple, list)):
        first, last = value * 2 if len(value) == 1 else value
        return (first, last)
    return (_number(value), value)


def single(value: Any) -> tuple[Any]:
    """An int, or a sequence of one, as torch's int[1] arguments take them."""
    (value,) = value if isinstance(value, (tuple, list)) else (_number(value),)
    return (value,)


def _number(value: Any) -> Any:
    """`value` for an int[] argument: as torch does, which takes True for 1 only inside a list."""
    if isinstance(value, bool):
        raise TypeError("expected an int or a sequence of ints, but got a bool")
    return value


def adaptive_size(output_size: Any, input: Tensor) -> tuple[Any, ...]:
    """An adaptive pool's output_size: an int, or a pair in which None keeps the input's size."""
    if isinstance(output_size, (tuple, list)):
        if len(output_size) != 2 or input.dim() < 3:
            raise ValueError(f"expected an output_size of two for an image, but got {output_size}")
        height, width = map(_number, output_size)
        return (
            input.shape[-2] if height is None else height,
            input.shape[-1] if width is None else width,
        )
    if isinstance(output_size, bool) or not isinstance(output_size, (int, torch.SymInt)):
        raise TypeError(f"expected output_size of ints, but got {type(output_size).__name__}")
    return (output_size, output_size)


def adaptive_size_1d(output_size: Any) -> tuple[Any, ...]:
    """A 1-D adaptive pool's output_size as that of a map of height 1. None is no size here."""
    (length,) = single(output_size)
    if length is None:
        raise TypeError("expected an output_size of one int, but got None")
    return (1, length)


def check_not_empty(operator: str, grad_output: Tensor) -> None:
    """Raises where native's backward does: only the first dimension may be empty."""
    for dim, size in enumerate(grad_output.shape[1:], 1):
        if size == 0:
            raise RuntimeError(
                f"{operator}(): Expected grad_output to have non-zero size for non-batch "
                f"dimensions, but grad_output has sizes {list(grad_output.shape)} with dimension "
                f"{dim} being empty"
            )


def is_channels_last(tensor: Tensor) -> bool:
    """Whether torch's own operators give channels_last to what they compute from `tensor`."""
    return strides_are_channels_last(tensor.shape, tensor.stride())


def strides_are_channels_last(size: Any, strides: Any) -> bool:
    if len(strides) != 4 or strides[1] > strides[3]:
        return False  # beyond doubt, and 4 us sooner
    return are_strides_like_channels_last_or_false(size, strides)


def suggest_memory_format(tensor: Tensor) -> torch.memory_format:
    """The format that torch's own operators give an output computed from `tensor`."""
    if tensor.dim() != 4:
        return torch.contiguous_format
    return _suggest_memory_format(tensor)


def window_numbers(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> tuple[Any, ...]:
    """A pool's window as its operators take it: the start of one list, see csrc/core/tensor.h."""
    kernel_size = pair(kernel_size)
    stride = kernel_size if stride is None or stride == [] or stride == () else pair(stride)
    return kernel_size + stride + pair(padding) + pair(dilation)


def convolved_size(input: int, kernel: int, stride: int, padding: int, dilation: int):
    """Number of windows that fit along an axis; works on symbolic sizes."""
    return (input + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
