"""The layers of real networks, with how often each occurs.

Nothing is typed by hand: a network runs once on meta tensors while a TorchFunctionMode notes every
call of a layer that the library has. A batch_norm takes up the activation behind it, and the
addition between the two, where nothing else reads what lies between, as torchops.convert does. So
the total of a suite, each row times its multiplicity, is what the network spends per op family.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, get_testing_overrides

from torchops.bench.models import NETWORKS
from torchops.bench.problem import ADAPTIVE_POOLS, CONVS, OPS, Problem, dims

ALL = ("resnet50", "mobilenet_v2", "convnext_tiny", "efficientnet_b0", "googlenet", "lenet")
"""What `--suite all` runs. Every network of torchops.bench.models is a suite of its own, too."""

_LAYERS = {getattr(F, op): op for op in OPS if hasattr(F, op)}

_ACTIVATIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    Tensor.relu: "relu",
    Tensor.relu_: "relu",
    F.relu6: "relu6",
    F.hardtanh: "relu6",
    F.leaky_relu: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.gelu: "gelu",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
}
_ADDITIONS = (torch.add, Tensor.add, Tensor.add_)

_Key = tuple[int, int]
"""A tensor's value: the object, and its version, which an in-place operation moves on."""


def suite(name: str, *, batch: int, training: bool = True) -> dict[Problem, int]:
    """The problems of network `name` in the order of their first call, and how often each occurs.

    Raises ValueError with the known names where `name` is neither a network nor the beginning of
    exactly one.
    """
    network = NETWORKS[network_name(name)]
    with torch.device("meta"):
        model, images = network.build(), torch.empty(batch, *network.input)
    recorder = _Recorder()
    with recorder:
        model.train(training)(images)
    problems = recorder.problems()
    return dict(Counter(replace(problem, training=training) for problem in problems))


def network_name(name: str) -> str:
    """`name` in full: a network's name, or the one that begins so."""
    matches = [known for known in NETWORKS if known == name]
    matches = matches or [known for known in NETWORKS if name and known.startswith(name)]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(matches or NETWORKS)
    raise ValueError(f"suite {name!r} is {'ambiguous' if matches else 'unknown'}: {known}, or all")


class _Recorder(TorchFunctionMode):
    """Notes the layers that a network calls, and who reads a batch_norm's output."""

    def __init__(self) -> None:
        super().__init__()
        self._problems: list[Problem] = []
        self._readers: Counter[_Key] = Counter()
        self._norms: dict[_Key, int] = {}
        self._sums: dict[_Key, tuple[int, _Key]] = {}
        self._folds: list[tuple[int, str, tuple[_Key, ...]]] = []
        # An id is a tensor's name only while the tensor lives.
        self._alive: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [_key(tensor) for tensor in _tensors(args)]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._alive.append(result)
            self._readers.update(inputs)
            self._note(func, args, kwargs or {}, inputs, _key(result))
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, inputs: list[_Key], result: _Key) -> None:
        if func in _LAYERS:
            op = _LAYERS[func]
            if op == "batch_norm":
                self._norms[result] = len(self._problems)
            self._problems.append(_problem(op, _bind(func, args, kwargs)))
        elif func in _ADDITIONS and len(inputs) == 2:
            norm = next((key for key in inputs if key in self._norms), None)
            if norm is not None:
                self._sums[result] = (self._norms[norm], norm)
        elif func in _ACTIVATIONS and inputs and _is_plain(func, args, kwargs):
            source = inputs[0]
            if source in self._norms:
                self._folds.append((self._norms[source], _ACTIVATIONS[func], (source,)))
            elif source in self._sums:
                index, norm = self._sums[source]
                self._folds.append((index, _ACTIVATIONS[func], (norm, source)))

    def problems(self) -> list[Problem]:
        """Every layer in call order, batch_norms with what they take up."""
        problems = list(self._problems)
        for index, activation, between in self._folds:
            if all(self._readers[key] == 1 for key in between):
                problems[index] = replace(
                    problems[index], activation=activation, residual=len(between) == 2
                )
        return problems


def _key(tensor: Tensor) -> _Key:
    return id(tensor), tensor._version


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


@cache
def _signature(func: Callable[..., Any]) -> inspect.Signature:
    # Builtins such as conv2d carry no signature; torch's own override table has one for each.
    return inspect.signature(get_testing_overrides()[func])


def _bind(func: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    bound = _signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _is_plain(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an activation is called with the parameters that a batch_norm can take up."""
    arguments = _bind(func, args, kwargs)
    if func is F.hardtanh:
        return (arguments["min_val"], arguments["max_val"]) == (0.0, 6.0)
    defaults = _signature(func).parameters
    return all(
        arguments[name] == defaults[name].default
        for name in ("negative_slope", "approximate")
        if name in arguments
    )


def _problem(op: str, arguments: dict[str, Any]) -> Problem:
    input: Tensor = arguments["input"]
    fields: dict[str, Any] = {
        "batch": input.shape[0],
        "in_channels": input.shape[1],
        "input_size": tuple(input.shape[2:]),
    }
    rank = dims(op) or 0
    if op in CONVS:
        weight = arguments["weight"]
        fields |= {
            "out_channels": weight.shape[0],
            "kernel_size": tuple(weight.shape[2:]),
            "groups": arguments["groups"],
            "bias": arguments["bias"] is not None,
            "first": not input.requires_grad,
        }
    elif op in ADAPTIVE_POOLS:
        fields["adaptive_size"] = _per_dimension(arguments["output_size"], rank)
    elif op != "batch_norm":
        fields["kernel_size"] = _per_dimension(arguments["kernel_size"], rank)
        fields["ceil_mode"] = arguments["ceil_mode"]
        fields["count_include_pad"] = arguments.get("count_include_pad", True)
    if "kernel_size" in fields:
        stride = arguments["stride"]
        fields["stride"] = _per_dimension(fields["kernel_size"] if stride is None else stride, rank)
        fields["dilation"] = _per_dimension(arguments.get("dilation", 1), rank)
        fields["padding"] = _padding(arguments["padding"], fields)
    return Problem(op, **fields)


def _per_dimension(value: Any, rank: int) -> tuple[int, ...]:
    sizes = tuple(value) if isinstance(value, tuple | list) else (value,)
    return sizes * rank if len(sizes) == 1 else sizes


def _padding(padding: Any, fields: dict[str, Any]) -> tuple[int, ...]:
    rank = len(fields["kernel_size"])
    if padding == "valid":
        padding = 0
    if padding == "same":
        reach = zip(fields["kernel_size"], fields["dilation"], strict=True)
        return tuple(dilation * (kernel - 1) // 2 for kernel, dilation in reach)
    return _per_dimension(padding, rank)
