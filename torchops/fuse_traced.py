"""Folding in blocks with a forward of their own, as torchvision's networks write them:

    out = self.bn2(self.conv2(out)); out += identity; return self.relu(out)

torch.fx records what forward calls, convolution, batch-norm, add and activation become one call,
and the block gets a subclass with the rewritten forward. Recording bakes in whatever Python decided
while it ran, so only a forward that can decide nothing is touched: one that reads nothing of its
block but submodules, draws no random numbers, asks for no mode and stores nothing (`is_pure`). What
it may decide by are the kinds of its arguments and which submodules are None: the subclass asks for
these.
"""

from __future__ import annotations

import dis
import functools
import operator
import types
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from torchops.fuse import (
    BATCH_NORMS,
    Twin,
    activation_name,
    batch_norm_act,
    conv_batch_norm_act,
    folded,
    restore,
)
from torchops.nn.conv2d_bn_act import CONVOLUTIONS

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


def fuse(model: nn.Module) -> list[str]:
    """Rewrites every block that has something to fold; returns a line for each fold."""
    sites = []
    for name, block in list(model.named_modules()):
        own_batch_norm = any(type(child) in BATCH_NORMS for child in block.children())
        if own_batch_norm and not isinstance(block, (_Rewritten, nn.Sequential, *BATCH_NORMS)):
            sites += [f"{name}.{site}" for site in _fuse_block(block)]
    return sites


def unfuse(model: nn.Module) -> None:
    restore(model, _Rewritten)


class _Rewritten(Twin):
    """First base of the subclasses that carry a rewritten forward.

    Such a class exists only in this process: copying and pickling store the block's own class and
    rewrite again.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, type(self).__bases__[1:], self.__dict__


def _rebuild(cls: type[nn.Module]) -> Any:
    block = cls.__new__(cls)
    block.__class__ = type(cls.__name__, (_Unpickled, cls), {})
    return block


class _Unpickled:
    """A rewritten block between its creation and the arrival of its state."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        _, self.__class__ = type(self).__bases__
        self.__setstate__(state)
        _fuse_block(self)  # type: ignore[arg-type]


def _fuse_block(block: nn.Module) -> list[str]:
    graph = _record(block) if is_pure(block) else None
    if graph is None:
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    sites = [site for node in calls if (site := _fold(block, graph, node)) is not None]
    if sites:
        code = graph.python_code("self")
        key = (type(block), code.src, *_absent(block))
        if key not in _classes:
            namespace = dict(code.globals)
            exec(code.src, namespace)
            inputs = sum(node.op == "placeholder" for node in graph.nodes)
            _classes[key] = _rewritten(block, namespace["forward"], inputs)
        block.__class__ = _classes[key]
    return sites


# Blocks that record alike are of one class, as torch.func.stack_module_state wants them.
_classes: dict[Any, type[nn.Module]] = {}


def _rewritten(block: nn.Module, recorded: Any, inputs: int) -> type[nn.Module]:
    """A subclass of the block's class with the recorded forward, where that holds: for as many
    tensors as were recorded, and while the block has the submodules that it had."""
    cls, absent = type(block), _absent(block)
    own: Any = cls.forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        holds = len(args) == inputs and not kwargs and _absent(self) == absent
        if holds and all([isinstance(arg, Tensor) for arg in args]):
            return recorded(self, *args)
        return own(self, *args, **kwargs)  # torch.fx records this one, too

    members = {"forward": forward, "__module__": cls.__module__}
    return type(cls.__name__, (_Rewritten, cls), members)


def _absent(block: nn.Module) -> list[bool]:
    """Which submodules are None: all that a pure forward can decide by."""
    return [child is None for child in block._modules.values()]


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
    """Rewrites `[conv ->] bn [[-> add] -> activation]` around a batch-norm; a line about it, or
    None."""
    known = type(block.get_submodule(str(node.target))) in BATCH_NORMS
    if not known or len(node.args) != 1 or node.kwargs:
        return None
    steps, activation, residual = _ending(block, node)
    conv = _convolution_before(block, node, steps[-1])
    if conv is not None:
        steps = [conv, *steps]
    if len(steps) == 1:
        return None
    with graph.inserting_before(steps[-1]):
        layers = [
            graph.create_node("get_attr", step.target) for step in steps[: steps.index(node) + 1]
        ]
        act: Any = activation
        if isinstance(activation, nn.Module):
            act = graph.create_node("get_attr", steps[-1].target)
        call = batch_norm_act if conv is None else conv_batch_norm_act
        rest = () if residual is None else (residual,)
        fused = graph.call_function(call, (*layers, act, steps[0].args[0], *rest))
    steps[-1].replace_all_uses_with(fused)
    for old in reversed(steps):
        graph.erase_node(old)
    name = activation_name(activation) if isinstance(activation, nn.Module) else activation
    others = [str(conv.target)] if conv is not None else []
    return f"{node.target} ({', '.join([*others, name] if name else others)})"


def _ending(block: nn.Module, node: torch.fx.Node) -> tuple[list[torch.fx.Node], Any, Any]:
    """The nodes from a batch-norm to its activation, that activation, and what is added between;
    of a batch-norm that has its own call to make, itself alone."""
    alone = [node], None, None
    if len(node.users) != 1:
        return alone
    (last,) = node.users
    steps, residual = [node, last], None
    if _activation_of(block, last) is None:
        residual = _residual_of(last, node)
        if residual is None or len(last.users) != 1 or _mutates_between(block, node, last):
            return alone
        (last,) = last.users
        steps.append(last)
    activation = _activation_of(block, last)
    if activation is None or folded(block.get_submodule(str(node.target)), activation) is None:
        return alone
    return steps, activation, residual


def _convolution_before(
    block: nn.Module, node: torch.fx.Node, last: torch.fx.Node
) -> torch.fx.Node | None:
    """The call of a convolution that nobody but this batch-norm sees the result of, if it may as
    well be made at `last`: nobody between gets its input, too, and so might change that."""
    conv = node.args[0]
    if not isinstance(conv, torch.fx.Node) or conv.op != "call_module" or len(conv.users) != 1:
        return None
    known = type(block.get_submodule(str(conv.target))) in CONVOLUTIONS
    if not known or len(conv.args) != 1 or conv.kwargs:
        return None
    between = conv.next
    while between is not last:
        if conv.args[0] in between.all_input_nodes:
            return None
        between = between.next
    return conv


def _activation_of(block: nn.Module, node: torch.fx.Node) -> nn.Module | str | None:
    """The activation that this node applies to its only tensor argument: module, or name."""
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        return module if activation_name(module) is not None else None
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
        return str(home).split(".")[0] in ("torch", "typing", "builtins")
    if hasattr(nn.Module, name) or not hasattr(block, name):
        return True  # a method of nn.Module's name is a tensor's here: x.float()
    value = getattr(block, name)
    if isinstance(value, types.MethodType):
        return _reads_only_modules(block, value.__func__, seen)
    return value is None or isinstance(value, nn.Module)
