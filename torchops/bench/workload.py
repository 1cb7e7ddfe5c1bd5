"""Tensors for a problem, and the calls that are timed on them.

A Library is anything that has the functions of torchops.functional: torchops.functional itself, or
torchops.bench.native.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchops.bench.problem import ADAPTIVE_POOLS, CHANNEL_POOLS, CONVS, POOLS, Problem

Forward = Callable[..., Tensor]

LAYOUTS = ("contiguous", "channels_last")


@dataclass(frozen=True)
class Setting:
    """How a problem is run."""

    dtype: torch.dtype
    layout: str = "contiguous"
    device: str = "cpu"


def memory_format(layout: str, rank: int) -> torch.memory_format:
    """The format that `layout` names for tensors of `rank` dimensions."""
    if layout == "contiguous":
        return torch.contiguous_format
    return {4: torch.channels_last, 5: torch.channels_last_3d}[rank]


def has_layout(problem: Problem, layout: str) -> bool:
    """Whether the problem's tensors can have `layout`: channels_last needs two or three sizes."""
    return layout == "contiguous" or len(problem.input_size) in (2, 3)


def forward(library: Any, problem: Problem) -> Forward:
    """The op of `library` with the problem's constants filled in; takes the tensors by name."""
    function = getattr(library, problem.op)
    p = problem
    if p.op == "conv2d_bn_act":
        return lambda **tensors: function(
            **tensors,
            stride=p.stride,
            padding=p.padding,
            dilation=p.dilation,
            groups=p.groups,
            training=p.training,
            activation=p.activation,
        )
    if p.op == "conv1x1":
        return lambda input, weight, bias=None: function(input, weight, bias, p.stride)
    if p.op in CONVS:
        return lambda input, weight, bias=None: function(
            input, weight, bias, p.stride, p.padding, p.dilation, p.groups
        )
    if p.op == "batch_norm":
        # activation and residual are left out where there are none: torch's own has no such names.
        fused = {"activation": p.activation} if p.activation else {}
        return lambda input, running_mean, running_var, weight, bias, **residual: function(
            input, running_mean, running_var, weight, bias, p.training, **fused, **residual
        )
    if p.op in ADAPTIVE_POOLS:
        return lambda input: function(input, p.adaptive_size)
    if p.op in CHANNEL_POOLS:
        return lambda input: function(input, p.kernel_size[0], p.stride[0])
    assert p.op in POOLS
    if p.op.startswith("max"):
        return lambda input: function(
            input, p.kernel_size, p.stride, p.padding, p.dilation, p.ceil_mode
        )
    return lambda input: function(
        input, p.kernel_size, p.stride, p.padding, p.ceil_mode, p.count_include_pad
    )


class Workload:
    """The tensors of one call: `tensors` by argument name, and `grad_output`.

    `differentiable` names those that training computes a gradient for.

    Values are normal, and the same for the same problem and setting. Parameters of a batch_norm and
    its running statistics are float32 beside half-precision storage, as autocast has them.
    """

    def __init__(self, problem: Problem, setting: Setting) -> None:
        self._generator = torch.Generator(setting.device).manual_seed(0)
        self._setting = setting
        self.tensors: dict[str, Tensor] = {"input": self._normal(problem.input_shape)}
        if problem.op in CONVS:
            # Scaled so that the output has the input's magnitude, as trained weights do.
            scale = math.prod(problem.weight_shape[1:]) ** -0.5
            self.tensors["weight"] = self._normal(problem.weight_shape, scale)
        if problem.bias:
            self.tensors["bias"] = self._normal((problem.out_channels,))
        if problem.op in ("batch_norm", "conv2d_bn_act"):
            self._add_batch_norm(problem)
        self.grad_output = self._normal(problem.output_shape)
        self.differentiable = _differentiable(problem)
        for name in self.differentiable:
            self.tensors[name].requires_grad_()

    def copy(self) -> Workload:
        """The same values in memory of their own."""
        twin = copy(self)
        twin.grad_output = self.grad_output.clone()
        twin.tensors = {
            name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
            for name, tensor in self.tensors.items()
        }
        return twin

    def _normal(self, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        device, layout = self._setting.device, self._setting.layout
        values = torch.randn(shape, generator=self._generator, device=device).mul_(scale)
        values = values.to(self._setting.dtype)
        if len(shape) < 4:
            return values
        return values.contiguous(memory_format=memory_format(layout, len(shape)))

    def _add_batch_norm(self, problem: Problem) -> None:
        double = self._setting.dtype == torch.float64
        prefix = "bn_" if problem.op == "conv2d_bn_act" else ""
        for name in ("running_mean", "running_var", prefix + "weight", prefix + "bias"):
            values = self._normal((problem.channels,)).to(
                torch.float64 if double else torch.float32
            )
            positive = name in ("running_var", prefix + "weight")
            self.tensors[name] = values.abs_().add_(0.5) if positive else values
        if problem.residual:
            self.tensors["residual"] = self._normal(problem.output_shape)


def _differentiable(problem: Problem) -> list[str]:
    """Names of the tensors that training computes a gradient for."""
    names = [] if problem.first else ["input"]
    if problem.op in CONVS:
        names.append("weight")
    if problem.bias:
        names.append("bias")
    if problem.op in ("batch_norm", "conv2d_bn_act"):
        prefix = "bn_" if problem.op == "conv2d_bn_act" else ""
        names += [prefix + "weight", prefix + "bias"]
    return (names + ["residual"] * problem.residual) if problem.training else []
