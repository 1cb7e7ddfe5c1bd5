"""The tuning table of `backend("auto")`: families of problems that native was measured to win.

Every entry is a debt, to be paid back by a faster kernel; the aim is an empty table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Debt:
    """One family of problems that `backend("auto")` hands to native.

    `applies` takes the operator's own arguments and decides from what Python knows (shapes, dtype,
    stride, groups, whether a gradient is asked for): it runs on every call of the operator. `ratio`
    is the time of our kernel over native's, so above 1; `measured` says where the ratio comes from
    (hardware, threads, versions).
    """

    operator: str
    device: str
    family: str
    applies: Callable[..., bool]
    ratio: float
    measured: str


def _dense(input: Any, weight: Any) -> bool:
    return weight.shape[1] == input.shape[-3]


def _bfloat16_groups(input: Any, weight: Any, *args: Any, **kwargs: Any) -> bool:
    return input.dtype is torch.bfloat16 and not _dense(input, weight) and weight.shape[1] >= 16


def _half(input: Any, weight: Any, *args: Any, **kwargs: Any) -> bool:
    return input.dtype.itemsize == 2 and _not_depthwise(input, weight)


def _full(input: Any, weight: Any, *args: Any, **kwargs: Any) -> bool:
    return input.dtype.itemsize > 2 and _not_depthwise(input, weight)


def _not_depthwise(input: Any, weight: Any, *args: Any, **kwargs: Any) -> bool:
    return weight.shape[1] > 1 or _dense(input, weight)


_GRANITE_RAPIDS = "Granite Rapids, mb8_g2ic512ih14oc512kh3ph1"

# Whether native multiplies bfloat16 in hardware of its own (AMX tiles, vdpbf16ps), which here only
# dense convolutions do. With AVX2 alone it does not: on Zen 3, native took 7 and 16 times our time
# forward and backward for conv1x1:mb8_ic1024ih14oc256, 19 and 20 for
# conv2d:mb8_g32ic128ih56oc128kh3ph1 (torchops bench PROBLEM --dtype bf16 --layout channels_last
# --threads 1 --quick). Asked once: hardware does not change.
_NATIVE_BFLOAT16 = torch.cpu._is_avx512_supported() or not torch.cpu._is_avx2_supported()

# On CUDA nothing is measured yet. Native runs at best at the peak of an H100's wgmma: 989 TFLOP/s
# in 16 bits, 495 in tf32, which it takes for float32 by default. Our 16-bit kernels use mma.sync,
# which usually reaches 50 to 65 % of wgmma's rate: 2. Those for float32 and float64 use FMA, 67
# TFLOP/s in float32: 7.4.
_CALCULATED = "calculated, H100"

_ON_CUDA = (
    Debt("conv2d", "cuda", "16 bits, all but depthwise", _half, 2.0, _CALCULATED),
    Debt("conv1x1", "cuda", "16 bits", _half, 2.0, _CALCULATED),
    Debt("conv2d", "cuda", "float32, float64, all but depthwise", _full, 7.4, _CALCULATED),
    Debt("conv1x1", "cuda", "float32, float64", _full, 7.4, _CALCULATED),
)
_GROUPS = "bfloat16, groups of 16 channels up"
_ON_CPU = (Debt("conv2d", "cpu", _GROUPS, _bfloat16_groups, 5.6, _GRANITE_RAPIDS),)


def by_operator(*debts: Debt) -> dict[str, list[Debt]]:
    """Keyed, because every call of an operator asks, and most operators have no debt."""
    table: dict[str, list[Debt]] = {}
    for debt in debts:
        table.setdefault(debt.operator, []).append(debt)
    return table


DEBTS = by_operator(*_ON_CUDA, *(_ON_CPU if _NATIVE_BFLOAT16 else ()))


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
