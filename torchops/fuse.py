"""Folding activations into the batch-norm before them, in a way that can be undone.

In nn.Sequential a `Folded` marker takes the activation's place and remembers it; blocks with a
forward of their own are rewritten by fuse_traced.py, timm's BatchNormAct2d by fuse_timm.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import Tensor, nn

import torchops.nn as tnn

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


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches this module's calls: its result must then stay its own."""
    return any(
        hooks
        for name, hooks in module.__dict__.items()
        if name.endswith("_hooks") and "state_dict" not in name
    )


class Folded(nn.Module):
    """Stands where an activation stood that the batch-norm before it now computes."""

    def __init__(self, batch_norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.pair = (batch_norm, activation)  # in a tuple, so that neither becomes a child

    def forward(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        return f"{type(self.pair[1]).__name__}, computed by the batch-norm before it"


def foldable(module: nn.Module | None, uses: Counter[int]) -> bool:
    """A batch-norm of ours with one place in the model, no activation and no hooks."""
    return (
        type(module) in BATCH_NORMS
        and module.activation is None  # type: ignore[union-attr]
        and uses[id(module)] == 1
        and not has_hooks(module)  # type: ignore[arg-type]
    )


def fuse(model: nn.Module) -> list[str]:
    """Folds every activation it can; returns a line for each."""
    from torchops import fuse_timm, fuse_traced

    uses = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    sites = []
    for name, sequential in list(_sequentials(model)):
        for key, batch_norm, activation in _neighbours(sequential):
            if foldable(batch_norm, uses) and not has_hooks(activation):
                batch_norm.activation = activation_name(activation)  # type: ignore[assignment]
                sequential._modules[key] = Folded(batch_norm, activation)
                sites.append(
                    f"{name}.{key} ({batch_norm.activation} into {type(batch_norm).__name__})"
                )
    return sites + fuse_traced.fuse(model, uses) + fuse_timm.fuse(model)


def unfuse(model: nn.Module) -> None:
    """Puts every folded activation back."""
    from torchops import fuse_timm, fuse_traced

    fuse_timm.unfuse(model)
    fuse_traced.unfuse(model)
    for _, sequential in _sequentials(model):
        for key, child in sequential._modules.items():
            if isinstance(child, Folded):
                batch_norm, activation = child.pair
                batch_norm.activation = None  # type: ignore[assignment]
                sequential._modules[key] = activation.train(child.training)


def _sequentials(model: nn.Module) -> Iterator[tuple[str, nn.Sequential]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield name, module


def _neighbours(sequential: nn.Sequential) -> list[tuple[str, nn.Module, nn.Module]]:
    """(key of the activation, batch-norm, activation) for each pair of neighbours."""
    children = list(sequential._modules.items())
    return [
        (key, previous, child)
        for (_, previous), (key, child) in zip(children, children[1:], strict=False)
        if child is not None and previous is not None and activation_name(child) is not None
    ]
