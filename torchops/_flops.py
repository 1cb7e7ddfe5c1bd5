"""The convolutions' formulas for torch.utils.flop_counter, which counts no operator without one."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import conv_flop_count, register_flop_formula


def _transposed(shape: Any) -> list[int]:
    return [shape[1], shape[0], *shape[2:]]


@register_flop_formula([torch.ops.torchops.conv2d, torch.ops.torchops.conv2d_bn_act])
def _conv2d(input: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv_flop_count(input, weight, out_shape)


@register_flop_formula(torch.ops.torchops.conv2d_grad_input)
def _conv2d_grad_input(grad_output: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any):
    return conv_flop_count(grad_output, weight, out_shape, transposed=True)


@register_flop_formula(torch.ops.torchops.conv2d_grad_weight)
def _conv2d_grad_weight(input: Any, grad_output: Any, *_: Any, out_shape: Any = None, **__: Any):
    """As torch counts it: the groups of a convolution make its gradient no cheaper."""
    return conv_flop_count(_transposed(input), _transposed(grad_output), _transposed(out_shape))
