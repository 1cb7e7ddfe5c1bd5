"""timm's BatchNormAct2d, a batch-norm that holds its dropout and its activation: one pass for all.

timm need not be installed; its class is known by its name. The layer gets a subclass of its own
class, so isinstance, state_dict and repr stay as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchops.fuse import Twin, activation_name, restore, twin, watched
from torchops.nn.batch_norm import normalize


def fuse(model: nn.Module) -> list[str]:
    """Converts every BatchNormAct2d whose parts one pass can compute; returns a line for each."""
    sites = []
    for name, module in model.named_modules():
        if _is_batch_norm_act(type(module)) and _computable(module):
            module.__class__ = twin(_BatchNormAct, type(module))  # type: ignore[arg-type]
            sites.append(f"{name} ({activation_name(module.act)} into BatchNormAct2d)")  # type: ignore[arg-type]
    return sites


def unfuse(model: nn.Module) -> None:
    restore(model, _BatchNormAct)


def _is_batch_norm_act(cls: type) -> bool:
    return (
        cls.__name__ == "BatchNormAct2d"
        and cls.__module__.startswith("timm.layers")
        and not issubclass(cls, Twin)
    )


def _computable(module: Any) -> bool:
    known = isinstance(module.act, nn.Identity) or activation_name(module.act) is not None
    watched_part = watched(module.drop) or watched(module.act)
    return known and isinstance(module.drop, nn.Identity) and not watched_part


class _BatchNormAct(Twin):
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _computable(self) or not isinstance(x, Tensor):  # exchanged since, or recorded
            return super().forward(x)  # type: ignore[misc]
        return normalize(self, x, activation_name(self.act))
