"""batch_norm's derivatives in differentiable torch operations: forward mode, and beyond the first.

With x^ the normalised input, s = 1 / sqrt(var + eps) and z = weight x^ + bias + residual, the
derivative of x^ along v is P(v) = s (v - mean(v) - x^ mean(x^ v)), in evaluation s v. P is its own
adjoint, and the derivative of s along v is -s^2 mean(x^ v). All else follows by the product rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchops.ops._activation import BY_NUMBER


@dataclass
class Terms:
    """The forward pass of one call; everything per element is in the arithmetic's dtype."""

    dtypes: tuple[torch.dtype | None, ...]  # of input, weight, bias, residual
    axes: list[int]
    training: bool
    normalized: Tensor
    invstd: Tensor
    weight: Tensor | float
    slope: Tensor
    curvature: Tensor | None

    def column(self, vector: Tensor) -> Tensor:
        """[C] beside [N, C, *]."""
        return _column(vector, self.normalized)

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor.mean(self.axes, keepdim=True)

    def total(self, tensor: Tensor) -> Tensor:
        return tensor.sum(self.axes)

    def project(self, v: Tensor) -> Tensor:
        """P(v): the tangent of the normalised input, and as well the gradient of the input."""
        if self.training:
            v = v - self.mean(v) - self.normalized * self.mean(self.normalized * v)
        return v * self.invstd


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.dtype).view(-1, *(1,) * (like.dim() - 2))


def terms(input, weight, bias, residual, mean, var, eps, training, activation) -> Terms:
    """mean and var count in evaluation only: in training derivatives run through the input."""
    x = input.to(torch.float64 if input.dtype is torch.float64 else torch.float32)
    axes = [0, *range(2, x.dim())]
    if training:
        variance, center = torch.var_mean(x, axes, correction=0, keepdim=True)
    else:
        center, variance = _column(mean, x), _column(var, x)
    invstd = torch.rsqrt(variance + eps)
    normalized = (x - center) * invstd
    scale = 1.0 if weight is None else _column(weight, x)
    z = normalized * scale
    if bias is not None:
        z = z + _column(bias, x)
    if residual is not None:
        z = z + residual
    act = BY_NUMBER[activation]
    dtypes = tuple(None if t is None else t.dtype for t in (input, weight, bias, residual))
    curvature = act.curvature(z) if act.curvature else None
    return Terms(dtypes, axes, training, normalized, invstd, scale, act.slope(z), curvature)


def tangent(t: Terms, input, weight, bias, residual) -> Tensor:
    """The output's tangent for tangents of the arguments, of which any may be None."""
    dtype = t.dtypes[0]
    return (t.slope * _preactivation_tangent(t, input, weight, bias, residual)).to(dtype)


def _preactivation_tangent(t: Terms, input, weight, bias, residual) -> Tensor:
    z = torch.zeros_like(t.normalized)
    if input is not None:
        z = z + t.weight * t.project(input.to(z.dtype))
    if weight is not None:
        z = z + t.normalized * t.column(weight)
    if bias is not None:
        z = z + t.column(bias)
    if residual is not None:
        z = z + residual
    return z


def double_backward(t: Terms, grad_output, input, weight, bias, residual) -> list[Tensor | None]:
    """Gradients of (grad_output, input, weight, bias, residual) for those of backward's outputs.

    Backward is the adjoint of the tangent, so sum(outputs * cotangents) is
    sum(grad_output * slope * z') with z' the tangent of z along the cotangents: that is
    differentiated here.
    """
    g = grad_output.to(t.normalized.dtype)
    z = _preactivation_tangent(t, input, weight, bias, residual)
    h = g * t.slope
    # through z's place in the slope
    through_slope = None if t.curvature is None else g * t.curvature * z
    along = torch.zeros_like(h) if through_slope is None else t.weight * through_slope
    if weight is not None:
        along = along + h * t.column(weight)
    grad_input = t.project(along)
    grad_weight = grad_bias = grad_residual = None
    if input is not None:
        v = input.to(h.dtype)
        projected = t.project(v)
        if t.training:
            grad_input = grad_input + t.weight * _gradient_of_projection(t, h, v, projected)
        if t.dtypes[1] is not None:
            grad_weight = t.total(h * projected)
    if through_slope is not None:
        if t.dtypes[1] is not None:
            through_weight = t.total(through_slope * t.normalized)
            grad_weight = through_weight if grad_weight is None else grad_weight + through_weight
        if t.dtypes[2] is not None:
            grad_bias = t.total(through_slope)
        if t.dtypes[3] is not None:
            grad_residual = through_slope
    gradients = (grad_input, grad_weight, grad_bias, grad_residual)
    cast = [None if g is None else g.to(d) for g, d in zip(gradients, t.dtypes, strict=True)]
    return [(t.slope * z).to(grad_output.dtype), *cast]


def _gradient_of_projection(t: Terms, h: Tensor, v: Tensor, projected: Tensor) -> Tensor:
    """Gradient of sum(h * P(v)) with respect to the input."""
    mean_h, mean_v = t.mean(t.normalized * h), t.mean(t.normalized * v)
    spread = t.mean(h * v) - t.mean(h) * t.mean(v) - mean_h * mean_v
    through_statistics = mean_v * t.project(h) + mean_h * projected
    return -(t.normalized * t.invstd**2 * spread) - t.invstd * through_statistics


def backward_tangent(t: Terms, grad_output, grad_output_tangent, input, weight, bias, residual):
    """Tangents of backward's outputs (grad_input, grad_weight, grad_bias, grad_residual)."""
    g = grad_output.to(t.normalized.dtype)
    h = g * t.slope
    h_tangent = torch.zeros_like(h)
    if grad_output_tangent is not None:
        h_tangent = h_tangent + grad_output_tangent * t.slope
    if t.curvature is not None:
        z = _preactivation_tangent(t, input, weight, bias, residual)
        h_tangent = h_tangent + g * t.curvature * z
    grad_input = t.weight * h_tangent
    if weight is not None:
        grad_input = grad_input + t.column(weight) * h
    grad_input = t.project(grad_input)
    grad_weight = t.total(h_tangent * t.normalized)
    if input is not None:
        v = input.to(h.dtype)
        normalized_tangent = t.project(v)
        grad_weight = grad_weight + t.total(h * normalized_tangent)
        if t.training:
            u = t.weight * h
            mean_v, mean_u = t.mean(t.normalized * v), t.mean(t.normalized * u)
            change = normalized_tangent * mean_u + t.normalized * t.mean(normalized_tangent * u)
            grad_input = grad_input - t.invstd * (mean_v * t.project(u) + change)
    dtype = t.dtypes[0]
    vector = grad_weight.dtype
    return (
        grad_input.to(dtype),
        grad_weight.to(t.dtypes[1] or vector),
        t.total(h_tangent).to(t.dtypes[2] or vector),
        h_tangent.to(dtype),
    )
