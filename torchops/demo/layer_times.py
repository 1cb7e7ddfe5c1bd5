"""Forward + backward time of every layer that torchops replaces, alone on the input it gets."""

import copy
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import torchops

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class LayerTime(NamedTuple):
    layer: str
    input: str
    native: float  # seconds, median
    converted: float


def layer_times(model: nn.Module, images: Tensor, repeats: int) -> list[LayerTime]:
    """In call order. A batch-norm and the activation that follows it are one layer, as they are
    after conversion; layers that torchops leaves to torch.nn are not in the list."""
    times = []
    for layer, input in recorded_layers(model, images):
        converted = torchops.convert(copy.deepcopy(layer))
        if any(type(module).__module__.startswith("torchops.nn") for module in converted.modules()):
            native_time, converted_time = median_times(layer, converted, input, repeats)
            shape = "x".join(map(str, input.shape))
            times.append(LayerTime(describe(layer), shape, native_time, converted_time))
    return times


def recorded_layers(model: nn.Module, images: Tensor) -> list[tuple[nn.Sequential, Tensor]]:
    """The leaf modules of a forward pass, each in a Sequential of its own, with their inputs."""
    calls: list[tuple[list[nn.Module], Tensor]] = []
    previous: Any = None  # the latest layer and its output

    def before(module: nn.Module, inputs: tuple[Tensor]) -> None:
        (input,) = inputs
        if isinstance(module, ACTIVATIONS) and previous is not None:
            layer, output = previous
            if isinstance(layer, BATCH_NORMS) and output is input:
                calls[-1][0].append(module)
                return
        calls.append(([module], input.detach().clone().requires_grad_(input.requires_grad)))

    def after(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal previous
        previous = module, output

    model = copy.deepcopy(model).train()
    handles = []
    for module in model.modules():
        if next(module.children(), None) is None:
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after))
    model(images)
    for handle in handles:
        handle.remove()
    return [(nn.Sequential(*modules), input) for modules, input in calls]


def median_times(
    native: nn.Module, converted: nn.Module, input: Tensor, repeats: int
) -> tuple[float, float]:
    """Both in turn, so that they see the machine in the same state."""
    times: dict[nn.Module, list[float]] = {native: [], converted: []}
    for _ in range(repeats):
        for layer, seconds in times.items():
            seconds.append(forward_backward_time(layer, input))
    return statistics.median(times[native]), statistics.median(times[converted])


def forward_backward_time(layer: nn.Module, input: Tensor) -> float:
    wanted = list(layer.parameters()) + ([input] if input.requires_grad else [])
    start = time.perf_counter()
    output = layer(input)
    middle = time.perf_counter()
    grad_output = torch.ones_like(output)
    restart = time.perf_counter()
    torch.autograd.grad(output, wanted, grad_output)
    return time.perf_counter() - restart + middle - start


def describe(layer: nn.Sequential) -> str:
    return " + ".join(map(describe_module, layer))


def describe_module(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        kernel = "x".join(map(str, module.kernel_size))
        stride = f" /{module.stride[0]}" if max(module.stride) > 1 else ""
        groups = f" groups {module.groups}" if module.groups > 1 else ""
        return f"{name} {module.in_channels}-{module.out_channels} {kernel}{stride}{groups}"
    return name
