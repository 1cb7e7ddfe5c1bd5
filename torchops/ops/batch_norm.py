"""batch_norm: wrapper and autograd Functions.

Derivatives beyond the first, and forward mode, are in _batch_norm_derivatives.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from torchops.ops import _batch_norm_derivatives as derivatives
from torchops.ops import _batch_norm_rules as rules
from torchops.ops._activation import ACTIVATIONS, activation_number
from torchops.ops._autograd import (
    Function,
    kernel,
    only_backward,
    operator,
    plain_apply,
    register,
    save,
    transforms_active,
)
from torchops.ops._batch_norm_rules import BIAS, INPUT, RESIDUAL, WEIGHT
from torchops.ops._drop_in import drop_in

_and_update = kernel("batch_norm_and_update")
_update = operator("batch_norm_update")


def native_batch_norm(
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
    """torch's own composition of what batch_norm fuses."""
    activation_number(activation)
    output = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return native_ending(output, activation, residual)


def native_ending(output: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """The residual and the activation by torch's own operators."""
    if residual is not None:
        check_residual(output, residual)
        output = output + residual
    return ACTIVATIONS[activation].native(output)


@drop_in(native_batch_norm)
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
    """act(batch_norm(input) + residual); torch.nn.functional.batch_norm with two more arguments.

    Args:
        input: [N, C] or [N, C, *]; f64, f32, bf16 or f16; contiguous or channels_last.
        running_mean, running_var: [C]. In training they are updated, both or neither may be None;
            in evaluation they are what the input is normalised with.
        weight, bias: [C] or None, in input's dtype, or float32 beside a bf16 or f16 input.
        training: normalise with the mean and (biased) variance of this batch.
        momentum: share of this batch in the new running statistics (their variance is unbiased).
        activation: None, "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "hardswish", "gelu"
            (exact) or "sigmoid".
        residual: added before the activation; shape, dtype and device of input.

    Returns:
        A tensor like input, in its format. Gradients run through the statistics in training.

    Raises:
        ValueError: a single value per channel in training, or an unknown activation.
        RuntimeError: native's own for bad sizes or dtypes; a residual unlike input.

    Complexity: training reads input twice, evaluation once; residual is read once and the output
    written once. Backward reads grad_output and input (and, under an activation, residual) twice,
    and needs nothing else: no mask, no copy. Source: Ioffe and Szegedy, arXiv:1502.03167.
    """
    number = activation_number(activation)
    # Nothing to compute, and torch gives that nothing strides of its own; or torch's own refusal.
    if input.numel() == 0 or eps <= 0.0:
        return native_batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps,
            activation=activation, residual=residual,
        )  # fmt: skip
    _check(input, running_mean, running_var, weight, bias, training, momentum)
    if residual is not None:
        check_residual(input, residual)
    if input.dim() > 4:
        shape = input.shape
        flat = None if residual is None else residual.flatten(2, -2)
        output = _normalize(
            input.flatten(2, -2), running_mean, running_var, weight, bias, training, momentum, eps,
            number, flat,
        )  # fmt: skip
        return output.unflatten(2, shape[2:-1])
    return _normalize(
        input, running_mean, running_var, weight, bias, training, momentum, eps, number, residual
    )


def _check(input, running_mean, running_var, weight, bias, training, momentum) -> None:
    """What the operators cannot see; the text, where a user meets it, is native's (see drop_in)."""
    if momentum is None:
        raise TypeError("batch_norm(): momentum must be a float, not None")
    if isinstance(training, int) and not isinstance(training, bool):
        raise TypeError("batch_norm(): training must be a bool, not an int")
    if weight is not None and bias is not None and weight.dtype is not bias.dtype:
        raise RuntimeError("weight and bias must have the same dtype")
    if running_mean is not None or running_var is not None:
        check_statistics(running_mean, running_var, weight)
    elif not training:
        raise RuntimeError("running_mean must be defined in evaluation mode")
    if not training:
        return
    dtype = input.dtype if running_mean is None else running_mean.dtype
    if dtype is not input.dtype and (dtype is not torch.float32 or input.dtype is torch.float64):
        raise RuntimeError("running_mean must have the dtype of input, or float32")
    if input.numel() == input.shape[1] and all(
        size == 1 for size in (input.shape[0], *input.shape[2:])
    ):
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.shape}"
        )


def check_statistics(running_mean, running_var, weight) -> None:
    if running_mean is None or running_var is None:
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if weight is not None and weight.dtype is not running_mean.dtype:
        raise RuntimeError("weight and running_mean must have the same dtype")
    if running_mean.requires_grad or running_var.requires_grad:
        raise RuntimeError("running_mean and running_var cannot have requires_grad True")


