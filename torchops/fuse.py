"""Folding activations into the batch-norm before them, in a way that can be undone.

The layers stay as they are. What changes is the forward of the module that calls them, through a
subclass of that module's own class: it calls batch-norm and activation as one. It looks at both on
each call, so that what somebody hooks, exchanges or patches later counts as it would in torch.
nn.Sequential is here; blocks with a forward of their own are rewritten by fuse_traced.py, timm's
BatchNormAct2d by fuse_timm.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

import torchops.nn as tnn
from torchops._script import stand_in
from torchops.nn.batch_norm import normalize
from torchops.ops._activation import ACTIVATIONS

BATCH_NORMS = (tnn.BatchNorm1d, tnn.BatchNorm2d, tnn.BatchNorm3d)

_NAMES = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
}


def activation_name(module: nn.Module) -> str | None:
    """The `activation=` of batch_norm that computes what this module computes, or None."""
    if type(module) is nn.LeakyReLU:
        return "leaky_relu" if module.negative_slope == 0.01 else None
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else None
    return _NAMES.get(type(module))


def watched(module: nn.Module) -> bool:
    """Whether somebody follows this module's calls: it must then get a call of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def folded(batch_norm: Any, activation: nn.Module | str) -> str | None:
    """The activation that one call can compute with the batch-norm; None where each needs its own.

    `activation` is a module, or the name of the function that the forward calls.
    """
    if type(batch_norm) not in BATCH_NORMS or batch_norm.activation is not None:
        return None
    name = activation if isinstance(activation, str) else activation_name(activation)
    if name is None or watched(batch_norm):
        return None
    return name if isinstance(activation, str) or not watched(activation) else None


def batch_norm_act(
    batch_norm: nn.Module, activation: nn.Module | str, input: Tensor, residual: Any = None
) -> Tensor:
    """activation(batch_norm(input) + residual), in one pass where the modules allow it."""
    name = folded(batch_norm, activation)
    if name is not None and (residual is None or _alike(residual, input)):
        return normalize(batch_norm, input, name, residual)
    output = batch_norm(input)
    if residual is not None:
        output = output + residual
    act = ACTIVATIONS[activation].native if isinstance(activation, str) else activation
    return act(output)


def _alike(residual: Any, input: Tensor) -> bool:
    """Neither broadcast nor promoted."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype is input.dtype
    )


# ---- classes that stand for others -------------------------------------------------------------


class Twin:
    """First base of what `twin` makes; copies and pickles as the class that it stands for."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, type(self).__bases__, self.__dict__

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
        layers = iter([*self._modules.values(), None])
        layer = next(layers)
        while layer is not None:
            following = next(layers)
            name = None if following is None else folded(layer, following)
            if name is not None:
                input = normalize(layer, input, name)
                following = next(layers)
            else:
                input = layer(input)
            layer = following
        return input


def fuse(model: nn.Module) -> list[str]:
    """Folds every activation it can; returns a line for each."""
    from torchops import fuse_timm, fuse_traced

    sites = []
    for name, sequential in list(_sequentials(model)):
        pairs = _pairs(sequential)
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
    """A line for each batch-norm with an activation after it."""
    children = list(sequential._modules.items())
    return [
        f"{key} ({name} into {type(batch_norm).__name__})"
        for (_, batch_norm), (key, activation) in zip(children, children[1:], strict=False)
        if activation is not None and (name := folded(batch_norm, activation)) is not None
    ]
