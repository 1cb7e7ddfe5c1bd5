"""conv2d_bn_act: a convolution, then batch_norm with its activation and residual."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from torchops.ops._drop_in import drop_in
from torchops.ops.batch_norm import batch_norm, native_batch_norm
from torchops.ops.conv2d import conv2d


def native_conv2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """torch's own composition of what conv2d_bn_act is."""
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return native_batch_norm(
        output, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
        activation=activation, residual=residual,
    )  # fmt: skip


@drop_in(native_conv2d_bn_act)
def conv2d_bn_act(
    input: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """act(batch_norm(conv2d(input, weight)) + residual).

    Args:
        input: [N, C, H, W]; f64, f32, bf16 or f16; contiguous or channels_last.
        weight, bias, stride, padding, dilation, groups: as conv2d takes them.
        bn_weight, bn_bias, running_mean, running_var: [O], for the O channels of the convolution.
        training, momentum, eps, activation: as batch_norm takes them.
        residual: [N, O, H_out, W_out], added before the activation.

    Returns:
        [N, O, H_out, W_out], in the convolution's format.

    Raises:
        What conv2d and batch_norm raise.

    Complexity: conv2d's, then batch_norm's on the convolution's output.
    """
    output = conv2d.__wrapped__(input, weight, bias, stride, padding, dilation, groups)
    return batch_norm.__wrapped__(
        output, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
        activation=activation, residual=residual,
    )  # fmt: skip