def check_residual(input: Tensor, residual: Tensor) -> None:
    if residual.shape != input.shape:
        raise RuntimeError(
            f"residual should have the shape of input, {tuple(input.shape)}, "
            f"got {tuple(residual.shape)}"
        )
    if residual.dtype is not input.dtype:
        raise RuntimeError(
            f"residual should have the dtype of input, {input.dtype}, got {residual.dtype}"
        )
    if residual.device != input.device:
        raise RuntimeError(
            f"residual should be on the device of input, {input.device}, got {residual.device}"
        )


def _normalize(
    input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual
) -> Tensor:
    if not training:
        return BatchNormApplyFunction.call(
            input, running_mean, running_var, weight, bias, residual, eps, activation
        )
    arguments = (input, weight, bias, residual, eps, activation)
    if running_mean is None:
        return BatchNormFunction.call(*arguments)[0]
    if transforms_active() or is_compiling():
        output, mean, var = BatchNormFunction.call(*arguments)
        count = input.numel() // input.shape[1]
        _update(running_mean, running_var, mean, var, count, momentum)
        return output
    running = (running_mean, running_var, momentum)
    if only_backward(input):
        return train_batch_norm(*arguments, *running)
    return BatchNormAndUpdateFunction.call(*arguments, *running)[0]


def _needed(input: bool, weight: bool, bias: bool, residual: bool) -> int:
    return input * INPUT | weight * WEIGHT | bias * BIAS | residual * RESIDUAL


def _gradients(ctx, grad_output, needs, training):
    """Gradients of input, weight, bias and residual; `needs` says which."""
    input, weight, bias, residual, mean, var = ctx.saved_tensors  # once: see test_checkpoint
    # Without an activation the residual's gradient is grad_output itself.
    wants_residual = needs[3] and ctx.activation != 0
    mask = _needed(needs[0], needs[1], needs[2], wants_residual)
    gradients = BatchNormBackwardFunction.call(
        grad_output, input, mean, var, weight, bias, residual, ctx.eps, training, ctx.activation,
        mask,
    )  # fmt: skip
    wanted = [gradient if mask & 1 << bit else None for bit, gradient in enumerate(gradients)]
    if needs[3] and ctx.activation == 0:
        wanted[3] = grad_output
    return wanted


