"""Which forwards can decide nothing, so that torch.fx's recording of one call holds for all."""

from __future__ import annotations

import dis
import types
from typing import Any

from torch import Tensor, nn

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
        for instruction in dis.get_instructions(code):
            if instruction.opname in _BEYOND_CALLS:
                return False
        if not all(_harmless(block, function, name, seen) for name in code.co_names):
            return False
    return True


def _harmless(block: nn.Module, function: types.FunctionType, name: str, seen: set[Any]) -> bool:
    if name.startswith(_DECIDING) or name in _HIDING:
        return False
    if name in function.__globals__:
        value = function.__globals__[name]
        home = (
            value.__name__
            if isinstance(value, types.ModuleType)
            else getattr(value, "__module__", "")
        )
        if str(home).split(".")[0] not in ("torch", "typing", "builtins"):
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
