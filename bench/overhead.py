"""Host cost of one layer call on tiny tensors, ours against native: `python bench/overhead.py`.

Tensors of a few elements take no time to compute, so what is left is Python, dispatch, checks and
autograd. The limits are those of the design: 2.5 times native for convolutions and batch-norm,
3 times for pools. Exit code 1 where a layer is over its limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import torchops
import torchops.nn as tnn
from torchops.bench.report import console, table
from torchops.bench.statistics import summarize
from torchops.bench.timing import Effort, measure, thread_clock, threads

EFFORT = Effort(seconds=1.0, fewest=21, most=201, sample_seconds=2e-3, warm_up_seconds=0.1)


class Layer(NamedTuple):
    """A layer of torch.nn and torchops.nn, and how much dearer ours may be."""

    name: str
    arguments: tuple[int, ...]
    limit: float


LAYERS = (
    Layer("Conv1d", (4, 4, 3), 2.5),
    Layer("Conv2d", (4, 4, 3), 2.5),
    Layer("BatchNorm2d", (4,), 2.5),
    Layer("MaxPool2d", (2,), 3.0),
    Layer("AvgPool2d", (2,), 3.0),
    Layer("AdaptiveAvgPool2d", (1,), 3.0),
    Layer("AdaptiveMaxPool2d", (1,), 3.0),
)


def calls(layer: nn.Module) -> Iterator[tuple[str, Callable[[], object]]]:
    """The three ways that a layer is called."""
    input = torch.randn(1, 4, 4) if isinstance(layer, nn.Conv1d) else torch.randn(1, 4, 4, 4)
    needs_grad = input.clone().requires_grad_()
    grad_output = torch.ones_like(layer(input))

    def no_grad() -> Tensor:
        with torch.no_grad():
            return layer(input)

    def forward() -> Tensor:
        return layer(needs_grad)

    def forward_backward() -> None:
        layer(needs_grad).backward(grad_output)

    yield "no_grad", no_grad
    yield "forward", forward
    yield "forward+backward", forward_backward


def compare(name: str, arguments: tuple[int, ...], limit: float) -> Iterator[dict[str, str]]:
    """One row of the table per way to call the layer."""
    ours, native = (calls(getattr(library, name)(*arguments)) for library in (tnn, nn))
    for (way, our), (_, peer) in zip(ours, native, strict=True):
        samples = measure({"ours": our, "native": peer}, thread_clock, EFFORT)
        pairs = zip(samples["ours"], samples["native"], strict=True)
        ratio = summarize([a / b for a, b in pairs]).median
        micro = {f"{who} µs": f"{summarize(samples[who]).median * 1e6:.1f}" for who in samples}
        over = {"limit": str(limit), "over": "over" if ratio > limit else ""}
        yield {"layer": name, "call": way, **micro, "ratio": f"{ratio:.2f}", **over}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", default="", help="only layers whose name contains this")
    chosen = parser.parse_args().layer.lower()
    with torchops.backend("auto"), threads(1):  # what people have; it runs our own here
        rows = [row for layer in LAYERS if chosen in layer.name.lower() for row in compare(*layer)]
    console().print(table(rows))
    return 1 if any(row["over"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
