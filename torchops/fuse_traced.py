"""Folding in blocks with a forward of their own, as torchvision's networks write them:

    out = self.bn2(self.conv2(out)); out += identity; return self.relu(out)

torch.fx records what forward calls, batch-norm, add and activation become one call, and the block
gets a subclass with the rewritten forward. Recording bakes in whatever Python decided while it ran,
so only a forward that can decide nothing is touched: one that reads nothing of its block but
submodules, draws no random numbers, asks for no mode and stores nothing (`is_pure`).
"""

from __future__ import annotations

import dis
import operator
import types
from collections import Counter
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchops.fuse import BATCH_NORMS, activation_name, foldable, has_hooks
from torchops.ops._activation import ACTIVATIONS

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
}
_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid"}
_ADDS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"add", "add_", "__add__", "__iadd__"}


def fuse(model: nn.Module, uses: Counter[int]) -> list[str]:
    """Rewrites every block that has something to fold; returns a line for each fold."""
    sites = []
    for name, block in list(model.named_modules()):
        own_batch_norm = any(foldable(child, uses) for child in block.children())
        if own_batch_norm and not isinstance(block, (nn.Sequential, *BATCH_NORMS)):
            sites += [f"{name}.{site}" for site in _fuse_block(block, uses)]
    return sites


def unfuse(model: nn.Module) -> None:
    for block in model.modules():
        if isinstance(block, _Rewritten):
            for target in block.folded:
                block.get_submodule(target).activation = None  # type: ignore[assignment]
            block.__class__ = type(block).__mro__[2]


class _Rewritten:
    """Base of the subclasses that carry a rewritten forward; `folded` names its batch-norms.

    Such a class exists only in this process: copying and pickling store the block's own class and
    rewrite again.
    """

    folded: dict[str, str]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__mro__[2], self.folded), self.__dict__


def _rebuild(cls: type[nn.Module], folded: dict[str, str]) -> Any:
    block = cls.__new__(cls)
    block.__class__ = type(cls.__name__, (_Unpickled, cls), {"folded": folded})
    return block


class _Unpickled:
    """A rewritten block between its creation and the arrival of its state."""

    folded: dict[str, str]

    def __setstate__(self, state: dict[str, Any]) -> None:
        cls, folded = type(self).__mro__[2], self.folded
        self.__class__ = cls  # type: ignore[assignment]
        self.__setstate__(state)
        for target in folded:
            self.get_submodule(target).activation = None  # type: ignore[attr-defined]
        _fuse_block(self, None)  # type: ignore[arg-type]


def _fuse_block(block: nn.Module, uses: Counter[int] | None) -> list[str]:
    graph = _record(block) if is_pure(block) else None
    if graph is None:
        return []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    folded: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.op != "call_module" or calls[node.target] != 1:
            continue
        module = block.get_submodule(node.target)
        if uses is not None and not foldable(module, uses) or type(module) not in BATCH_NORMS:
            continue
        activation = _fold(block, graph, node)
        if activation is not None:
            folded[node.target] = activation
    if not folded:
        return []
    for target, activation in folded.items():
        block.get_submodule(target).activation = activation  # type: ignore[assignment]
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    members = {
        "forward": namespace["forward"],
        "folded": folded,
        "__module__": type(block).__module__,
    }
    block.__class__ = type(type(block).__name__, (_Rewritten, type(block)), members)
    return [f"{target} ({activation})" for target, activation in folded.items()]


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def _record(block: nn.Module) -> torch.fx.Graph | None:
    attributes = set(block.__dict__)
    try:
        graph = _Tracer().trace(block)
    except Exception:  # whatever forward does that cannot be recorded: the block stays as it is
        return None
    constants = set(block.__dict__) - attributes
    for (
        name
    ) in constants:  # tensors that forward made: recorded values, so not this forward's to keep
        delattr(block, name)
    return None if constants else graph


def _fold(block: nn.Module, graph: torch.fx.Graph, node: torch.fx.Node) -> str | None:
    """Rewrites `bn [-> add] -> activation` from here on; the activation's name, or None."""
    if len(node.args) != 1 or node.kwargs or len(node.users) != 1:
        return None
    (user,) = node.users
    activation = _activation_of(block, user)
    if activation is not None:
        user.replace_all_uses_with(node)
        graph.erase_node(user)
        return activation
    residual = _residual_of(user, node)
    if residual is None or len(user.users) != 1:
        return None
    (last,) = user.users
    activation = _activation_of(block, last)
    if activation is None or _mutates_between(block, node, user):
        return None
    with graph.inserting_before(user):
        batch_norm = graph.create_node("get_attr", node.target)
        fused = graph.call_function(batch_norm_add, (batch_norm, node.args[0], residual))
    last.replace_all_uses_with(fused)
    for old in (last, user, node):
        graph.erase_node(old)
    return activation


def batch_norm_add(batch_norm: Any, input: Tensor, residual: Tensor) -> Tensor:
    """activation(batch_norm(input) + residual): one pass where residual is like input."""
    if residual.shape == input.shape and residual.dtype == input.dtype:
        return batch_norm(input, residual)
    output = _BatchNorm.forward(batch_norm, input) + residual  # broadcasts or promotes
    return ACTIVATIONS[batch_norm.activation].native(output)


def _activation_of(block: nn.Module, node: torch.fx.Node) -> str | None:
    """The activation that this node applies to its only tensor argument."""
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        return None if has_hooks(module) else activation_name(module)
    options = {name: value for name, value in node.kwargs.items() if name != "inplace"}
    if len(node.args) != 1 or options:
        return None
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None


def _residual_of(node: torch.fx.Node, batch_norm: torch.fx.Node) -> torch.fx.Node | None:
    """The other operand, where node adds one tensor to the batch-norm's output."""
    is_add = node.op == "call_function" and node.target in _ADDS
    is_add_method = node.op == "call_method" and node.target in _ADD_METHODS
    if not (is_add or is_add_method) or len(node.args) != 2 or node.kwargs:
        return None
    others = [arg for arg in node.args if arg is not batch_norm]
    return others[0] if len(others) == 1 and isinstance(others[0], torch.fx.Node) else None


def _mutates_between(block: nn.Module, first: torch.fx.Node, last: torch.fx.Node) -> bool:
    """Whether a call between the two may change a tensor in place: the batch-norm would see it."""
    node = first.next
    while node is not last:
        if node.op == "call_method" and str(node.target).rstrip("_") != node.target:
            return True
        if node.op == "call_function" and str(getattr(node.target, "__name__", "")).startswith("i"):
            return True
        if node.op == "call_module" and getattr(
            block.get_submodule(str(node.target)), "inplace", False
        ):
            return True
        node = node.next
    return False


# ---- forwards that can decide nothing ----------------------------------------------------------

_DECIDING = ("rand", "bernoulli", "dropout", "is_grad", "is_autocast", "training", "requires_grad")
_HIDING = {"getattr", "setattr", "vars", "globals", "locals", "__dict__", "print", "super"}
_STORES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"}


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
            if instruction.opname in _STORES:
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
        return str(home).split(".")[0] in ("torch", "typing", "builtins")
    if hasattr(nn.Module, name) or not hasattr(block, name):
        return True  # a method of nn.Module's name is a tensor's here: x.float()
    value = getattr(block, name)
    if isinstance(value, types.MethodType):
        return _reads_only_modules(block, value.__func__, seen)
    return value is None or isinstance(value, nn.Module)
