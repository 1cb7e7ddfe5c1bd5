"""One case under measurement: its tensors, the contestants, and what is learnt about them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch._functorch import config as functorch_config

import torchops
from torchops import _backend
from torchops._tolerance import Result
from torchops.bench import native
from torchops.bench.match import match
from torchops.bench.memory import peak_memory
from torchops.bench.problem import Problem
from torchops.bench.results import Match
from torchops.bench.statistics import summarize
from torchops.bench.steps import rotation, steps
from torchops.bench.timing import Effort, clock_for, measure
from torchops.bench.workload import Forward, Setting, Workload, forward

PEERS = ("eager", "compile")

# A call that needs more copies than this is so small that the host's time is what is measured.
_MOST_COPIES = 1000


@dataclass(frozen=True)
class Case:
    """A problem and how it is run; `multiplicity` says how often each network calls it."""

    problem: Problem
    setting: Setting
    threads: int
    multiplicity: Mapping[str, int] = field(default_factory=dict)


class Subject:
    """Measures one case, in one direction at a time."""

    def __init__(self, case: Case, peers: Sequence[str]) -> None:
        self._case = case
        self._peers = peers

    @cached_property
    def _workload(self) -> Workload:
        return Workload(self._case.problem, self._case.setting)

    @cached_property
    def _matches(self) -> dict[str, Result]:
        with _fallback_is_an_error():
            return match(torchops.functional, self._case.problem, self._workload)

    @cached_property
    def _contestants(self) -> dict[str, Forward]:
        peer = forward(native, self._case.problem)
        contestants = {"ours": forward(torchops.functional, self._case.problem)}
        for name in self._peers:
            contestants[name] = peer if name == "eager" else _compiled(peer)
        return contestants

    def measure(
        self, direction: str, effort: Effort, bytes_per_call: int, rotation_bytes: int
    ) -> dict[str, Any]:
        """The measured fields of a Row."""
        outcome = self._matches[direction]
        copies = min(rotation(bytes_per_call, rotation_bytes), _MOST_COPIES)
        workloads = [self._workload, *(self._workload.copy() for _ in range(copies - 1))]
        calls = steps(self._contestants, direction, workloads)
        device = self._case.setting.device
        samples = measure(calls, clock_for(device), effort)
        peaks = {name: peak_memory(call, device) for name, call in calls.items()}
        ours = samples["ours"]
        return {
            "times": {name: summarize(times) for name, times in samples.items()},
            "ratios": {
                name: summarize([peer / our for our, peer in zip(ours, samples[name], strict=True)])
                for name in self._peers
            },
            "peak_memory": {name: peak for name, peak in peaks.items() if peak is not None},
            "match": Match(outcome.ok, outcome.ulps, outcome.reason),
        }


def _compiled(peer: Forward) -> Forward:
    # Every problem is another function, and only the present one is ever called again.
    torch._dynamo.reset()
    # A donated buffer is gone after one backward, and a timed backward runs again and again.
    functorch_config.donated_buffer = False
    return torch.compile(peer, fullgraph=True, dynamic=False)


@contextmanager
def _fallback_is_an_error() -> Iterator[None]:
    """A native call must not be reported as our own."""
    _backend._warned.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", torchops.FallbackWarning)
        yield
