"""Whole networks, torch.nn against torchops.convert: `python bench/models.py resnet18 …`.

Each network is built once and copied: as it is, converted, and each of them under torch.compile. A
training step is forward, backward and SGD; inference is a forward in evaluation mode. All start
from the same weights and see the same images, so their losses must agree: exit code 1 where they
do not.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchops
from torchops.bench import units
from torchops.bench.environment import environment
from torchops.bench.memory import peak_memory, settle_allocator
from torchops.bench.models import NETWORKS
from torchops.bench.report import console, table
from torchops.bench.statistics import summarize
from torchops.bench.suites import network_name
from torchops.bench.timing import Effort, clock_for, measure, threads
from torchops.bench.workload import LAYOUTS, memory_format

FULL = Effort(seconds=10.0, fewest=7, most=31, sample_seconds=0.0, warm_up_seconds=0.0)
QUICK = Effort(seconds=0.0, fewest=3, most=3, sample_seconds=0.0, warm_up_seconds=0.0)

LOSS_STEPS = 3
# The first loss is a forward alone. Later ones follow from gradients, whose inputs of ReLU6 within
# rounding of a corner let them pass, or not: in MobileNetV2 on one image a hundredth of the whole
# gradient, in Wide ResNet-50-2 on four two hundredths, in torch.nn as in torchops (each against
# float64). bfloat16 keeps 8 bits.
FIRST_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
LATER_TOLERANCE = {"float32": 2e-2, "bfloat16": 5e-2}


class Run:
    """One way to run a network: its training step and its inference."""

    def __init__(self, model: nn.Module, images: Tensor, dtype: str, compiled: bool) -> None:
        self.model = model
        self._images = images
        self._labels = torch.arange(len(images), device=images.device) % 10
        self._autocast = torch.autocast(
            images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"
        )
        self._call: Callable[[Tensor], Tensor] = torch.compile(model) if compiled else model
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def train(self) -> Tensor:
        with self._autocast:
            loss = nn.functional.cross_entropy(self._call(self._images).float(), self._labels)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss

    def infer(self) -> Tensor:
        with torch.no_grad(), self._autocast:
            return self._call(self._images)


def runs(name: str, arguments: argparse.Namespace) -> dict[str, Run]:
    """Every way to run the network, from the same weights."""
    network = NETWORKS[name]
    torch.manual_seed(0)
    format = memory_format(arguments.layout, 4)
    model = network.build().to(arguments.device, memory_format=format)
    images = torch.randn(arguments.batch, *network.input).to(arguments.device, memory_format=format)
    made = {}
    for suffix in ("", " compiled") if arguments.compile else ("",):
        converted = torchops.convert(deepcopy(model))
        for who, twin in (("torch.nn", deepcopy(model)), ("torchops", converted)):
            made[who + suffix] = Run(twin, images, arguments.dtype, bool(suffix))
    return made


def measure_network(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per way to run the network; speeds are against torch.nn in eager mode."""
    made = runs(name, arguments)
    clock = clock_for(arguments.device)
    effort = QUICK if arguments.quick else FULL
    losses = {
        who: torch.tensor([run.train().item() for _ in range(LOSS_STEPS)])
        for who, run in made.items()
    }
    training = measure({who: run.train for who, run in made.items()}, clock, effort)
    peaks = {who: peak_memory(run.train, arguments.device) for who, run in made.items()}
    for run in made.values():
        run.model.eval()
    inference = measure({who: run.infer for who, run in made.items()}, clock, effort)
    reference = losses["torch.nn"]
    off_by = {who: (each - reference).abs() / reference.abs() for who, each in losses.items()}
    allowed = torch.full([LOSS_STEPS], LATER_TOLERANCE[arguments.dtype])
    allowed[0] = FIRST_TOLERANCE[arguments.dtype]
    return [
        {
            "network": name,
            "batch": arguments.batch,
            "run": who,
            "train": summarize(training[who]).median,
            "train_speed": speed(training, who),
            "infer": summarize(inference[who]).median,
            "infer_speed": speed(inference, who),
            "peak_memory": peaks[who],
            "loss_difference": off_by[who].max().item(),
            "losses_agree": bool((off_by[who] <= allowed).all()),
        }
        for who in made
    ]


def speed(samples: dict[str, list[float]], who: str) -> float:
    """How many times as fast as torch.nn, from neighbouring samples."""
    pairs = zip(samples["torch.nn"], samples[who], strict=True)
    return summarize([native / ours for native, ours in pairs]).median


def report(rows: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """What a file holds: the rows, and where and how they were measured."""
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "bench/models.py", *sys.argv[1:]]),
        "environment": asdict(environment(device)),
        "rows": rows,
    }


def show(rows: list[dict[str, Any]]) -> None:
    cells = [
        {
            "network": row["network"],
            "run": row["run"],
            "training step": units.seconds(row["train"]),
            "speed": f"{row['train_speed']:.2f}x",
            "inference": units.seconds(row["infer"]),
            "its speed": f"{row['infer_speed']:.2f}x",
            "peak memory": "–" if row["peak_memory"] is None else units.size(row["peak_memory"]),
            "loss differs by": f"{row['loss_difference']:.1e}",
            "": "✓" if row["losses_agree"] else "✗",
        }
        for row in rows
    ]
    console().print(table(cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("networks", nargs="*", default=["resnet18", "mobilenet_v2"])
    add("--batch", type=int, default=8)
    add("--dtype", choices=LATER_TOLERANCE, default="float32", help="bfloat16 is by autocast")
    add("--layout", choices=LAYOUTS, default="contiguous")
    add("--device", default="cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="1 is pinned to a core")
    add("--backend", choices=("own", "auto"), default="own")
    add("--compile", action="store_true", help="each of the two under torch.compile, too")
    add("--quick", action="store_true", help="three samples each")
    add("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()

    settle_allocator()
    rows: list[dict[str, Any]] = []
    with torchops.backend(arguments.backend), threads(arguments.threads):
        for name in map(network_name, arguments.networks):
            rows += measure_network(name, arguments)
    show(rows)
    if arguments.json:
        text = json.dumps(report(rows, arguments.device), indent=1)
        arguments.json.write_text(text + "\n")
    return 0 if all(row["losses_agree"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
