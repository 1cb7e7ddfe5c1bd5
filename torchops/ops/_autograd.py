"""How an operator of torch.ops.torchops becomes differentiable under every transform.

Each operator has one `Function` with `forward`, `setup_context`, `backward` and `tangent` (its
forward-mode derivative). `register` makes it the raw operator's Autograd kernel too, because
torch.compile around torch.func.grad or jvp differentiates the raw operator and would get silent
zeros without one. (torch.library.register_autograd raises there: its generated Function has no
setup_context.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_dynamo_compiling

from torchops._library import REBUILD

BelowAutograd = torch._C._AutoDispatchBelowAutograd
# What calling an operator comes to, 1 us sooner: arguments are converted once, and nobody asks
# them for __torch_function__, which `drop_in` has done.
call_operator = torch._C._dispatch_call_boxed
transforms_active = torch._C._are_functorch_transforms_active


def operator(name: str) -> Any:
    """torch.ops.torchops.<name>.default"""
    if not hasattr(torch.ops.torchops, name):
        raise ImportError(
            f"torchops: the compiled library has no operator {name}; it is older than the Python"
            f" sources. In the source folder run:  {REBUILD}"
        )
    return getattr(torch.ops.torchops, name).default


def kernel(name: str) -> Callable[..., Any]:
    """torch.ops.torchops.<name>, called below autograd: a Function around it differentiates.

    Skipping the operator's Autograd kernel (this Function again) avoids an endless loop, and costs
    8 us less a call. `del` is all that `with` would do.
    """
    op = operator(name)
    handle = op._handle

    def call(*args: Any) -> Any:
        if is_dynamo_compiling():
            return op(*args)
        guard = BelowAutograd()
        try:
            return call_operator(handle, *args)
        finally:
            del guard

    return call


class _Leaf(tuple):
    """A tuple argument that pytree does not look into: functorch's generated vmap rule loses
    count of the tangents where an argument is a nested structure."""


class Function(torch.autograd.Function):
    """Base of all Functions here. Subclasses define `tangent(ctx, *tangents)`, not `jvp`.

    Dynamo refuses a Function that has a `jvp`; eager needs one. So each class gets a twin with
    `jvp`, which `apply` uses: Dynamo does not look at `apply`.
    """

    generate_vmap_rule = True
    tensors = 1  # how many arguments, the first ones, are tensors
    call: Callable[..., Any]  # `apply` where somebody may ask for a derivative, else `forward`
    _apply_transformed: Callable[..., Any]
    _apply_single_level: Callable[..., Any]
    _apply_at_level: Callable[..., Any]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "jvp" not in cls.__dict__:
            members = {"jvp": cls.tangent, "__module__": cls.__module__}
            eager: Any = type(cls.__name__, (cls,), members)
            cls._apply_transformed = super(Function, eager).apply
            cls._apply_single_level = plain_apply(eager)
            cls._apply_at_level = _at_level(cls).apply
            cls.call = staticmethod(_caller(cls))

    @staticmethod
    def tangent(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """torch's own `apply` inside transforms; outside, without its 14 us of signature bind."""
        if transforms_active():
            leaves = [_Leaf(arg) if isinstance(arg, tuple) else arg for arg in args]
            return cls._apply_transformed(*leaves)
        return cls._apply_single_level(*args)

    @classmethod
    def apply_here(cls, *args: Any) -> Any:
        """`apply` at one level of autograd: what the dispatcher's Autograd key asks for.

        Inside transforms, functorch calls that key once per level and itself passes on to the next.
        """
        if transforms_active():
            with enable_single_level_autograd_function():
                return cls._apply_at_level(*args)
        return cls._apply_single_level(*args)


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """ctx.saved_tensors for backward, and for the tangent where that is computed."""
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


def depending(grad_output: Tensor) -> Tensor:
    """`grad_output` for a gradient that is linear in it, under create_graph=True.

    Native's gradient requires grad there, because its operators take what the layer took.
    """
    if not is_grad_enabled() or grad_output.requires_grad or is_dynamo_compiling():
        return grad_output
    if transforms_active() or forward_ad._current_level >= 0:
        return grad_output
    return grad_output.detach().requires_grad_()


