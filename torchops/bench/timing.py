"""How long a step takes, beside its peers and under the same conditions.

Samples of all contestants are interleaved, so that a machine that speeds up or slows down does so
for every one of them, and ratios are taken between neighbours. Every second round runs backwards,
A B B A: in A B A B a contestant came out 2 % behind itself. A step too short for the clock is
called several times per sample. The garbage collector is off while the clock runs.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

Step = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How hard to measure: rounds until `seconds` have passed, within [fewest, most] rounds."""

    seconds: float
    fewest: int
    most: int
    sample_seconds: float
    warm_up_seconds: float


FULL = Effort(seconds=2.0, fewest=11, most=101, sample_seconds=5e-3, warm_up_seconds=0.2)
QUICK = Effort(seconds=0.4, fewest=5, most=31, sample_seconds=1e-3, warm_up_seconds=0.02)


class Clock(Protocol):
    """Times `calls` calls of a step, in seconds per call."""

    def __call__(self, step: Step, calls: int) -> float: ...


def wall_clock(step: Step, calls: int) -> float:
    """Elapsed time: the only one that counts all threads together."""
    return _elapsed(time.perf_counter_ns, step, calls)


def thread_clock(step: Step, calls: int) -> float:
    """Processor time of the calling thread, for steps that run on it alone.

    On a quiet machine this is the elapsed time. On a busy one it leaves out what other processes
    do on the same core, which may be most of the elapsed time.
    """
    return _elapsed(time.thread_time_ns, step, calls)


def _elapsed(now: Callable[[], int], step: Step, calls: int) -> float:
    start = now()
    for _ in range(calls):
        step()
    return (now() - start) / calls * 1e-9


class CudaClock:
    """CUDA events around each call, with the L2 cache cleared in front of it.

    Clearing takes longer on the device than a launch takes on the host, so that the host is never
    what is timed.
    """

    def __init__(self, device: str) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._flush = torch.empty(4 * properties.L2_cache_size, dtype=torch.int8, device=device)

    def __call__(self, step: Step, calls: int) -> float:
        pairs = []
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            start.record()
            step()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self._flush.device)
        return sum(start.elapsed_time(end) for start, end in pairs) / calls * 1e-3


def clock_for(device: str) -> Clock:
    """The clock of a device, for torch's present thread count."""
    if torch.device(device).type == "cuda":
        return CudaClock(device)
    return thread_clock if torch.get_num_threads() == 1 else wall_clock


def measure(steps: Mapping[str, Step], clock: Clock, effort: Effort) -> dict[str, list[float]]:
    """Seconds per call of every step, one sample of each per round."""
    with _no_garbage_collection():
        calls = {name: _calibrate(step, clock, effort) for name, step in steps.items()}
        names = list(steps)
        samples: dict[str, list[float]] = {name: [] for name in names}
        start = time.perf_counter()
        for round in range(effort.most):
            if round >= effort.fewest and time.perf_counter() - start >= effort.seconds:
                break
            for name in names if round % 2 == 0 else reversed(names):
                samples[name].append(clock(steps[name], calls[name]))
        return samples


def _calibrate(step: Step, clock: Clock, effort: Effort) -> int:
    """Warms `step` up and says how many calls make one sample."""
    spent, fastest = 0.0, math.inf
    while spent < effort.warm_up_seconds or math.isinf(fastest):
        # The first call pays for page faults, code caches and compilation: it does not count.
        spent += clock(step, 1)
        seconds = clock(step, 1)
        spent, fastest = spent + seconds, min(fastest, seconds)
    return max(1, math.ceil(effort.sample_seconds / max(fastest, 1e-9)))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs torch on `count` threads; a single one is pinned to a core, where the system can."""
    before = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(count)
    try:
        if count == 1 and cores:
            # The last core: interrupts are mostly served by the first.
            os.sched_setaffinity(0, {max(cores)})
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(before)
