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


def _dense(input: Any, weight: Any) -> bool:
    return weight.shape[1] == input.shape[-3]


def _grouped(input: Any, weight: Any) -> bool:
    return 1 < weight.shape[1] < input.shape[-3]


def _dense_float32(input: Any, weight: Any, *args: Any, **kwargs: Any) -> bool:
    return input.dtype is torch.float32 and _dense(input, weight)


def _dense_bfloat16(input: Any, weight: Any, *args: Any, **kwargs: Any) -> bool:
    return input.dtype is torch.bfloat16 and _dense(input, weight)


def _grouped_float(input: Any, weight: Any, *args: Any, **kwargs: Any) -> bool:
    return input.dtype in (torch.float32, torch.bfloat16) and _grouped(input, weight)


_XEON = "Xeon with AVX-512 and AMX, one thread, N=8"

# Whether native multiplies bfloat16 in hardware of its own (AMX tiles, vdpbf16ps), which no kernel
# here does yet. With AVX2 alone it does not: on Zen 3, one thread, its bfloat16 channels_last 1x1
# convolutions took 7 times ours forward and 11 times backward. Asked once: hardware does not change.
_NATIVE_BFLOAT16 = torch.cpu._is_avx512_supported() or not torch.cpu._is_avx2_supported()

# Figures: torchops bench --suite resnet50 --quick --threads 1, fp32 in bench/results; the others by
# hand on the same machine.
DEBTS: tuple[Debt, ...] = (
    Debt("conv2d", "cpu", "one group, float32", _dense_float32, 1.3, _XEON),
    Debt("conv2d", "cpu", "several channels a group", _grouped_float, 6.0, _XEON),
    Debt("conv1x1", "cpu", "float32", _dense_float32, 1.1, _XEON),
)
if _NATIVE_BFLOAT16:
    DEBTS += (
        Debt("conv2d", "cpu", "one group, bfloat16", _dense_bfloat16, 5.5, _XEON),
        Debt("conv1x1", "cpu", "bfloat16", _dense_bfloat16, 5.5, _XEON),
    )


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
