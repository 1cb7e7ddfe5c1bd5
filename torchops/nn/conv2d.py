"""Conv1d, Conv2d, Conv3d, their lazy forms and Conv1x1: torch's modules on our kernels."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from torchops.ops.conv2d import conv1d, conv2d, conv3d


def _pad(module: nn.modules.conv._ConvNd, input: Tensor) -> Tensor:
    return F.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode)


class Conv1d(nn.Conv1d):
    __doc__ = nn.Conv1d.__doc__

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = _pad(self, input), 0
        return conv1d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv2d(nn.Conv2d):
    __doc__ = nn.Conv2d.__doc__

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = _pad(self, input), 0
        return conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv3d(nn.Conv3d):
    __doc__ = nn.Conv3d.__doc__

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = _pad(self, input), 0
        return conv3d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class Conv1x1(Conv2d):
    """The pointwise convolution, a Conv2d with a window of 1 x 1.

    Args:
        in_channels, out_channels: channels of the [N, C, H, W] input and output.
        stride: int or pair.
        bias: whether to learn one value per output channel.
        device, dtype: of the parameters.

    The state_dict has the keys and shapes of Conv2d(in_channels, out_channels, 1): "weight"
    [out_channels, in_channels, 1, 1] and "bias" [out_channels].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: Any = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, 1, stride=stride, bias=bias, device=device, dtype=dtype
        )


class LazyConv1d(nn.LazyConv1d):
    __doc__ = nn.LazyConv1d.__doc__
    cls_to_become = Conv1d


class LazyConv2d(nn.LazyConv2d):
    __doc__ = nn.LazyConv2d.__doc__
    cls_to_become = Conv2d


class LazyConv3d(nn.LazyConv3d):
    __doc__ = nn.LazyConv3d.__doc__
    cls_to_become = Conv3d
