"""What is tested: each module here lists the cases of one operator; test_<aspect>.py run them all.

A Case pairs a function of torchops with its native twin. A Sample is one call: the shapes of the
tensor arguments and the other arguments by name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Sample:
    """Shapes of the positional tensor arguments (None where absent), and keyword arguments."""

    shapes: tuple[tuple[int, ...] | None, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = "_".join("x".join(map(str, s)) if s is not None else "none" for s in self.shapes)
        return "-".join([shapes, *(f"{k}={v}".replace(" ", "") for k, v in self.kwargs.items())])


@dataclass(frozen=True)
class BadInput:
    """A call that native refuses; ours must refuse it with the same exception type and text."""

    name: str
    call: Callable[[Callable[..., Any]], Any]


@dataclass(frozen=True)
class Case:
    """One operator: ours, native's, and the calls to compare them on.

    `make_tensors` overrides how the tensor arguments of a sample are drawn (standard normal by
    default), `gradcheck_samples` names the small samples for numerical differentiation (inputs of
    piecewise operators must keep away from ties: see `distinct`).

    `differentiable` are the positions of the arguments that have gradients (default: all), and
    `mutated` of those that a call updates in place, as running statistics are. `exact` operators
    select instead of computing: their outputs equal native's bit for bit. `native_dtypes` are those
    that native survives; elsewhere float64 alone is the reference. `scale(sample, tensors)` is the
    magnitude of terms that cancel in the results, where the results do not show it. `reference` is
    what derivatives beyond the first are compared with, where native's own are wrong.
    """

    name: str
    own: Callable[..., Any]
    native: Callable[..., Any]
    samples: list[Sample]
    gradcheck_samples: list[Sample]
    bad_inputs: list[BadInput] = field(default_factory=list)
    make_tensors: Callable[[Sample, torch.Generator], list[Tensor | None]] | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    differentiable: tuple[int, ...] | None = None
    mutated: tuple[int, ...] = ()
    exact: bool = False
    native_dtypes: tuple[torch.dtype, ...] = FLOATS
    scale: Callable[[Sample, list[Tensor | None]], float] | None = None
    composed: Callable[[Sample], bool] = lambda sample: False
    reference: Callable[..., Any] | None = None

    def updates(self, sample: Sample) -> bool:
        """Whether the call writes to one of its arguments."""
        written = any(sample.shapes[position] is not None for position in self.mutated)
        return written and sample.kwargs.get("training", True)

    def tensors(
        self,
        sample: Sample,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.contiguous_format,
        device: str = "cpu",
        seed: int = 0,
    ) -> list[Tensor | None]:
        """The sample's tensor arguments: the same values in every dtype, up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (self.make_tensors or normal)(sample, generator)
        return [
            None if t is None else with_format(t.to(device, dtype), memory_format) for t in drawn
        ]


def normal(sample: Sample, generator: torch.Generator) -> list[Tensor | None]:
    return [
        None if shape is None else torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in sample.shapes
    ]


def distinct(sample: Sample, generator: torch.Generator) -> list[Tensor | None]:
    """Values at least 0.1 apart, so that finite differences never change a maximum."""
    tensors: list[Tensor | None] = []
    for shape in sample.shapes:
        count = torch.Size(shape).numel()
        order = torch.randperm(count, generator=generator).to(torch.float64)
        tensors.append(((order - count / 2) * 0.1).reshape(shape))
    return tensors


def with_format(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """channels_last for 4-D tensors, plain contiguous for every other rank."""
    if tensor.dim() != 4:
        return tensor.contiguous()
    return tensor.contiguous(memory_format=memory_format)


def all_cases() -> list[Case]:
    """The CASES of every module in this package, by name."""
    cases: list[Case] = []
    for module in pkgutil.iter_modules(__path__):
        cases += importlib.import_module(f"{__name__}.{module.name}").CASES
    return cases
