"""ChannelMaxPool and ChannelAvgPool: pooling across channels as layers."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from torchops.ops.channel_pool import channel_avg_pool, channel_max_pool


class _ChannelPool(nn.Module):
    def __init__(self, kernel_size: int, stride: int | None = None) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = kernel_size if stride is None else stride

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}"


class ChannelMaxPool(_ChannelPool):
    """Largest value of each window of consecutive channels: [N, C, *] -> [N, C_out, *].

    C_out = (C - kernel_size) // stride + 1; stride defaults to kernel_size. Arguments, errors and
    formats as in torchops.functional.channel_max_pool.
    """

    def forward(self, input: Tensor) -> Tensor:
        return channel_max_pool(input, self.kernel_size, self.stride)


class ChannelAvgPool(_ChannelPool):
    """Mean of each window of consecutive channels: [N, C, *] -> [N, C_out, *].

    C_out = (C - kernel_size) // stride + 1; stride defaults to kernel_size. Arguments, errors and
    formats as in torchops.functional.channel_avg_pool.
    """

    def forward(self, input: Tensor) -> Tensor:
        return channel_avg_pool(input, self.kernel_size, self.stride)
