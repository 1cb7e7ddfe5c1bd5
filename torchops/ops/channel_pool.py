"""channel_max_pool and channel_avg_pool: pooling across channels, on the kernels of the 2-D pools.

Channels are an axis like any other to a pool: of a contiguous [N, C, *] they are the height of a
map [C, prod(*)], and of a channels_last one the width of maps [1, C], one per pixel. So the views
below are all there is, and autograd, transforms and compilation come from the 2-D pools.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchops.ops._drop_in import OPERATORS, Operator
from torchops.ops._shape import is_channels_last
from torchops.ops.avg_pool2d import avg_pool2d
from torchops.ops.max_pool2d import max_pool2d


def channel_max_pool(input: Tensor, kernel_size: int, stride: int | None = None) -> Tensor:
    """Largest value of each window of consecutive channels; this project's own layer.

    Args:
        input: [N, C, *] with any further dimensions; f64, f32, bf16 or f16; contiguous or
            channels_last.
        kernel_size: channels in a window.
        stride: from one window to the next; defaults to kernel_size.

    Returns:
        [N, (C - kernel_size) // stride + 1, *] in the input's format. A NaN in a window wins; on
        ties the first.

    Raises:
        TypeError: where kernel_size or stride is not an int.
        ValueError: for fewer than two dimensions, no elements apart from the batch, or a window
            that is empty or larger than C.

    Complexity: reads the input once, writes the output once, and one byte per output for backward
    (Goodfellow et al., "Maxout Networks", 2013, is the case stride = kernel_size).
    """
    return _pool(max_pool2d, "channel_max_pool", input, kernel_size, stride)


def channel_avg_pool(input: Tensor, kernel_size: int, stride: int | None = None) -> Tensor:
    """Mean of each window of consecutive channels; arguments as in `channel_max_pool`.

    Complexity: reads the input once, writes the output once; backward the reverse.
    """
    return _pool(avg_pool2d, "channel_avg_pool", input, kernel_size, stride)


def _pool(
    pool: Callable[..., Tensor], name: str, input: Tensor, kernel_size: int, stride: int | None
) -> Tensor:
    stride = kernel_size if stride is None else stride
    _check(name, input, kernel_size, stride)
    if is_channels_last(input):
        pixels = input.permute(0, 2, 3, 1)
        maps = pixels.reshape(-1, 1, 1, input.shape[1])
        output = pool(maps, (1, kernel_size), (1, stride))
        return output.reshape(*pixels.shape[:3], -1).permute(0, 3, 1, 2)
    batch, channels, *rest = input.shape
    maps = input.reshape(batch, 1, channels, _product(rest))
    output = pool(maps, (kernel_size, 1), (stride, 1))
    return output.reshape(batch, output.shape[2], *rest)


def _product(sizes: list[Any]) -> Any:
    product = 1
    for size in sizes:
        product = product * size
    return product


def _check(name: str, input: Tensor, kernel_size: int, stride: int) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"{name}: expected input to be a Tensor, but got {type(input).__name__}")
    for argument, value in (("kernel_size", kernel_size), ("stride", stride)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(
                f"{name}: expected {argument} to be an int, but got {type(value).__name__}"
            )
        if value < 1:
            raise ValueError(f"{name}: expected {argument} of at least 1, but got {value}")
    if input.dim() < 2:
        raise ValueError(f"{name}: expected input of [N, C, *], but got {input.dim()} dimensions")
    if any(size == 0 for size in input.shape[1:]):
        raise ValueError(
            f"{name}: expected non-zero sizes apart from the batch, but got {tuple(input.shape)}"
        )
    if kernel_size > input.shape[1]:
        raise ValueError(
            f"{name}: kernel_size {kernel_size} is larger than the {input.shape[1]} channels of "
            f"an input of sizes {tuple(input.shape)}"
        )


for _name in ("channel_max_pool", "channel_avg_pool"):
    OPERATORS[_name] = Operator(_name, native=None, own=True)
