"""Runs a plan: every problem in every setting and direction, beside its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import groupby
from typing import Any

import torch

import torchops
from torchops.bench.counts import count
from torchops.bench.environment import Others, environment, last_level_cache
from torchops.bench.memory import settle_allocator
from torchops.bench.problem import Problem
from torchops.bench.results import Report, Row, roofline_name
from torchops.bench.roofline import Roofline, measure_rooflines
from torchops.bench.subject import Case, Subject
from torchops.bench.timing import FULL, QUICK, threads

# Bytes between two uses of a buffer, by `quick`: past any core's own cache, and past the shared one
# where that is up to half a gigabyte; more would cost minutes and gigabytes per run.
_ROTATION_LIMIT = {True: 256 << 20, False: 512 << 20}


@dataclass(frozen=True)
class Plan:
    """Everything that a run does. Cases of one thread count stand together."""

    cases: Sequence[Case]
    directions: Sequence[str]
    peers: Sequence[str]
    device: str
    quick: bool
    command: str

    def directions_of(self, problem: Problem) -> list[str]:
        """A problem in evaluation has no backward."""
        return [way for way in self.directions if way == "fwd" or problem.training]

    def rows(self) -> list[tuple[Case, str]]:
        """Every row to come."""
        return [
            (case, direction)
            for case in self.cases
            for direction in self.directions_of(case.problem)
        ]


def run(plan: Plan, on_row: Callable[[Row], None] = lambda row: None) -> Report:
    """Measure every row of `plan` and report it; `on_row` sees each as soon as it is there.

    An interrupt ends the run early: the report holds the rows that were finished.
    """
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    settle_allocator()
    where = environment(plan.device)
    others = Others()
    rooflines: dict[str, Roofline] = {}
    rows: list[Row] = []
    with suppress(KeyboardInterrupt), torchops.backend("own"), _cudnn_benchmark():
        for thread_count, group in groupby(plan.cases, key=lambda case: case.threads):
            cases = list(group)
            dtypes = list(dict.fromkeys(case.setting.dtype for case in cases))
            with threads(thread_count):
                measured = measure_rooflines(plan.device, dtypes)
                for dtype, roofline in measured.items():
                    rooflines[roofline_name(dtype_name(dtype), thread_count)] = roofline
                for case in cases:
                    for row in _rows(plan, case, measured[case.setting.dtype]):
                        rows.append(row)
                        on_row(row)
    return Report(
        command=plan.command,
        created=created,
        device=plan.device,
        environment=where,
        rooflines=rooflines,
        rotation_bytes=rotation_bytes(plan),
        quick=plan.quick,
        others=others.cores(),
        rows=rows,
    )


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Lets cuDNN try its algorithms, as who trains on a GPU does: the peer at its best."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=True,
        deterministic=cudnn.deterministic,
        allow_tf32=cudnn.allow_tf32,
    ):
        yield


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def rotation_bytes(plan: Plan) -> int:
    """What the buffers of a bandwidth-bound row add up to; 0 on a GPU, whose clock clears L2."""
    if torch.device(plan.device).type == "cuda":
        return 0
    return min(2 * last_level_cache(plan.device), _ROTATION_LIMIT[plan.quick])


def _rows(plan: Plan, case: Case, roofline: Roofline) -> Iterator[Row]:
    subject = Subject(case, plan.peers)
    limits = roofline.bytes_per_second, roofline.flops_per_second
    effort = QUICK if plan.quick else FULL
    for direction in plan.directions_of(case.problem):
        floor = count(case.problem, case.setting.dtype, direction)
        bandwidth_bound = floor.bandwidth_bound(*limits)
        rotate = rotation_bytes(plan) if bandwidth_bound else 0
        measured: dict[str, Any]
        try:
            measured = subject.measure(direction, effort, floor.bytes, rotate)
        except Exception as failure:  # One bad call must not take the other rows with it.
            measured = {"error": f"{type(failure).__name__}: {failure}"}
        yield Row(
            problem=str(case.problem),
            op=case.problem.op,
            family=case.problem.family,
            dtype=dtype_name(case.setting.dtype),
            layout=case.setting.layout,
            direction=direction,
            threads=case.threads,
            bytes=floor.bytes,
            flops=floor.flops,
            floor=floor.seconds(*limits),
            bandwidth_bound=bandwidth_bound,
            multiplicity=dict(case.multiplicity),
            **measured,
        )
