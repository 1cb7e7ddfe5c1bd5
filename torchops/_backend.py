"""Which implementation runs: `torchops.backend("auto" | "own" | "native")`."""

from __future__ import annotations

import os
import warnings

MODES = ("auto", "own", "native")


class FallbackWarning(UserWarning):
    """A call in mode "own" that no kernel of this project covers and that ran natively.

    What is no such operator's work at all, as a mean over other than images, needs no warning.
    """


def checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
    return mode


# Process-wide, like torch.backends' flags; torch.compile guards on it.
mode = checked(os.environ.get("TORCHOPS_BACKEND", "auto"), "TORCHOPS_BACKEND")


class backend:  # reads as a function: with torchops.backend("own"): ...
    """Chooses who computes, for the whole process, until the block ends.

    Args:
        mode: "own" runs this project's kernels wherever one exists; "native" runs torch's;
            "auto" (the default at start, or TORCHOPS_BACKEND) runs our own except where the
            committed tuning table says that native is faster for that family of problems.

    Raises:
        ValueError: for any other mode.
    """

    def __init__(self, mode: str) -> None:
        self.mode = checked(mode, "torchops.backend")
        self.previous: list[str] = []  # of each block that this object opened

    def __enter__(self) -> None:
        global mode
        self.previous.append(mode)
        mode = self.mode

    def __exit__(self, *exception: object) -> None:
        global mode
        mode = self.previous.pop()


_warned: set[tuple[str, str]] = set()


def warn_fallback(operator: str, reason: str, depth: int = 3) -> None:
    """Once per operator and reason, so that a ratio of 1.00 never hides a native call.

    `depth` is the number of calls from here to the user's, for the line that the warning names.
    """
    if mode == "own" and (operator, reason) not in _warned:
        _warned.add((operator, reason))
        warnings.warn(
            f"torchops.{operator} ran natively: no kernel for {reason}",
            FallbackWarning,
            stacklevel=depth,
        )
