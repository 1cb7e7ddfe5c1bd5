"""The tuning table of `backend("auto")`: families of problems that native wins.

Every entry is a debt, to be paid back by a faster kernel; the aim is an empty table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Debt:
    """One family of problems that `backend("auto")` hands to native.

    `applies` takes the operator's own arguments and decides from what Python knows (shapes, dtype,
    stride, groups, whether a gradient is asked for): it runs on every call of the operator. `ratio`
    is the time of our kernel over native's, so above 1; `measured` says where the ratio comes from:
    a measurement (hardware, threads, versions), or a calculation.
    """

    operator: str
    device: str
    family: str
    applies: Callable[..., bool]
    ratio: float
    measured: str


def _dense(input: Any, weight: Any) -> bool:
    return weight.shape[1] == input.shape[1 - weight.dim()]


def _half(input: Any, weight: Any, *args: Any, **kwargs: Any) -> bool:
    return input.dtype.itemsize == 2 and _not_depthwise(input, weight)


def _full(input: Any, weight: Any, *args: Any, **kwargs: Any) -> bool:
    return input.dtype.itemsize > 2 and _not_depthwise(input, weight)


def _not_depthwise(input: Any, weight: Any, *args: Any, **kwargs: Any) -> bool:
    return weight.shape[1] > 1 or _dense(input, weight)


# On CUDA nothing is measured yet. Native runs at best at the peak of an H100's wgmma: 989 TFLOP/s
# in 16 bits, 495 in tf32, which it takes for float32 by default. Our 16-bit kernels use mma.sync,
# which usually reaches 50 to 65 % of wgmma's rate: 2. Those for float32 and float64 use FMA, 67
# TFLOP/s in float32: 7.4.
_CALCULATED = "calculated, H100"


def by_operator(*debts: Debt) -> dict[str, list[Debt]]:
    """Keyed, because every call of an operator asks, and most operators have no debt."""
    table: dict[str, list[Debt]] = {}
    for debt in debts:
        table.setdefault(debt.operator, []).append(debt)
    return table


DEBTS = by_operator(
    *(
        debt
        for operator in ("conv2d", "conv1x1", "conv1d", "convolution2d")
        for debt in (
            Debt(operator, "cuda", "16 bits, all but depthwise", _half, 2.0, _CALCULATED),
            Debt(operator, "cuda", "float32, float64, all but depthwise", _full, 7.4, _CALCULATED),
        )
    )
)


def prefers_native(operator: str, *args: Any, **kwargs: Any) -> bool:
    """Whether the table hands this call to native. Asked in mode "auto" only."""
    if operator not in DEBTS:
        return False
    input = args[0] if args else kwargs["input"]
    device = input.device.type
    for debt in DEBTS[operator]:
        if debt.device == device:
            try:
                if debt.applies(*args, **kwargs):
                    return True
            except (AttributeError, IndexError, TypeError):
                # Nonsense arguments: the operator refuses them in native's words.
                return False
    return False
