"""Whether a call's result is right: against float64 of the same values, by the tolerance rule.

Where an activation has a kink, an input that is exactly on it in one arithmetic is beside it in
another, and the gradient jumps by its full size. Neither is wrong, so no gradient is sent into
elements that close to a kink.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchops._tolerance import Result, check, ulp
from torchops.bench import native
from torchops.bench.problem import Problem
from torchops.bench.workload import Forward, Workload, forward

_KINKS = {"relu": (0.0,), "leaky_relu": (0.0,), "relu6": (0.0, 6.0), "hardswish": (-3.0, 3.0)}
_KINK_ULPS = 4


def match(library: Any, problem: Problem, workload: Workload) -> dict[str, Result]:
    """The worst comparison of each direction: "fwd" is the output, "bwd" every gradient."""
    exact = _doubled(workload)
    near = _near_kink(problem, exact, workload.grad_output.dtype)
    exact.grad_output.masked_fill_(near, 0.0)
    ours = workload.copy()
    ours.grad_output.masked_fill_(near, 0.0)
    peers = ours.copy()

    reference = _results(forward(native, problem), exact)
    expected = _results(forward(native, problem), peers)
    worst: dict[str, Result] = {}
    for name, actual in _results(forward(library, problem), ours).items():
        # What lies between the layers of a composition is rounded to the storage dtype.
        dtype = workload.grad_output.dtype if problem.op == "conv2d_bn_act" else actual.dtype
        result = check(actual, reference[name], expected[name], dtype=dtype)
        if not result:
            result = replace(result, reason=f"{name}: {result.reason}")
        direction = "bwd" if name.startswith("grad_") else "fwd"
        if direction not in worst or _share(result) > _share(worst[direction]):
            worst[direction] = result
    return worst


def _share(result: Result) -> float:
    """The part of the allowed error that is used up."""
    return result.error / result.allowed if result.allowed else float(not result.ok)


def _results(forward: Forward, workload: Workload) -> dict[str, Tensor]:
    """Everything that one training step, or one evaluation, of the layer leaves behind."""
    tensors = workload.tensors
    with torch.set_grad_enabled(bool(workload.differentiable)):
        output = forward(**tensors)
    results = {"output": output.detach()}
    results |= {name: tensors[name] for name in tensors if name.startswith("running_")}
    if workload.differentiable:
        inputs = [tensors[name] for name in workload.differentiable]
        gradients = torch.autograd.grad(output, inputs, workload.grad_output)
        names = [f"grad_{name}" for name in workload.differentiable]
        results |= dict(zip(names, gradients, strict=True))
    return results


def _doubled(workload: Workload) -> Workload:
    exact = workload.copy()
    exact.grad_output = exact.grad_output.double()
    exact.tensors = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad)
        for name, tensor in exact.tensors.items()
    }
    return exact


def _near_kink(problem: Problem, exact: Workload, dtype: torch.dtype) -> Tensor:
    """Where the activation's argument is closer to a kink than rounding in `dtype` moves it."""
    near = torch.zeros_like(exact.grad_output, dtype=torch.bool)
    for kink in _KINKS.get(problem.activation or "", ()):
        linear = forward(native, replace(problem, activation=None))
        with torch.no_grad():
            argument = linear(**exact.copy().tensors)
        margin = _KINK_ULPS * ulp(argument.abs().max().item(), dtype)
        near |= (argument - kink).abs() <= margin
    return near
