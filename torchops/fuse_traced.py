"""Folding in blocks with a forward of their own, as torchvision's networks write them:

    out = self.bn2(self.conv2(out)); out += identity; return self.relu(out)

torch.fx records what forward calls, convolution, batch-norm, add and activation become one call,
and the block gets a subclass with the rewritten forward. Recording bakes in whatever Python decided
while it ran, so only a forward that can decide nothing is touched: one that reads nothing of its
block but submodules, draws no random numbers, asks for no mode and stores nothing: fuse_pure.py.
What it may decide by are the kinds of its arguments and which submodules are None: the subclass
asks for these.

One call for several stands where the last of them stood, so they must not be parted by one that
writes what they read (`_movable`).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
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
    pickles_itself,
    restore,
    state_of,
)
from torchops.fuse_pure import is_pure
from torchops.nn.conv2d_bn_act import CONVOLUTIONS, watched

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


def _function(name: str) -> Any:
    """operator.iadd and its like in disguise: torch.fx would write these as statements, and a
    number would change for whoever else holds it."""
    operation = getattr(operator, name)

    def function(value: Any, other: Any) -> Any:
        return operation(value, other)

    function.__name__ = name
    return function


_IN_PLACE = {
    name: _function(name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior")
}
_ADDS = {operator.add, _IN_PLACE["iadd"], torch.add}
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
        return _rebuild, type(self).__bases__[1:], state_of(self)


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
    fits = is_pure(block) and not pickles_itself(type(block))
    graph = _record(block) if fits else None
    if graph is None:
        return []
    calls = [node for node in graph.nodes if node.op == "call_module"]
    sites = [site for node in calls if (site := _fold(block, graph, node)) is not None]
    if sites:
        code = graph.python_code("self")
        key = (type(block), code.src, *_absent(block), *_unset(block))
        if key not in _classes:
            namespace = dict(code.globals)
            exec(code.src, namespace)
            inputs = sum(node.op == "placeholder" for node in graph.nodes)
            moved = [name for node in graph.nodes for name in node.meta.get("moved", ())]
            _classes[key] = _rewritten(block, namespace["forward"], inputs, moved)
        block.__class__ = _classes[key]
    return sites


# Blocks that record alike are of one class, as torch.func.stack_module_state wants them.
_classes: dict[Any, type[nn.Module]] = {}


def _rewritten(block: nn.Module, recorded: Any, inputs: int, moved: list[str]) -> type[nn.Module]:
    """A subclass of the block's class with the recorded forward, where that holds: for as many
    tensors as were recorded, while the block has the submodules that it had, and while nobody
    would notice that those in `moved` are called later."""
    cls, absent, unset = type(block), _absent(block), _unset(block)
    own: Any = cls.forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        holds = len(args) == inputs and not kwargs and _absent(self) == absent
        holds = holds and all([getattr(self, name, None) is None for name in unset])
        holds = holds and not any([watched(getattr(self, name)) for name in moved])
        if holds and all([isinstance(arg, Tensor) for arg in args]):
            return recorded(self, *args)
        return own(self, *args, **kwargs)  # torch.fx records this one, too

    members = {"forward": forward, "__module__": cls.__module__}
    return type(cls.__name__, (_Rewritten, cls), members)


def _absent(block: nn.Module) -> list[bool]:
    """Which submodules are None: all that a pure forward can decide by."""
    return [child is None for child in block._modules.values()]


def _unset(block: nn.Module) -> list[str]:
    """Attributes that are None without being submodules, and may become anything."""
    return [name for name, value in vars(block).items() if value is None and name not in _COMMON]


_COMMON = vars(nn.Module())


class _Proxy(torch.fx.Proxy):
    """Records x += y as such, where torch.fx's own has x = x + y."""


