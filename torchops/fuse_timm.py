"""timm's BatchNormAct2d, a batch-norm that holds its dropout and its activation: one pass for all.

timm need not be installed; its class is known by its name. The layer gets a subclass of its own
class, so isinstance, state_dict and repr stay as they are.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from torchops.fuse import activation_name, has_hooks
from torchops.nn.batch_norm import call_statistics
from torchops.ops.batch_norm import batch_norm


def fuse(model: nn.Module) -> list[str]:
    """Converts every BatchNormAct2d whose parts one pass can compute; returns a line for each."""
    sites = []
    for name, module in model.named_modules():
        if _is_batch_norm_act(type(module)) and _computable(module):
            module.__class__ = _twin(type(module))  # type: ignore[arg-type]
            sites.append(f"{name} ({activation_name(module.act)} into BatchNormAct2d)")  # type: ignore[arg-type]
    return sites


def unfuse(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _BatchNormAct):
            module.__class__ = type(module).__mro__[2]


def _is_batch_norm_act(cls: type) -> bool:
    return cls.__name__ == "BatchNormAct2d" and cls.__module__.startswith("timm.layers")


def _computable(module: Any) -> bool:
    parts = (module.drop, module.act)
    known = isinstance(module.act, nn.Identity) or activation_name(module.act) is not None
    return known and isinstance(module.drop, nn.Identity) and not any(map(has_hooks, parts))


class _BatchNormAct:
    """First base of what _twin makes; copies and pickles as the class it stands for."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not _computable(self):  # its parts were exchanged since
            return super().forward(x)  # type: ignore[misc]
        self._check_input_dim(x)
        mean, var, training, momentum = call_statistics(self)
        return batch_norm(
            x, mean, var, self.weight, self.bias, training, momentum, self.eps,
            activation=activation_name(self.act),
        )  # fmt: skip

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _twin(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_BatchNormAct, cls), {"__module__": cls.__module__})


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    twin = _twin(cls)  # type: ignore[arg-type]
    return twin.__new__(twin)
