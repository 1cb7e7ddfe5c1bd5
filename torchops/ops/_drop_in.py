"""What every public function shares: torch's contract around a kernel of our own.

`@drop_in(native)` makes a function a drop-in for `native`: it hands over what no kernel covers,
lets tensor subclasses and torch.fx override it, and raises native's own exceptions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from torchops import _backend, _cuda, _tuning
from torchops.ops._autograd import transforms_active

_is_tracing = torch._C._is_tracing
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError)

KERNEL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Operator:
    """A public function: its native twin and whether kernels of this project compute it."""

    name: str
    native: Callable[..., Any] | None
    own: bool


OPERATORS: dict[str, Operator] = {}


def uncovered(input: Tensor) -> str | None:
    """Why no kernel here takes this tensor, or None."""
    if input.dtype not in KERNEL_DTYPES:
        return str(input.dtype)
    if not (input.is_cpu or input.is_cuda or input.is_meta):
        return f"device {input.device.type}"
    if input.layout is not torch.strided or input.is_nested:
        return "a nested tensor" if input.is_nested else str(input.layout)
    return None


def trains(operator: str, input: Any) -> bool:
    """Whether a layer may go straight to the Function that backward alone needs, 3 us sooner.

    So goes its commonest call: on a plain CPU tensor, in eager, with nobody listening in. What is
    refused there goes to the operator's function all the same, which has native's words for it.
    """
    return (
        _plain(input)
        and is_grad_enabled()
        and input.requires_grad
        and (_backend.mode == "own" or (_backend.mode == "auto" and operator not in _tuning.DEBTS))
    )


def infers(operators: tuple[str, ...], *args: Any) -> bool:
    """Whether a layer in evaluation may go straight to its kernel, as `trains` to its Function.

    `args` are those that the tuning table is asked with for each of the operators.
    """
    return (
        _plain(args[0])
        and not is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and (
            _backend.mode == "own"
            or (
                _backend.mode == "auto"
                and not any([_tuning.prefers_native(name, *args) for name in operators])
            )
        )
    )


def _plain(input: Any) -> bool:
    return (
        type(input) is Tensor
        and not is_dynamo_compiling()
        and input.is_cpu
        and not transforms_active()
        and forward_ad._current_level < 0
        and not _is_tracing()
        and not has_torch_function_unary(input)  # a mode
    )


def refuse_forward_mode() -> None:
    """torch.compile around torch.func.jvp would give silent zeros; a graph break is right."""
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "torchops: forward-mode differentiation inside torch.compile is not supported; "
            "call torch.func.jvp outside the compiled function"
        )


def drop_in(native: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorates our function of the same signature as `native`."""

    def decorate(own: Callable[..., Any]) -> Any:
        name = own.__name__
        OPERATORS[name] = Operator(name, native, own=True)

        @functools.wraps(own)
        def call(*args: Any, **kwargs: Any) -> Any:
            input = args[0] if args else kwargs.get("input")
            given = (*args, *kwargs.values())
            if has_torch_function_variadic(*given):
                return handle_torch_function(call, given, *args, **kwargs)
            if not isinstance(input, Tensor):
                return native(*args, **kwargs)
            mode = _backend.mode
            if mode == "native":
                return native(*args, **kwargs)
            # A sparse or nested tensor is refused below, and settled.
            if not (input.is_cpu and input.dtype in KERNEL_DTYPES):
                reason = uncovered(input)
                if input.is_cuda and reason is None:
                    reason = _cuda.missing(name, args, kwargs)
                if reason is not None:
                    _backend.warn_fallback(name, reason)
                    return native(*args, **kwargs)
            if mode == "auto" and _tuning.prefers_native(name, *args, **kwargs):
                return native(*args, **kwargs)
            if is_dynamo_compiling():
                refuse_forward_mode()
                return own(*args, **kwargs)
            try:
                if _is_tracing():
                    # torch.jit.trace can save operators, which have derivatives, but no Functions.
                    with torch.no_grad():
                        return own(*args, **kwargs)
                return own(*args, **kwargs)
            except REFUSALS as error:
                return settle(name, native, args, kwargs, error)

        return call

    return decorate


def settle(name: str, native: Callable[..., Any], args: Any, kwargs: Any, error: Exception) -> Any:
    """What becomes of a call that ours refused: native's own exception where it refuses, too.

    Where it does not, a layout that no kernel takes, or a tensor subclass that knows torch's
    operators but not ours (DTensor, a quantised weight), gets native's result. For plain tensors
    the `error` is ours: mode "own" raises it, and "auto" never breaks a model that ran before.
    """
    try:
        result = native(*args, **kwargs)
    except Exception as native_error:
        raise native_error from None
    reason = uncovered(args[0] if args else kwargs["input"])
    if reason is not None:
        _backend.warn_fallback(name, reason, 4)
        return result
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, Tensor) and type(argument) not in (Tensor, torch.nn.Parameter):
            _backend.warn_fallback(name, f"tensors of class {type(argument).__name__}", 4)
            return result
    if _backend.mode == "auto":
        return result
    raise error


def native_only(name: str, native: Callable[..., Any]) -> Callable[..., Any]:
    """A public name that torch computes for now, and says so in `info` and in mode "own"."""
    OPERATORS[name] = Operator(name, native, own=False)

    @functools.wraps(native)
    def call(*args: Any, **kwargs: Any) -> Any:
        _backend.warn_fallback(name, "this operator yet")
        return native(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call
