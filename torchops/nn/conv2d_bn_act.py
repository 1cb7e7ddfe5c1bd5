"""ConvBNAct: a convolution, batch-norm and activation as one layer with two children."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor

from torchops.nn.batch_norm import BatchNorm2d
from torchops.nn.conv2d import Conv2d


class ConvBNAct(nn.Module):
    """act(bn(conv(input)) + residual), the block that most CNNs are made of.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups: of the
            convolution, which has no bias: batch-norm would subtract it again.
        activation: what torchops.functional.batch_norm takes; None for none.
        device, dtype: of the parameters.

    The children `conv` (Conv2d) and `bn` (BatchNorm2d) hold the parameters, so that the state_dict
    is that of an nn.Sequential with these names.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        *,
        activation: str | None = "relu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.conv = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.bn = BatchNorm2d(out_channels, activation=activation, device=device, dtype=dtype)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.bn(self.conv(input), residual)