def _caller(function: type[Function]) -> Callable[..., Any]:
    """`function.call`: what `differentiable` and `apply` do, in one frame.

    Dynamo finds neither `forward` nor `tensors` through the class.
    """
    apply, forward, others = function.apply, function.forward, slice(1, function.tensors)
    single_level = function._apply_single_level

    def call(*args: Any) -> Any:
        if is_dynamo_compiling():
            return forward(*args)
        if transforms_active() or forward_ad._current_level >= 0:
            return apply(*args)
        if is_grad_enabled():
            if args[0].requires_grad:
                return single_level(*args)
            for tensor in args[others]:
                if tensor is not None and tensor.requires_grad:
                    return single_level(*args)
        return forward(*args)

    return call


def _at_level(function: type[Function]) -> Any:
    """`function` for one level of functorch: since torch 2.14 only such a class applies there."""
    members = {
        "forward": staticmethod(function.forward),
        "setup_context": staticmethod(function.setup_context),
        "backward": staticmethod(function.backward),
        "jvp": staticmethod(function.tangent),
        "__module__": function.__module__,
    }
    return type(function.__name__, (_SingleLevelFunction,), members)


def plain_apply(function: Any) -> Callable[..., Any]:
    """`apply` outside of transforms, without torch's 14 us of signature bind."""
    single_level: Any = super(torch.autograd.Function, function)
    return single_level.apply


def only_backward(tensor: Tensor) -> bool:
    """Whether a derivative may be asked for, and by backward in eager alone."""
    if is_dynamo_compiling() or not (is_grad_enabled() and tensor.requires_grad):
        return False
    return not transforms_active() and forward_ad._current_level < 0


def differentiable(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its Function: somebody may ask for a derivative.

    Under Dynamo never: there the raw operators' Autograd kernels serve, because Dynamo gives silent
    zeros for a Function inside torch.func.grad one of whose arguments requires grad outside of it.
    """
    if is_dynamo_compiling():
        return False
    if is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return transforms_active() or forward_ad._current_level >= 0


_library = torch.library.Library("torchops", "FRAGMENT")


def _leave_untraced(kernel: Any) -> None:
    """Keeps Dynamo out of a kernel that runs while the operator is traced.

    Since torch 2.14 it would look into it, and what asks there whether Dynamo compiles would call
    the operator, and so this kernel, for ever.
    """
    code = getattr(kernel, "__func__", kernel).__code__
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def register(
    name: str,
    *,
    fake: Callable[..., Any],
    vmap: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
    in_place: Callable[..., Any] | None = None,
) -> None:
    """Fake kernel, vmap rule and Autograd kernel (`apply_here`) of torch.ops.torchops.<name>.

    `in_place(keyset, *args)` is the ADInplaceOrView kernel of an operator that writes arguments.
    """
    op = f"torchops::{name}"
    torch.library.register_fake(op, fake)
    torch.library.register_vmap(op, vmap)
    if autograd is not None:
        _leave_untraced(autograd)
        _library.impl(name, autograd, "Autograd")
    if in_place is not None:
        _library.impl(name, in_place, "ADInplaceOrView", with_keyset=True)


def fold_batch(tensor: Tensor, in_dim: int | None, batch_size: int) -> Tensor:
    """[..., vmapped, ...] -> [vmapped * N, ...]; a tensor that is not vmapped is repeated."""
    if in_dim is None:
        tensor = tensor.expand(batch_size, *tensor.shape)
    else:
        tensor = tensor.movedim(in_dim, 0)
    return tensor.flatten(0, 1)


def unfold_batch(tensor: Tensor, batch_size: int) -> Tensor:
    """[vmapped * N, ...] -> [vmapped, N, ...]"""
    return split_axis(tensor, 0, batch_size)


def split_axis(tensor: Tensor, axis: int, batch_size: int) -> Tensor:
    """[..., vmapped * size, ...] -> [..., vmapped, size, ...], of a tensor that nobody else has.

    No view, as unflatten would make it: the output of a Function that is a view cannot be changed
    in place, and networks do that (ReLU(inplace=True)).
    """
    shape = tensor.shape
    size = (*shape[:axis], batch_size, shape[axis] // batch_size, *shape[axis + 1 :])
    return torch.ops.aten._unsafe_view(tensor, size)
