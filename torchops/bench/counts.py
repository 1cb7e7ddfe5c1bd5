"""The fewest bytes and the operations of one call: the floor that a kernel is held against.

Bytes count every tensor that must be read or written once, at the storage width of the dtype. What
is not counted can be kept on chip: the second reading of a batch-norm's input, a conv's windows.

- conv backward is two operators, grad_input and grad_weight, and each reads grad_output.
- max pooling keeps one byte per output for its backward, the winner's offset in the window.
- batch_norm backward reads the input and grad_output and writes grad_input; the activation's
  gradient is recomputed from the input, and only act(bn(x) + residual) needs more: one bit per
  element where the activation is piecewise linear, the residual otherwise. Without an activation
  the residual's gradient is grad_output itself and costs nothing.
- statistics and affine parameters of a batch_norm are float32 whatever the storage, except float64.

FLOPs of a conv are two per multiply-add, as torch's FlopCounterMode counts them. For the other ops
they are the additions, multiplications and comparisons of the formula; bytes bound those anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from torchops.bench.problem import ADAPTIVE_POOLS, CHANNEL_POOLS, CONVS, Problem

DIRECTIONS = ("fwd", "bwd")

_ONE_BIT = ("relu", "relu6", "leaky_relu")


@dataclass(frozen=True)
class Counts:
    """The floor of one call."""

    bytes: int
    flops: int

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The shortest time on a machine with these two limits."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)

    def bandwidth_bound(self, bytes_per_second: float, flops_per_second: float) -> bool:
        """Whether bytes, not operations, set that time."""
        return self.bytes * flops_per_second >= self.flops * bytes_per_second


def count(problem: Problem, dtype: torch.dtype, direction: str) -> Counts:
    """Bytes and FLOPs of `problem` in `direction`, "fwd" or "bwd"."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if problem.op == "conv2d_bn_act":
        return _conv_bn_act(problem, dtype, direction)
    kind = _conv if problem.op in CONVS else _batch_norm
    if problem.op not in CONVS and problem.op != "batch_norm":
        kind = _pool
    return kind(problem, dtype, direction)


def _conv(problem: Problem, dtype: torch.dtype, direction: str) -> Counts:
    input, output = math.prod(problem.input_shape), math.prod(problem.output_shape)
    weight = math.prod(problem.weight_shape)
    bias = problem.out_channels if problem.bias else 0
    flops = 2 * output * weight // problem.out_channels
    if direction == "fwd":
        return Counts((input + weight + bias + output) * dtype.itemsize, flops)
    grad_weight = Counts((input + output + weight + bias) * dtype.itemsize, flops)
    if problem.first:
        return grad_weight
    grad_input = (output + weight + input) * dtype.itemsize
    return Counts(grad_weight.bytes + grad_input, 2 * flops)


def _pool(problem: Problem, dtype: torch.dtype, direction: str) -> Counts:
    input, output = math.prod(problem.input_shape), math.prod(problem.output_shape)
    maximum = "max" in problem.op
    offsets = output if maximum and problem.training else 0
    # A maximum sends its gradient to one element; an average spreads it over every tap.
    taps = output if maximum and direction == "bwd" else _taps(problem)
    return Counts((input + output) * dtype.itemsize + offsets, taps)


def _taps(problem: Problem) -> int:
    """How many elements all windows of a pool hold together, padding included."""
    outer = problem.batch * problem.channels
    if problem.op in CHANNEL_POOLS:
        return outer * math.prod(problem.output_size) * problem.kernel_size[0]
    if problem.op in ADAPTIVE_POOLS:
        pairs = zip(problem.input_size, problem.output_size, strict=True)
        return outer * math.prod(_adaptive_taps(size, count) for size, count in pairs)
    return outer * math.prod(problem.output_size) * math.prod(problem.kernel_size)


def _adaptive_taps(size: int, count: int) -> int:
    """Elements in the windows floor(i * size / count) to ceil((i + 1) * size / count)."""
    return sum(-(-(i + 1) * size // count) - i * size // count for i in range(count))


def _batch_norm(problem: Problem, dtype: torch.dtype, direction: str) -> Counts:
    elements = math.prod(problem.input_shape)
    statistics = problem.in_channels * (8 if dtype == torch.float64 else 4)
    extra = bool(problem.activation) + problem.residual
    mask = _saved_for_activation(problem, dtype)
    if direction == "fwd":
        passes = 2 + problem.residual
        # Weight, bias; running mean and variance read, and in training written, with what is saved.
        small = statistics * (8 if problem.training else 4)
        flops = (5 if problem.training else 2) + extra
        saved = mask if problem.training and problem.activation in _ONE_BIT else 0
        return Counts(passes * elements * dtype.itemsize + saved + small, flops * elements)
    passes = 3 + (problem.residual and problem.activation is not None)
    # Weight, bias, saved mean and inverse deviation read, two gradients written.
    return Counts(
        passes * elements * dtype.itemsize + mask + 6 * statistics, (9 + extra) * elements
    )


def _saved_for_activation(problem: Problem, dtype: torch.dtype) -> int:
    """Bytes that the activation's gradient reads beside the batch_norm's input."""
    if not problem.residual or problem.activation is None:
        return 0
    elements = math.prod(problem.input_shape)
    return -(-elements // 8) if problem.activation in _ONE_BIT else elements * dtype.itemsize


def _conv_bn_act(problem: Problem, dtype: torch.dtype, direction: str) -> Counts:
    """The conv, then the batch_norm over its output; in evaluation the two are one pass."""
    conv = _conv(problem, dtype, direction)
    between = replace(
        problem,
        op="batch_norm",
        in_channels=problem.out_channels,
        input_size=problem.output_size,
        groups=1,
        bias=False,
    )
    norm = _batch_norm(between, dtype, direction)
    fused = 2 * math.prod(problem.output_shape) * dtype.itemsize if not problem.training else 0
    return Counts(conv.bytes + norm.bytes - fused, conv.flops + norm.flops)
