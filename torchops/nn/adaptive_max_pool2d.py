"""AdaptiveMaxPool1d, 2d and 3d: torch's modules on the kernels of this project."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from torchops.ops._drop_in import REFUSALS, trains
from torchops.ops._shape import adaptive_size
from torchops.ops.adaptive_max_pool2d import (
    adaptive_max_pool1d,
    adaptive_max_pool2d,
    adaptive_max_pool3d,
    train_adaptive_max_pool2d,
)


class AdaptiveMaxPool1d(nn.AdaptiveMaxPool1d):
    __doc__ = nn.AdaptiveMaxPool1d.__doc__

    def forward(self, input: Tensor):
        return adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(nn.AdaptiveMaxPool2d):
    __doc__ = nn.AdaptiveMaxPool2d.__doc__

    def forward(self, input: Tensor):
        if not self.return_indices and trains("adaptive_max_pool2d", input):
            try:
                return train_adaptive_max_pool2d(input, adaptive_size(self.output_size, input))
            except REFUSALS:
                pass  # adaptive_max_pool2d has native's words for it
        return adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(nn.AdaptiveMaxPool3d):
    __doc__ = nn.AdaptiveMaxPool3d.__doc__

    def forward(self, input: Tensor):
        return adaptive_max_pool3d(input, self.output_size, self.return_indices)
