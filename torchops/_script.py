"""torch.jit.script of converted models: it compiles torch's own layers and forwards.

TorchScript reads the source of every forward, and ours is not written in its language. Before it
compiles, it asks each module for another one to take its place, and puts that into the model: a
model that was scripted runs on torch's layers from then on, as after revert.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def stand_in(module: nn.Module, cls: Any) -> nn.Module:
    """A module of class `cls` that shares everything else with `module`."""
    if getattr(module, "activation", None) is not None:
        raise RuntimeError(
            f"torch.jit.script: torch has no {type(module).__name__} with an activation; "
            "script the layers apart, or trace the model"
        )
    other = cls.__new__(cls)
    other.__dict__ = module.__dict__
    return other
