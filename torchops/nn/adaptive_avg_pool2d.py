"""AdaptiveAvgPool1d, 2d and 3d: torch's modules on the kernels of this project."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from torchops.ops.adaptive_avg_pool2d import (
    adaptive_avg_pool1d,
    adaptive_avg_pool2d,
    adaptive_avg_pool3d,
)


class AdaptiveAvgPool1d(nn.AdaptiveAvgPool1d):
    __doc__ = nn.AdaptiveAvgPool1d.__doc__

    def forward(self, input: Tensor) -> Tensor:
        return adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    __doc__ = nn.AdaptiveAvgPool2d.__doc__

    def forward(self, input: Tensor) -> Tensor:
        return adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(nn.AdaptiveAvgPool3d):
    __doc__ = nn.AdaptiveAvgPool3d.__doc__

    def forward(self, input: Tensor) -> Tensor:
        return adaptive_avg_pool3d(input, self.output_size)
