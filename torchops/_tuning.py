"""The tuning table of `backend("auto")`: families of problems that native was measured to win.

Every entry is a debt, to be paid back by a faster kernel; the aim is an empty table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Debt:
    """One family of problems that `backend("auto")` hands to native.

    `applies` takes the operator's own arguments and decides from Python ints alone (shapes, dtype,
    stride, groups): it runs on every call of the operator. `ratio` is the time of our kernel over
    native's, so above 1; `measured` says where the ratio comes from (hardware, threads, versions).
    """

    operator: str
    device: str
    family: str
    applies: Callable[..., bool]
    ratio: float
    measured: str


DEBTS: tuple[Debt, ...] = ()


def prefers_native(operator: str, *args: Any, **kwargs: Any) -> bool:
    """Whether the table hands this call to native. Asked in mode "auto" only."""
    input = args[0] if args else kwargs["input"]
    for debt in DEBTS:
        if debt.operator == operator and debt.device == input.device.type:
            try:
                if debt.applies(*args, **kwargs):
                    return True
            except (AttributeError, IndexError, TypeError):
                # Nonsense arguments: the operator refuses them in native's words.
                return False
    return False
