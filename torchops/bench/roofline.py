"""What this machine can do, measured in the same run: copy bandwidth and matmul rate.

Both are the best of several tries, because a roof is what the machine reaches, not what it reaches
on average. The copy counts bytes read plus bytes written, between buffers that no cache holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from torchops.bench.environment import last_level_cache
from torchops.bench.timing import Clock, Step, clock_for

_TRIES = 5
_MATMUL_SECONDS = 0.05
_COPY_BYTES = (128 << 20, 512 << 20)


@dataclass(frozen=True)
class Roofline:
    """Limits of one device, dtype and thread count."""

    bytes_per_second: float
    flops_per_second: float


def measure_rooflines(device: str, dtypes: Sequence[torch.dtype]) -> dict[torch.dtype, Roofline]:
    """Copy bandwidth, and the matmul rate of each dtype, with torch's present thread count.

    That of a 16-bit dtype is at least float32's.
    """
    clock = clock_for(device)
    copy = _copy_rate(device, clock)
    with _tf32_as_in_convolutions():
        rates = {dtype: _matmul_rate(device, dtype, clock) for dtype in dtypes}
        if any(dtype.itemsize == 2 for dtype in dtypes):
            # A processor that cannot multiply 16-bit numbers (torch's product of them then takes 50
            # times as long) can convert them.
            fastest = rates.get(torch.float32) or _matmul_rate(device, torch.float32, clock)
            rates |= {dtype: max(rates[dtype], fastest) for dtype in dtypes if dtype.itemsize == 2}
    return {dtype: Roofline(copy, rates[dtype]) for dtype in dtypes}


@contextmanager
def _tf32_as_in_convolutions() -> Iterator[None]:
    """On a GPU a float32 convolution may use tf32 by default, a matmul not."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def _copy_rate(device: str, clock: Clock) -> float:
    smallest, largest = _COPY_BYTES
    size = min(max(smallest, last_level_cache(device)), largest)
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best(lambda: target.copy_(source), clock)


def _matmul_rate(device: str, dtype: torch.dtype, clock: Clock) -> float:
    """Rate of the largest square product that stays under the time limit."""
    rate, size = 0.0, 512
    while True:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def multiply(a=a, b=b, out=out) -> torch.Tensor:
            return torch.mm(a, b, out=out)

        seconds = _best(multiply, clock)
        rate = max(rate, 2 * size**3 / seconds)
        # Twice the size takes eight times as long.
        if 8 * seconds > _MATMUL_SECONDS or size >= 8192:
            return rate
        size *= 2


def _best(step: Step, clock: Clock) -> float:
    step()
    return min(clock(step, 1) for _ in range(_TRIES))
