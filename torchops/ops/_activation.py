"""The activations that batch_norm and the convolutions can end with: names, numbers, derivatives.

The first two derivatives are written in differentiable torch operations, for derivatives of any
order. Where torch keeps a NaN, so do these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """`native` is torch's function; `curvature` is None where the slope is piecewise constant."""

    native: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor] | None = None


def _where(condition: Tensor, z: Tensor, true: float, false: float) -> Tensor:
    return torch.where(condition, torch.full_like(z, true), torch.full_like(z, false))


def _silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _silu_curvature(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s) * (2 + z * (1 - 2 * s))


def _hardswish_slope(z: Tensor) -> Tensor:
    middle = (2 * z + 3) / 6
    return torch.where(
        z <= -3, torch.zeros_like(z), torch.where(z >= 3, torch.ones_like(z), middle)
    )


def _hardswish_curvature(z: Tensor) -> Tensor:
    return _where((z > -3) & (z < 3), z, 1 / 3, 0)


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2)) + z * _normal_density(z)


def _gelu_curvature(z: Tensor) -> Tensor:
    return (2 - z * z) * _normal_density(z)


def _sigmoid_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


def _sigmoid_curvature(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s) * (1 - 2 * s)


# In the order of csrc/core/activation.h.
ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation(lambda z: z, torch.ones_like),
    "relu": Activation(F.relu, lambda z: _where(z <= 0, z, 0, 1)),
    "relu6": Activation(F.relu6, lambda z: _where((z <= 0) | (z >= 6), z, 0, 1)),
    "leaky_relu": Activation(F.leaky_relu, lambda z: _where(z > 0, z, 1, 0.01)),
    "silu": Activation(F.silu, _silu_slope, _silu_curvature),
    "hardswish": Activation(F.hardswish, _hardswish_slope, _hardswish_curvature),
    "gelu": Activation(F.gelu, _gelu_slope, _gelu_curvature),
    "sigmoid": Activation(torch.sigmoid, _sigmoid_slope, _sigmoid_curvature),
}
BY_NUMBER = tuple(ACTIVATIONS.values())
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def activation_number(activation: str | None) -> int:
    """The operators' int for a name. ValueError, listing the names, for any other."""
    try:
        return _NUMBERS[activation]
    except (KeyError, TypeError):
        allowed = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation should be one of {allowed}, got {activation!r}") from None
