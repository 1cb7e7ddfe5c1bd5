"""A report as a run leaves it, made without running anything."""

import torch

from torchops.bench.counts import count
from torchops.bench.environment import Environment
from torchops.bench.results import Match, Report, Row, roofline_name
from torchops.bench.roofline import Roofline
from torchops.bench.statistics import Summary
from torchops.bench.suites import suite

ROOF = Roofline(bytes_per_second=20e9, flops_per_second=80e9)


def around(median: float, spread: float = 0.02, samples: int = 11) -> Summary:
    """A summary whose quartiles lie `spread` of the median to either side."""
    return Summary(median, median * (1 - spread), median * (1 + spread), samples)


def row(problem, direction="fwd", *, calls=None, ours=1.0, ratio=2.0, match=None, error="") -> Row:
    """A row of `problem` in float32; `ours` is in units of its floor."""
    floor = count(problem, torch.float32, direction)
    seconds = ours * floor.seconds(ROOF.bytes_per_second, ROOF.flops_per_second)
    measured = {
        "times": {"ours": around(seconds), "eager": around(seconds * ratio)},
        "ratios": {"eager": around(ratio)},
        "peak_memory": {"ours": 2 * floor.bytes, "eager": 3 * floor.bytes},
        "match": match or Match(True, 0.5),
    }
    return Row(
        problem=str(problem),
        op=problem.op,
        family=problem.family,
        dtype="float32",
        layout="contiguous",
        direction=direction,
        threads=1,
        bytes=floor.bytes,
        flops=floor.flops,
        floor=floor.seconds(ROOF.bytes_per_second, ROOF.flops_per_second),
        bandwidth_bound=floor.bandwidth_bound(ROOF.bytes_per_second, ROOF.flops_per_second),
        multiplicity=calls or {},
        **({"error": error} if error else measured),
    )


def report(rows) -> Report:
    return Report(
        command="torchops bench --suite resnet50 --threads 1",
        created="2026-01-31T12:00:00+00:00",
        device="cpu",
        environment=Environment(
            cpu="AMD EPYC 9B14",
            isa="avx512",
            cores=2,
            gpu="",
            last_level_cache=32 << 20,
            system="Linux",
            python="3.11.7",
            torch="2.13.0",
            torchops="0.1.0",
            commit="0123456789ab",
        ),
        rooflines={roofline_name("float32", 1): ROOF},
        rotation_bytes=64 << 20,
        quick=False,
        others=0.1,
        rows=list(rows),
    )


def resnet50() -> Report:
    """Every layer of ResNet-50 in both directions; the peer wins every seventh row."""
    rows = []
    for problem, calls in suite("resnet50", batch=8).items():
        for direction in ("fwd", "bwd"):
            ratio = 0.7 if len(rows) % 7 == 6 else 1.0 + len(rows) % 5
            ours = 1.2 + len(rows) % 4
            rows.append(row(problem, direction, calls={"resnet50": calls}, ours=ours, ratio=ratio))
    return report(rows)
