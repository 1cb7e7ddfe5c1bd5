"""AvgPool1d, 2d and 3d: torch's modules on the kernels of this project."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from torchops.ops._drop_in import REFUSALS, trains
from torchops.ops.avg_pool2d import (
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    avg_pool_numbers,
    train_avg_pool2d,
)


class AvgPool1d(nn.AvgPool1d):
    __doc__ = nn.AvgPool1d.__doc__

    def forward(self, input: Tensor) -> Tensor:
        return avg_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode,
            self.count_include_pad,
        )  # fmt: skip


class AvgPool2d(nn.AvgPool2d):
    __doc__ = nn.AvgPool2d.__doc__

    def forward(self, input: Tensor) -> Tensor:
        if trains("avg_pool2d", input):
            try:
                return train_avg_pool2d(input, avg_pool_numbers(
                    self.kernel_size, self.stride, self.padding, self.ceil_mode,
                    self.count_include_pad, self.divisor_override,
                ))  # fmt: skip
            except REFUSALS:
                pass  # avg_pool2d has native's words for it
        return avg_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode,
            self.count_include_pad, self.divisor_override,
        )  # fmt: skip


class AvgPool3d(nn.AvgPool3d):
    __doc__ = nn.AvgPool3d.__doc__

    def forward(self, input: Tensor) -> Tensor:
        return avg_pool3d(
            input, self.kernel_size, self.stride, self.padding, self.ceil_mode,
            self.count_include_pad, self.divisor_override,
        )  # fmt: skip
