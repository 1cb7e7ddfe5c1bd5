"""Modules of the [bench] extra, which the library itself does not need."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(RuntimeError):
    """A module of the [bench] extra is not installed."""


def extra(module: str) -> Any:
    """Import `module`; raises MissingExtra with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:
            raise
        raise MissingExtra(
            f"torchops bench needs {package}, which is not installed; "
            "install it with:  pip install 'torchops[bench]'"
        ) from None