class BatchNormFunction(Function):
    """Training: (output, mean, var) with the statistics of this batch."""

    tensors = 4
    forward = staticmethod(kernel("batch_norm"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, residual, ctx.eps, ctx.activation = inputs
        _, mean, var = output
        ctx.mark_non_differentiable(mean, var)
        saved = (input, weight, bias, residual if ctx.activation else None, mean, var)
        save(ctx, *saved)

    @staticmethod
    def backward(ctx, grad_output, *_):
        needs = ctx.needs_input_grad[:4]
        return *_gradients(ctx, grad_output, needs, True), None, None

    @staticmethod
    def tangent(ctx, input, weight, bias, residual, *_):
        terms = derivatives.terms(*ctx.saved_tensors, ctx.eps, True, ctx.activation)  # type: ignore[call-arg]
        return derivatives.tangent(terms, input, weight, bias, residual), None, None


class BatchNormAndUpdateFunction(BatchNormFunction):
    """The same, and the running statistics are updated: one operator less, one launch less.

    They are constants to autograd. Graphs get the functional operator and a mutable one instead.
    """

    @staticmethod
    def forward(*args):
        increment_version(args[6:8])  # the running statistics
        return _and_update(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        BatchNormFunction.setup_context(ctx, inputs[:6], output)

    @staticmethod
    def backward(ctx, *grads):
        return *BatchNormFunction.backward(ctx, *grads), None, None, None

    @staticmethod
    def tangent(ctx, *tangents):
        return BatchNormFunction.tangent(ctx, *tangents[:6])


class BatchNormBackwardOnly(torch.autograd.Function):
    """BatchNormAndUpdateFunction where only backward is asked for, and has one output: for three,
    autograd fills gradients of the statistics with zeros. On Granite Rapids, forward and backward
    of `python bench/overhead.py --layer BatchNorm` took 193 us with three, 151 with one."""

    @staticmethod
    def forward(ctx, *args):
        input, weight, bias, residual, ctx.eps, ctx.activation = args[:6]
        output, mean, var = BatchNormAndUpdateFunction.forward(*args)
        residual = residual if ctx.activation else None
        ctx.save_for_backward(input, weight, bias, residual, mean, var)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        gradients = _gradients(ctx, grad_output, ctx.needs_input_grad, True)
        return *gradients, None, None, None, None, None


train_batch_norm = plain_apply(BatchNormBackwardOnly)


class BatchNormApplyFunction(Function):
    """Evaluation: the output for a given mean and var, which are constants to autograd."""

    tensors = 6
    forward = staticmethod(kernel("batch_norm_apply"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, mean, var, weight, bias, residual, ctx.eps, ctx.activation = inputs
        ctx.set_materialize_grads(False)  # tangents that are not given are None
        # Training may update them, in place, before backward asks.
        mean, var = mean.clone(), var.clone()
        saved = (input, weight, bias, residual if ctx.activation else None, mean, var)
        save(ctx, *saved)

    @staticmethod
    def backward(ctx, grad_output):
        if grad_output is None:
            return (None,) * 8
        needs = ctx.needs_input_grad
        input, *others = _gradients(ctx, grad_output, (needs[0], *needs[3:6]), False)
        return input, None, None, *others, None, None

    @staticmethod
    def tangent(ctx, input, mean, var, weight, bias, residual, *_):
        has_tangents = any(t is not None for t in (input, weight, bias, residual))
        if has_tangents and (mean is not None or var is not None):
            raise RuntimeError(
                "batch_norm is not differentiable wrt running_mean and running_var, they cannot "
                "have forward grad defined"
            )
        terms = derivatives.terms(*ctx.saved_tensors, ctx.eps, False, ctx.activation)  # type: ignore[call-arg]
        return derivatives.tangent(terms, input, weight, bias, residual)


class BatchNormBackwardFunction(Function):
    """The gradients that output_mask asks for, the others empty.

    mean and var are constants here: in training its derivatives run through the input that they
    are the statistics of.
    """

    tensors = 7
    forward = staticmethod(kernel("batch_norm_backward"))

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, input, mean, var, weight, bias, residual = inputs[:7]
        ctx.eps, ctx.training, ctx.activation, ctx.mask = inputs[7:]
        unused = [tensor for bit, tensor in enumerate(output) if not ctx.mask & 1 << bit]
        ctx.mark_non_differentiable(*unused)
        saved = (grad_output, input, weight, bias, residual, mean, var)
        save(ctx, *saved)

    @staticmethod
    def backward(ctx, *grads):
        grad_output, *saved = ctx.saved_tensors
        terms = derivatives.terms(*saved, ctx.eps, ctx.training, ctx.activation)  # type: ignore[call-arg]
        wanted = [grad if ctx.mask & 1 << bit else None for bit, grad in enumerate(grads)]
        grad_output, input, weight, bias, residual = derivatives.double_backward(
            terms, grad_output, *wanted
        )
        return grad_output, input, None, None, weight, bias, residual, None, None, None, None

    @staticmethod
    def tangent(ctx, grad_output_tangent, input, mean, var, weight, bias, residual, *_):
        grad_output, *saved = ctx.saved_tensors
        terms = derivatives.terms(*saved, ctx.eps, ctx.training, ctx.activation)  # type: ignore[call-arg]
        tangents = derivatives.backward_tangent(
            terms, grad_output, grad_output_tangent, input, weight, bias, residual
        )
        return tuple(t if ctx.mask & 1 << bit else None for bit, t in enumerate(tangents))


def _update_in_place(keyset, running_mean, running_var, mean, var, count, momentum):
    """Tells autograd that the running statistics change, as ADInplaceOrView kernels do."""
    increment_version([t for t in (running_mean, running_var) if t is not None])
    after = keyset & torch._C._after_ADInplaceOrView_keyset
    return _update.redispatch(after, running_mean, running_var, mean, var, count, momentum)


register("batch_norm", fake=rules.fake_batch_norm, vmap=rules.vmap_batch_norm,
         autograd=BatchNormFunction.apply_here)  # fmt: skip
register("batch_norm_and_update", fake=rules.fake_and_update, vmap=rules.vmap_and_update,
         autograd=BatchNormAndUpdateFunction.apply_here)  # fmt: skip
register("batch_norm_apply", fake=rules.fake_apply, vmap=rules.vmap_apply,
         autograd=BatchNormApplyFunction.apply_here)  # fmt: skip
register("batch_norm_backward", fake=rules.fake_backward, vmap=rules.vmap_backward,
         autograd=BatchNormBackwardFunction.apply_here)  # fmt: skip
register("batch_norm_update", fake=rules.fake_update, vmap=rules.vmap_update,
         in_place=_update_in_place)  # fmt: skip
