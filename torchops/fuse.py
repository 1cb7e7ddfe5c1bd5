"""Folding activations into the batch-norm before them, in a way that can be undone; in evaluation
also the batch-norm into the convolution before it.

The layers stay as they are. What changes is the forward of the module that calls them, through a
subclass of that module's own class: it calls two or three layers as one. It looks at them on each
call, so that what somebody hooks, exchanges or patches later counts as it would in torch.
nn.Sequential is here; blocks with a forward of their own are rewritten by fuse_traced.py, timm's
BatchNormAct2d by fuse_timm.py.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

import torchops.nn as tnn
from torchops._script import stand_in
from torchops.nn.batch_norm import normalize
from torchops.nn.conv2d_bn_act import CONVOLUTIONS, convolve_normalize, in_one_call, watched
from torchops.ops._activation import ACTIVATIONS
from torchops.ops._conv2d_rules import output_size
from torchops.ops.conv2d import autocasts

BATCH_NORMS = (tnn.BatchNorm1d, tnn.BatchNorm2d, tnn.BatchNorm3d)

_NAMES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
}


def activation_name(module: nn.Module | None) -> str | None:
    """The `activation=` of batch_norm that computes what this module computes, or None."""
    if type(module) is nn.LeakyReLU:
        return "leaky_relu" if module.negative_slope == 0.01 else None
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else None
    return _NAMES.get(type(module))


def folded(batch_norm: Any, activation: nn.Module | str | None) -> str | None:
    """The activation that one call can compute with the batch-norm; None where each needs its own.

    `activation` is a module, or the name of the function that the forward calls.
    """
    if type(batch_norm) not in BATCH_NORMS or batch_norm.activation is not None:
        return None
    name = activation if isinstance(activation, str) else activation_name(activation)
    if name is None:
        return None
    alone = (batch_norm,) if isinstance(activation, str) else (batch_norm, activation)
    return None if watched(*alone) else name  # type: ignore[arg-type]


def batch_norm_act(
    batch_norm: nn.Module,
    activation: nn.Module | str,
    input: Tensor,
    residual: Any = None,
    in_place: bool = False,
) -> Tensor:
    """activation(batch_norm(input) + residual), in one pass where the modules allow it; `in_place`
    says which addition the forward has, as they differ in what they promote and broadcast."""
    name = folded(batch_norm, activation)
    if name is not None and (residual is None or _alike(residual, input)):
        return normalize(batch_norm, input, name, residual)
    output = batch_norm(input)
    if residual is not None:
        output = operator.iadd(output, residual) if in_place else output + residual
    act = ACTIVATIONS[activation].native if isinstance(activation, str) else activation
    return act(output)


def conv_batch_norm_act(
    conv: Any,
    batch_norm: Any,
    activation: Any,
    input: Tensor,
    residual: Any = None,
    in_place: bool = False,
) -> Tensor:
    """activation(batch_norm(conv(input)) + residual), in one pass where the modules allow it.

    Without `activation`, and then without residual: batch_norm(conv(input)).
    """
    if in_one_call(conv, batch_norm, input):
        name = batch_norm.activation if activation is None else folded(batch_norm, activation)
        fits = residual is None or _is_output(residual, conv, input)
        if fits and (activation is None or name is not None):
            return convolve_normalize(conv, batch_norm, input, name, residual)
    output = conv(input)
    if activation is None:
        return batch_norm(output)
    return batch_norm_act(batch_norm, activation, output, residual, in_place)


def _alike(residual: Any, output: Tensor) -> bool:
    """Neither broadcast nor promoted."""
    return _has(residual, output.shape, output.dtype)


def _is_output(residual: Any, conv: Any, input: Tensor) -> bool:
    """The same, before there is an output."""
    if autocasts(input) or isinstance(conv.padding, str):
        return False
    size = output_size(input.shape, conv.weight.shape, conv.stride, conv.padding, conv.dilation)
    return _has(residual, size, input.dtype)


def _has(residual: Any, shape: Any, dtype: Any) -> bool:
    return isinstance(residual, Tensor) and residual.shape == shape and residual.dtype is dtype


# ---- classes that stand for others -------------------------------------------------------------


def state_of(module: Any) -> Any:
    """What pickle stores of it: the class may have a say."""
    getstate = getattr(type(module), "__getstate__", None)
    if getstate is None or getstate is getattr(object, "__getstate__", None):
        return module.__dict__
    return getstate(module)


def pickles_itself(cls: type) -> bool:
    """Whether a class pickles in a way that a class which stands for it would hide."""
    return cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__


class Twin:
    """First base of what `twin` makes; copies and pickles with the state of what it stands for."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return _rebuild, type(self).__bases__, state_of(self)

    def __prepare_scriptable__(self: Any) -> nn.Module:
        return stand_in(self, type(self).__bases__[1])


