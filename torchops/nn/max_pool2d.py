"""MaxPool1d, 2d and 3d: torch's modules on the kernels of this project."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from torchops.ops._drop_in import REFUSALS, trains
from torchops.ops.max_pool2d import (
    max_pool1d,
    max_pool2d,
    max_pool3d,
    max_pool_numbers,
    train_max_pool2d,
)


class MaxPool1d(nn.MaxPool1d):
    __doc__ = nn.MaxPool1d.__doc__

    def forward(self, input: Tensor):
        return max_pool1d(
            input, self.kernel_size, self.stride, self.padding, self.dilation,
            self.ceil_mode, self.return_indices,
        )  # fmt: skip


class MaxPool2d(nn.MaxPool2d):
    __doc__ = nn.MaxPool2d.__doc__

    def forward(self, input: Tensor):
        if not self.return_indices and trains("max_pool2d", input):
            try:
                return train_max_pool2d(input, max_pool_numbers(
                    self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
                ))  # fmt: skip
            except REFUSALS:
                pass  # max_pool2d has native's words for it
        return max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation,
            self.ceil_mode, self.return_indices,
        )  # fmt: skip


class MaxPool3d(nn.MaxPool3d):
    __doc__ = nn.MaxPool3d.__doc__

    def forward(self, input: Tensor):
        return max_pool3d(
            input, self.kernel_size, self.stride, self.padding, self.dilation,
            self.ceil_mode, self.return_indices,
        )  # fmt: skip
