"""conv2d_bn_act: a convolution, then batch_norm with its activation and residual.

In evaluation, where no derivative is asked for, both are one operator: the outputs are normalised
while they are in the cache. Otherwise they are two, each with its own derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchops import _backend, _tuning
from torchops.ops import _batch_norm_rules, _conv2d_rules
from torchops.ops._activation import activation_number
from torchops.ops._autograd import differentiable, kernel, register
from torchops.ops._drop_in import REFUSALS, drop_in, infers
from torchops.ops._shape import pair
from torchops.ops.batch_norm import batch_norm, check_statistics, native_batch_norm
from torchops.ops.conv2d import autocasts, conv2d


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

    Complexity: conv2d's, then batch_norm's on the convolution's output. In evaluation without
    gradients, on a CPU, conv2d's alone: the output is written once, and the residual read once.
    """
    window = (stride, padding, dilation, groups)
    tensors = (running_mean, running_var, bn_weight, bn_bias, residual)
    if not training and eps > 0.0 and _one_pass(input, weight, bias, *window, *tensors):
        number = activation_number(activation)
        check_statistics(running_mean, running_var, bn_weight)
        return _forward(
            input, weight, bias, pair(stride), pair(padding), pair(dilation), groups, *tensors, eps,
            number,
        )  # fmt: skip
    output = conv2d(input, weight, bias, *window)
    return batch_norm(
        output, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps,
        activation=activation, residual=residual,
    )  # fmt: skip


def _one_pass(input, weight, bias, stride, padding, dilation, groups, *tensors) -> bool:
    """Whether the fused operator, which has no derivative, computes what is asked for."""
    if input.dim() != 4 or isinstance(padding, str) or isinstance(groups, bool):
        return False
    if autocasts(input) or differentiable(input, weight, bias, *tensors):
        return False
    window = (stride, padding, dilation, groups)
    return _backend.mode == "own" or not _tuning.prefers_native(
        "conv2d", input, weight, bias, *window
    )


_OPERATORS = ("conv2d", "conv2d_bn_act")


def evaluate(
    input, weight, bias, stride, padding, dilation, groups, mean, var, bn_weight, bn_bias, residual,
    eps, activation,
):  # fmt: skip
    """The fused operator at once, in what inference calls a layer with.

    None where conv2d_bn_act has to look closer.
    """
    usual = (
        infers(_OPERATORS, input, weight, bias, stride, padding, dilation, groups)
        and type(stride) is tuple
        and type(padding) is tuple
        and type(dilation) is tuple
        and type(groups) is int
        and eps > 0.0
        and mean is not None
        and var is not None
        and (bn_weight is None or bn_weight.dtype is mean.dtype)
        and not mean.requires_grad
        and not var.requires_grad
    )
    if not usual:
        return None
    try:
        return _forward(
            input, weight, bias, stride, padding, dilation, groups, mean, var, bn_weight, bn_bias,
            residual, eps, activation_number(activation),
        )  # fmt: skip
    except REFUSALS:
        return None


def _composition(
    input, weight, bias, stride, padding, dilation, groups, mean, var, bn_weight, bn_bias, residual,
    eps, activation,
):  # fmt: skip
    """The fused operator's derivatives and vmap rule are those of its two halves."""
    output = torch.ops.torchops.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return torch.ops.torchops.batch_norm_apply(
        output, mean, var, bn_weight, bn_bias, residual, eps, activation
    )


def _autograd(*args):
    tensors = (arg for arg in args if isinstance(arg, Tensor))
    return _composition(*args) if differentiable(*tensors) else _forward(*args)


def _fake(input, weight, bias, stride, padding, dilation, groups, *rest):
    output = _conv2d_rules.fake_conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _batch_norm_rules.fake_apply(output, *rest)


def _vmap(info, in_dims, *args):
    output, out_dim = _conv2d_rules.vmap_conv2d(info, in_dims[:7], *args[:7])
    return _batch_norm_rules.vmap_apply(info, (out_dim, *in_dims[7:]), output, *args[7:])


_forward = kernel("conv2d_bn_act")
register("conv2d_bn_act", fake=_fake, vmap=_vmap, autograd=_autograd)
