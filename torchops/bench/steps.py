"""What is timed: one forward or one backward call, over buffers that rotate past the cache.

In a network the input of a layer has left the cache, or a whole batch of tensors has passed since.
A benchmark that reads the same few megabytes again and again measures the cache instead. So a
bandwidth-bound step walks through copies of its tensors that together exceed the last-level cache.
Contestants start at different copies: the second would find in the cache what the first has read.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import torch
from torch import Tensor

from torchops.bench.timing import Step
from torchops.bench.workload import Forward, Workload


def steps(
    contestants: Mapping[str, Forward], direction: str, workloads: list[Workload]
) -> dict[str, Step]:
    """One step per contestant, on workloads that they share."""
    found = {}
    for index, (name, forward) in enumerate(contestants.items()):
        start = index * len(workloads) // len(contestants)
        found[name] = step(forward, direction, workloads[start:] + workloads[:start])
    return found


def step(forward: Forward, direction: str, workloads: list[Workload]) -> Step:
    """One call per step, each on the next of `workloads`."""
    if direction == "fwd":
        return _forward_step(forward, workloads)
    return _backward_step(forward, workloads)


def _forward_step(forward: Forward, workloads: list[Workload]) -> Step:
    arguments = cycle([workload.tensors for workload in workloads])
    if workloads[0].differentiable:
        return lambda: forward(**next(arguments))

    def evaluate() -> object:
        with torch.no_grad():
            return forward(**next(arguments))

    return evaluate


def _backward_step(forward: Forward, workloads: list[Workload]) -> Step:
    graphs = cycle([_graph(forward, workload) for workload in workloads])

    def backward() -> object:
        output, inputs, grad_output = next(graphs)
        return torch.autograd.grad(output, inputs, grad_output, retain_graph=True)

    return backward


def _graph(forward: Forward, workload: Workload) -> tuple[Tensor, list[Tensor], Tensor]:
    # A compiled batch-norm keeps its running statistics for backward, and the forward of another
    # contestant would change them.
    tensors = {
        name: tensor.clone() if name.startswith("running_") else tensor
        for name, tensor in workload.tensors.items()
    }
    inputs = [tensors[name] for name in workload.differentiable]
    return forward(**tensors), inputs, workload.grad_output


def rotation(bytes_per_call: int, target: int) -> int:
    """How many copies make the bytes between two uses of one buffer reach `target`."""
    return max(1, -(-target // max(bytes_per_call, 1)))
