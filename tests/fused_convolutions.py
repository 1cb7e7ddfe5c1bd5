"""Calls of conv2d_bn_act in evaluation: one for each way that a convolution stores its outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from cases import with_format


@dataclass(frozen=True)
class Call:
    input: tuple[int, ...]
    weight: tuple[int, ...]
    activation: str | None = None
    residual: bool = False
    bias: bool = False
    window: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = "_".join("x".join(map(str, shape)) for shape in (self.input, self.weight))
        window = "-".join(f"{name}={value}" for name, value in self.window.items())
        return f"{shapes}-{window}-{self.activation}{'-residual' * self.residual}"

    def arguments(self, dtype, memory_format, images=1):
        """Positional and named arguments; the same values in every dtype, up to rounding."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        input = draw(images * self.input[0], *self.input[1:])
        weight, channels = draw(*self.weight), self.weight[0]
        output = F.conv2d(input, weight, **self.window)
        tensors = {
            "bias": draw(channels) if self.bias else None,
            "residual": draw(*output.shape) if self.residual else None,
        }
        statistics = output.mean((0, 2, 3)) + draw(channels), draw(channels).abs() + 0.5
        given = (input, weight, 1 + draw(channels) / 4, draw(channels), *statistics)
        given = [with_format(t.to(dtype), memory_format) for t in given]
        named = {
            name: None if t is None else with_format(t.to(dtype), memory_format)
            for name, t in tensors.items()
        }
        return given, {**named, **self.window, "activation": self.activation}


def call(input, weight, activation=None, residual=False, bias=False, **window):
    return Call(input, weight, activation, residual, bias, window)


CALLS = [
    call((2, 33, 19, 9), (40, 33, 1, 1), "relu6"),
    call((2, 300, 7, 7), (200, 300, 1, 1), "relu", residual=True),
    call((2, 9, 7, 7), (20, 9, 1, 1), stride=2),
    call((2, 20, 19, 17), (133, 20, 3, 3), "relu", residual=True, padding=1),
    call((3, 40, 14, 13), (72, 40, 3, 3), "relu", residual=True, stride=2, padding=1),
    call((2, 5, 17, 19), (7, 5, 3, 3), "leaky_relu", bias=True, stride=2, padding=1),
    call((2, 90, 14, 14), (140, 90, 3, 3), "relu", stride=2, padding=1),
    call((2, 256, 9, 9), (130, 256, 3, 3), "relu", residual=True, bias=True, stride=2, padding=1),
    call((1, 3, 33, 40), (16, 3, 7, 7), "silu", stride=2, padding=3),
    call((1, 6, 9, 300), (9, 6, 3, 3), "relu", residual=True, bias=True, dilation=2),
    call((2, 19, 19, 17), (19, 1, 3, 3), "relu6", padding=1, groups=19),
    call((2, 40, 19, 19), (40, 1, 5, 5), "hardswish", stride=2, padding=2, groups=40),
    call((2, 72, 7, 7), (72, 1, 3, 3), None, residual=True, padding=1, groups=72),
    call((2, 6, 9, 9), (12, 1, 3, 3), "gelu", padding=1, groups=6),
    call((2, 24, 9, 11), (30, 4, 3, 3), "sigmoid", residual=True, padding=1, groups=6),
    call((1, 300, 5, 5), (300, 150, 3, 3), "relu", padding=1, groups=2),
    call((2, 5, 1, 1), (3, 5, 3, 3), "relu", padding=1),
    call((2, 5, 9, 9), (1, 5, 3, 3), "relu"),
    call((0, 3, 8, 8), (4, 3, 3, 3)),
]

SMALL = [
    call((2, 2, 4, 3), (3, 2, 2, 2), "silu", residual=True, stride=1),
    call((2, 2, 4, 3), (2, 1, 2, 2), bias=True, groups=2, padding=1),
]