def _recorder(operation: Any) -> Any:
    def record(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return record


for _name, _operation in _IN_PLACE.items():
    setattr(_Proxy, f"__{_name}__", _recorder(_operation))


class _Tracer(torch.fx.Tracer):
    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def _record(block: nn.Module) -> torch.fx.Graph | None:
    attributes = set(block.__dict__)
    try:
        graph = _Tracer().trace(block)
    except Exception:  # whatever forward does that cannot be recorded: the block stays as it is
        return None
    constants = set(block.__dict__) - attributes
    for name in constants:  # tensors that forward made: recorded values, not this forward's to keep
        delattr(block, name)
    return None if constants or any(map(_is_deep, graph.nodes)) else graph


def _is_deep(node: torch.fx.Node) -> bool:
    """Calls a part of a submodule; the container that forward found it in may change its length."""
    return node.op == "call_module" and "." in str(node.target)


def _fold(block: nn.Module, graph: torch.fx.Graph, node: torch.fx.Node) -> str | None:
    """Rewrites `[conv ->] bn [[-> add] -> activation]` around a batch-norm; a line about it, or
    None."""
    known = type(_called(block, node)) in BATCH_NORMS
    if not known or len(node.args) != 1 or node.kwargs:
        return None
    steps, activation, residual = _ending(block, node)
    conv = _convolution_before(block, node)
    if conv is not None and _movable(block, [conv, *steps]):
        steps = [conv, *steps]
    else:
        conv = None
    if len(steps) == 1:
        return None
    passes = any(each.op == "call_module" or _is_new(block, each) for each in _between(steps))
    with graph.inserting_before(steps[-1]):
        layers = [
            graph.create_node("get_attr", step.target) for step in steps[: steps.index(node) + 1]
        ]
        act: Any = activation
        if isinstance(activation, nn.Module):
            act = graph.create_node("get_attr", steps[-1].target)
        call = batch_norm_act if conv is None else conv_batch_norm_act
        rest = () if residual is None else (residual, _in_place(steps[-2]))
        fused = graph.call_function(call, (*layers, act, steps[0].args[0], *rest))
    if passes:
        fused.meta["moved"] = [layer.target for layer in layers]
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
        if residual is None or len(last.users) != 1:
            return alone
        (last,) = last.users
        steps.append(last)
    activation = _activation_of(block, last)
    if activation is None or folded(block.get_submodule(str(node.target)), activation) is None:
        return alone
    return (steps, activation, residual) if _movable(block, steps) else alone


def _convolution_before(block: nn.Module, node: torch.fx.Node) -> torch.fx.Node | None:
    """The call of a convolution that nobody but this batch-norm sees the result of."""
    conv = node.args[0]
    if not isinstance(conv, torch.fx.Node) or conv.op != "call_module" or len(conv.users) != 1:
        return None
    known = type(_called(block, conv)) in CONVOLUTIONS
    return conv if known and len(conv.args) == 1 and not conv.kwargs else None


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
    if _in_place(node) and node.args[0] is not batch_norm:  # it is the other one that changes
        return None
    others = [arg for arg in node.args if arg is not batch_norm]
    return others[0] if len(others) == 1 and isinstance(others[0], torch.fx.Node) else None


def _in_place(node: torch.fx.Node) -> bool:
    """Whether a function or method may write its arguments, by its name and options."""
    name = str(getattr(node.target, "__name__", node.target))
    named = name.startswith(("i", "__i", "set")) or (name.endswith("_") and name[-2:] != "__")
    return named or True in node.args or bool({"inplace", "out"} & node.kwargs.keys())


def _movable(block: nn.Module, steps: list[torch.fx.Node]) -> bool:
    """Whether all steps may as well be made at the last of them: no other call between writes what
    the first reads, or is one of the same batch-norm, whose statistics go by the order of calls."""
    layers = {_called(block, step) for step in steps}
    read = _sources(block, steps[0])
    for node in _between(steps):
        called = _called(block, node)
        parts = set() if called is None else set(called.modules())
        if any(type(part) in BATCH_NORMS for part in parts & layers):
            return False
        if _may_write(block, node, parts) and read & _sources(block, node):
            return False
    return True


def _between(steps: list[torch.fx.Node]) -> Iterator[torch.fx.Node]:
    """The other nodes from the first step to the last."""
    node = steps[0].next
    while node is not steps[-1]:
        if node not in steps:
            yield node
        node = node.next


def _called(block: nn.Module, node: torch.fx.Node) -> nn.Module | None:
    return block.get_submodule(str(node.target)) if node.op == "call_module" else None


def _may_write(block: nn.Module, node: torch.fx.Node, parts: set[nn.Module]) -> bool:
    """Whether a call may write its arguments: layers of torch and ours do if `inplace` says so."""
    if not parts:
        return not _is_new(block, node) and _in_place(node)
    known = all(type(part).__module__.startswith(("torch.nn.", "torchops.")) for part in parts)
    return not known or any(getattr(part, "inplace", False) for part in parts)


def _sources(block: nn.Module, node: torch.fx.Node) -> set[Any]:
    """What a node's arguments may share memory with; all inputs of the block count as one."""
    found: set[Any] = set()
    todo = [*node.all_input_nodes]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add("inputs" if node.op == "placeholder" else node)
            todo += [] if _is_new(block, node) else node.all_input_nodes
    return found


def _is_new(block: nn.Module, node: torch.fx.Node) -> bool:
    """Whether a node's value is a tensor of its own."""
    layers = (*CONVOLUTIONS, *BATCH_NORMS)
    return type(_called(block, node)) in layers or node.target in (
        batch_norm_act,
        conv_batch_norm_act,
    )
