"""convert(model) and revert(model): every supported layer of any model, in place.

A layer is converted by changing its class to our subclass of it. Nothing is copied or replaced:
parameters, buffers, hooks, tied weights, the training flag and every reference to the layer (an
optimizer's, a parent's, a hook's) stay what they are.
"""

from __future__ import annotations

import logging
from collections import Counter

from torch import nn

import torchops.nn as tnn
from torchops import fuse as _fuse
from torchops._script import stand_in

_logger = logging.getLogger("torchops")

# torch class -> ours, for every layer of torchops.nn that has a twin of the same name in torch.nn.
TWINS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(tnn, name) for name in tnn.__all__ if hasattr(nn, name)
}
_ORIGINALS = {own: native for native, own in TWINS.items()}


def _scriptable(module: nn.Module) -> nn.Module:
    return stand_in(module, _fuse.rebased(type(module), _ORIGINALS.get))


for _own in _ORIGINALS:
    _own.__prepare_scriptable__ = _scriptable  # type: ignore[attr-defined]


def convert(model: nn.Module, *, fuse: bool = True) -> nn.Module:
    """Runs every supported layer of `model` on this project's kernels, in place.

    A layer is converted when its class is exactly a class of torch.nn that torchops.nn has a twin
    of; a subclass, which may have a forward of its own, is left alone. The state_dict, and the
    results up to rounding, stay the same.

    Args:
        model: any module, a single layer included.
        fuse: also fold `batch_norm -> activation` and `batch_norm -> add -> activation` into one
            pass, and in evaluation without gradients the convolution before, too: neighbours in
            nn.Sequential, and in blocks whose forward torch.fx can trace and that read nothing
            but their submodules. A layer with hooks gets its own call, and so does one that is
            exchanged after the conversion.

    Returns:
        `model` itself. What was converted, fused and left is logged to the logger "torchops"
        (INFO; DEBUG names each layer).

    Example:
        >>> model = torchops.convert(model)
        >>> torchops.revert(model)  # torch.nn's layers again
    """
    converted: Counter[str] = Counter()
    left: Counter[str] = Counter()
    for name, module in model.named_modules():
        twin = TWINS.get(type(module))
        if twin is not None:
            module.__class__ = twin
            module._torchops_converted = True  # revert touches these alone
            converted[twin.__name__] += 1
            _logger.debug("converted %s (%s)", name or "the model itself", twin.__name__)
        elif isinstance(module, tuple(TWINS)) and type(module) not in _ORIGINALS:
            left[type(module).__name__] += 1
            _logger.debug("left %s (%s: a subclass)", name, type(module).__name__)
    fused = _fuse.fuse(model) if fuse else []
    for site in fused:
        _logger.debug("fused %s", site)
    _logger.info(
        "converted %d layers%s; fused %d pairs of layers; left %d layers of other classes%s",
        converted.total(), _breakdown(converted), len(fused), left.total(), _breakdown(left),
    )  # fmt: skip
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undoes convert, its fusions included, in place; keeps all parameters and buffers.

    A layer that was built from torchops.nn by hand stays one.

    Returns:
        `model` itself.
    """
    _fuse.unfuse(model)
    for module in model.modules():
        if module.__dict__.pop("_torchops_converted", False):
            module.__class__ = _fuse.rebased(type(module), _ORIGINALS.get)
    return model


def _breakdown(counts: Counter[str]) -> str:
    if not counts:
        return ""
    return " (" + ", ".join(f"{count} {name}" for name, count in counts.most_common()) + ")"
