"""The peer: what a user of torch writes today for each op of torchops.functional.

An op that torch has under the same name is torch's own. The ops below are the compositions that
torchvision's networks use, in place wherever those are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_IN_PLACE = {
    None: lambda input: input,
    "relu": F.relu_,
    "relu6": lambda input: F.relu6(input, inplace=True),
    "leaky_relu": F.leaky_relu_,
    "silu": lambda input: F.silu(input, inplace=True),
    "hardswish": lambda input: F.hardswish(input, inplace=True),
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid_,
}


def __getattr__(name: str) -> Any:
    return getattr(F, name)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        output += residual
    return _IN_PLACE[activation](output)


def conv1x1(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int | tuple[int, int] = 1
) -> Tensor:
    return F.conv2d(input, weight, bias, stride)


def conv2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bn_weight: Tensor,
    bn_bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    bias: Tensor | None = None,
    stride: tuple[int, ...] = (1, 1),
    padding: tuple[int, ...] = (0, 0),
    dilation: tuple[int, ...] = (1, 1),
    groups: int = 1,
    training: bool = False,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    between = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return batch_norm(
        between,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        training,
        activation=activation,
        residual=residual,
    )


def channel_max_pool(input: Tensor, kernel_size: int, stride: int | None = None) -> Tensor:
    return _over_channels(F.max_pool2d, input, kernel_size, stride)


def channel_avg_pool(input: Tensor, kernel_size: int, stride: int | None = None) -> Tensor:
    return _over_channels(F.avg_pool2d, input, kernel_size, stride)


def _over_channels(pool: Any, input: Tensor, kernel_size: int, stride: int | None) -> Tensor:
    """Channels stand as the rows of a picture whose columns are all pixels."""
    picture = input.reshape(input.shape[0], 1, input.shape[1], -1)
    pooled = pool(picture, (kernel_size, 1), (stride or kernel_size, 1))
    return pooled.reshape(input.shape[0], -1, *input.shape[2:])