@functools.cache
def twin(kind: Any, cls: Any) -> Any:
    """A subclass of `cls` with the forward of `kind`, and the name of `cls`."""
    return type(cls.__name__, (kind, cls), {"__module__": cls.__module__})


def _rebuild(kind: Any, cls: Any) -> nn.Module:
    made = twin(kind, cls)
    return made.__new__(made)


def restore(model: nn.Module, kind: type[Any]) -> None:
    """Gives every module of a class of that kind its own class back."""
    for module in model.modules():
        if isinstance(module, kind):
            module.__class__ = rebased(
                type(module), lambda cls: cls.__bases__[1] if kind in cls.__bases__ else None
            )


def rebased(cls: Any, original: Callable[[Any], Any]) -> Any:
    """`cls`, or the class that is derived from originals as `cls` is from what stands for them.

    Parametrizations and FSDP give a module a class of its own, derived from the one that it had.
    """
    if (found := original(cls)) is not None:
        return found
    bases = tuple(rebased(base, original) for base in cls.__bases__)
    if bases == cls.__bases__:
        return cls
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, members)


# ---- nn.Sequential -----------------------------------------------------------------------------


class FoldingSequential(Twin):
    def forward(self: Any, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):  # torch.fx records the layers as they are
            return super().forward(input)  # type: ignore[misc]
        layers = [*self._modules.values(), None, None]
        while len(layers) > 2:
            layer, following, last = layers[:3]
            if in_one_call(layer, following, input):
                name = folded(following, last)
                input = convolve_normalize(layer, following, input, name or following.activation)
                done = 2 if name is None else 3
            elif (name := folded(layer, following)) is not None:
                input = normalize(layer, input, name)
                done = 2
            else:
                input = layer(input)
                done = 1
            del layers[:done]
        return input


def fuse(model: nn.Module) -> list[str]:
    """Folds every activation it can; returns a line for each."""
    from torchops import fuse_timm, fuse_traced

    sites = []
    for name, sequential in list(_sequentials(model)):
        pairs = [] if pickles_itself(type(sequential)) else _pairs(sequential)
        if pairs:
            sequential.__class__ = twin(FoldingSequential, type(sequential))  # type: ignore[arg-type]
        sites += [f"{name}.{pair}" for pair in pairs]
    return sites + fuse_traced.fuse(model) + fuse_timm.fuse(model)


def unfuse(model: nn.Module) -> None:
    """Every forward is the module's own again."""
    from torchops import fuse_timm, fuse_traced

    fuse_timm.unfuse(model)
    fuse_traced.unfuse(model)
    restore(model, FoldingSequential)


def _sequentials(model: nn.Module) -> Iterator[tuple[str, nn.Sequential]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield name, module


def _pairs(sequential: nn.Sequential) -> list[str]:
    """A line for each batch-norm with an activation after it or a convolution before it."""
    children = list(sequential._modules.items())
    lines = []
    for (_, layer), (key, following) in zip(children, children[1:], strict=False):
        name = folded(layer, following)
        if name is not None:
            lines.append(f"{key} ({name} into {type(layer).__name__})")
        elif type(layer) in CONVOLUTIONS and type(following) is tnn.BatchNorm2d:
            lines.append(f"{key} (BatchNorm2d into {type(layer).__name__}, in evaluation)")
    return lines
