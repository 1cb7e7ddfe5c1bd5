"""ConvBNAct: a convolution, batch-norm and activation as one layer with two children."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from torchops.nn.batch_norm import BatchNorm2d
from torchops.nn.conv2d import Conv1x1, Conv2d
from torchops.ops.conv2d_bn_act import conv2d_bn_act, evaluate

CONVOLUTIONS = (Conv2d, Conv1x1)


def watched(*modules: nn.Module) -> bool:
    """Whether somebody follows the calls of one of them: it must then get a call of its own."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return bool(_has_any_global_hook())


def in_one_call(conv: Any, batch_norm: Any, input: Any) -> bool:
    """Whether `convolve_normalize` does what these two layers, of whatever kind, would do."""
    return (
        type(conv) in CONVOLUTIONS
        and type(batch_norm) is BatchNorm2d
        and not batch_norm.training
        and batch_norm._buffers.get("running_mean") is not None
        and conv.padding_mode == "zeros"
        and isinstance(input, Tensor)
        and input.dim() == 4
        and not watched(conv, batch_norm)
    )


def convolve_normalize(
    conv: Any,
    batch_norm: Any,
    input: Tensor,
    activation: str | None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(batch_norm(conv(input)) + residual) in evaluation."""
    try:  # sooner than through nn.Module.__getattr__
        parameters, weight_bias, buffers = (
            conv._parameters, batch_norm._parameters, batch_norm._buffers,
        )  # fmt: skip
        weight, bias = parameters["weight"], parameters["bias"]
        bn_weight, bn_bias = weight_bias["weight"], weight_bias["bias"]
        mean, var = buffers["running_mean"], buffers["running_var"]
    except KeyError:  # kept elsewhere, as by torch.distributed.fsdp
        weight, bias = conv.weight, conv.bias
        bn_weight, bn_bias = batch_norm.weight, batch_norm.bias
        mean, var = batch_norm.running_mean, batch_norm.running_var
    window = conv.stride, conv.padding, conv.dilation, conv.groups
    output = evaluate(
        input, weight, bias, *window, mean, var, bn_weight, bn_bias, residual, batch_norm.eps,
        activation,
    )  # fmt: skip
    if output is not None:
        return output
    stride, padding, dilation, groups = window
    return conv2d_bn_act(
        input, weight, bn_weight, bn_bias, mean, var, bias=bias, stride=stride, padding=padding,
        dilation=dilation, groups=groups, eps=batch_norm.eps, activation=activation,
        residual=residual,
    )  # fmt: skip


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
        if in_one_call(self.conv, self.bn, input):
            return convolve_normalize(self.conv, self.bn, input, self.bn.activation, residual)
        return self.bn(self.conv(input), residual)
