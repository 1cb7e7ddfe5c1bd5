"""Which forwards can decide nothing, so that torch.fx's recording of one call holds for all."""

from __future__ import annotations

import builtins
import dis
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import get_overridable_functions

_DECIDING = (
    "rand", "bernoulli", "dropout", "is_grad", "is_autocast", "training", "requires_grad",
    "checkpoint",
)  # fmt: skip
_HIDING = {"getattr", "setattr", "vars", "globals", "locals", "__dict__", "print", "super"}
# What torch.fx hands to forward answers these otherwise than a tensor.
_HIDING |= {"isinstance", "hasattr", "type", "callable"}
# Stores outlive the call, and torch.fx records no context manager: torch.no_grad() would be lost.
_BEYOND_CALLS = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"}
_BEYOND_CALLS |= {"SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL"}
# What is imported there may know anything. Which tensors are one and the same, torch.fx hides.
_BEYOND_CALLS |= {"IMPORT_NAME", "CONTAINS_OP", "BUILD_SET"}
_BUILTINS = {"range", "len", "zip", "enumerate", "list", "tuple", "slice", "reversed", "dict"}
_NAMESPACES = (torch, nn, F)


def is_pure(block: nn.Module) -> bool:
    """Whether forward, judged by its bytecode, depends on its inputs and submodules alone."""
    return "forward" not in block.__dict__ and _reads_only_modules(
        block, type(block).forward, set()
    )


def _reads_only_modules(block: nn.Module, function: Any, seen: set[Any]) -> bool:
    if not isinstance(function, types.FunctionType) or function.__closure__:
        return False
    if function in seen:
        return True
    seen.add(function)
    codes = [function.__code__]
    for code in codes:  # grows by the comprehensions and lambdas inside
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
        if not all(_recorded(*pair) for pair in _with_previous(dis.get_instructions(code))):
            return False
        if not all(_harmless(block, function, name, seen) for name in code.co_names):
            return False
    return True


def _with_previous(
    instructions: Iterator[dis.Instruction],
) -> Iterator[tuple[dis.Instruction | None, dis.Instruction]]:
    previous = None
    for instruction in instructions:
        yield previous, instruction
        previous = instruction


def _recorded(previous: dis.Instruction | None, instruction: dis.Instruction) -> bool:
    if instruction.opname == "IS_OP":  # nothing but None is the same in every call
        return previous is not None and previous.opname == "LOAD_CONST" and previous.argval is None
    return instruction.opname not in _BEYOND_CALLS


@functools.cache
def _overridable() -> frozenset[Any]:
    """torch's functions of tensors, which torch.fx records; the others answer at once."""
    return frozenset(f for functions in get_overridable_functions().values() for f in functions)


def _answers_at_once(value: Any) -> bool:
    """Whether forward would learn something from it that no recording shows."""
    if isinstance(value, types.ModuleType):
        return value not in _NAMESPACES
    if isinstance(value, type):
        return value.__module__.split(".")[0] not in ("torch", "typing", "builtins")
    known = getattr(value, "__module__", None) == F.__name__ or value in _overridable()
    return callable(value) and not known


def _harmless(block: nn.Module, function: types.FunctionType, name: str, seen: set[Any]) -> bool:
    if name.startswith(_DECIDING) or name in _HIDING:
        return False
    if name in function.__globals__:
        if _answers_at_once(function.__globals__[name]):
            return False
    elif hasattr(builtins, name) and not hasattr(Tensor, name) and name not in _BUILTINS:
        return False
    known = hasattr(Tensor, name) or isinstance(getattr(block, name, None), nn.Module)
    if not known and any(_answers_at_once(getattr(space, name, None)) for space in _NAMESPACES):
        return False
    if hasattr(nn.Module, name):
        return hasattr(Tensor, name)  # x.float() is harmless, self.bn.eval() is not
    if not all(_read_live(part, name) for part in block.modules() if part is not block):
        return False
    value = getattr(block, name, None)
    if isinstance(value, types.MethodType):
        return _reads_only_modules(block, value.__func__, seen)
    return not hasattr(type(block), name) and (value is None or isinstance(value, nn.Module))


def _read_live(part: nn.Module, name: str) -> bool:
    """Whether `part.name`, if forward reads that, is recorded as such and not as its value."""
    return isinstance(getattr(part, name, None), nn.Module | Tensor | None)
