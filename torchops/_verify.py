"""`torchops verify`: every operator on this machine, forward and gradients, against float64.

Operator x memory format x dtype, by the tolerance rule of torchops/_tolerance.py. The reference is
the native twin in float64 on the same values; native in the same dtype sets what is allowed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchops import _C, FallbackWarning, _tolerance, backend
from torchops import functional as TF
from torchops._info import OPERATORS
from torchops.bench import native as peers

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# ---- the problems ------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One call: shapes of the tensor arguments and the other arguments, both by name.

    Sizes are odd on purpose: vectors end in the middle, and blocks have rests.
    """

    tensors: dict[str, tuple[int, ...]]
    arguments: dict[str, Any]

    def __str__(self) -> str:
        shapes = (f"{name} {'x'.join(map(str, shape))}" for name, shape in self.tensors.items())
        return ", ".join([*shapes, *(f"{k}={v}" for k, v in self.arguments.items())])


def _conv(input: tuple[int, ...], weight: tuple[int, ...], **arguments: Any) -> Problem:
    return Problem({"input": input, "weight": weight, "bias": weight[:1]}, arguments)


def _pool(input: tuple[int, ...], *window: Any, **arguments: Any) -> Problem:
    names = ("kernel_size", "stride", "padding")
    return Problem({"input": input}, {**dict(zip(names, window, strict=False)), **arguments})


def _adaptive(input: tuple[int, ...], output_size: Any, **arguments: Any) -> Problem:
    return Problem({"input": input}, {"output_size": output_size, **arguments})


def _norm(input: tuple[int, ...], residual: bool = False, **arguments: Any) -> Problem:
    names = ("running_mean", "running_var", "weight", "bias")
    tensors = {"input": input, **dict.fromkeys(names, input[1:2])}
    return Problem({**tensors, "residual": input} if residual else tensors, arguments)


def _conv_norm(input: tuple[int, ...], weight: tuple[int, ...], **arguments: Any) -> Problem:
    names = ("bn_weight", "bn_bias", "running_mean", "running_var")
    per_channel = dict.fromkeys(names, weight[:1])
    return Problem({"input": input, "weight": weight, **per_channel}, arguments)


_CONV2D = [
    _conv((2, 5, 13, 11), (7, 5, 3, 3), padding=1),
    _conv((2, 16, 9, 9), (21, 16, 1, 1)),
    _conv((2, 19, 14, 15), (19, 1, 3, 3), stride=2, padding=1, groups=19),
    _conv((2, 8, 12, 13), (12, 4, 3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
]

PROBLEMS: dict[str, list[Problem]] = {
    "conv1d": [_conv((2, 5, 19), (6, 5, 3), padding=1), _conv((2, 8, 17), (8, 1, 4), groups=8)],
    "conv2d": _CONV2D,
    "cross_correlation2d": _CONV2D[:1],
    "convolution2d": [_CONV2D[0], _CONV2D[3]],
    "conv1x1": [_conv((2, 16, 9, 9), (21, 16, 1, 1)), _conv((2, 7, 8, 9), (5, 7, 1, 1), stride=2)],
    "max_pool1d": [_pool((2, 5, 19), 3, 2, 1), _pool((2, 5, 19), 2, return_indices=True)],
    "max_pool2d": [
        _pool((2, 19, 13, 15), 3, 2, 1, ceil_mode=True),
        _pool((2, 5, 17, 18), 2),
        _pool((2, 5, 12, 11), (3, 2), 1, (1, 0), dilation=(1, 2), return_indices=True),
    ],
    "avg_pool1d": [_pool((2, 5, 19), 3, 2, 1, count_include_pad=False)],
    "avg_pool2d": [
        _pool((2, 19, 13, 15), 3, 2, 1, ceil_mode=True, count_include_pad=False),
        _pool((2, 5, 17, 18), 2),
        _pool((2, 5, 12, 11), (3, 2), 1, (1, 0), divisor_override=4),
    ],
    "adaptive_avg_pool1d": [_adaptive((2, 5, 19), 4)],
    "adaptive_avg_pool2d": [_adaptive((2, 19, 13, 11), 1), _adaptive((2, 5, 13, 11), (4, 3))],
    "adaptive_max_pool1d": [_adaptive((2, 5, 19), 4)],
    "adaptive_max_pool2d": [
        _adaptive((2, 19, 13, 11), 1),
        _adaptive((2, 5, 13, 11), (4, 3), return_indices=True),
    ],
    "batch_norm": [
        _norm((3, 19, 7, 9), training=True),
        _norm((3, 19, 7, 9), residual=True, training=True, activation="relu"),
        _norm((4, 6, 5, 7), residual=True, activation="silu"),
        _norm((17, 33), training=True),
        _norm((3, 5, 4, 3, 6), training=True, activation="leaky_relu"),
    ],
    "conv2d_bn_act": [
        # Smooth activations: rounding between conv and norm may take a relu over its edge.
        _conv_norm((2, 5, 13, 11), (7, 5, 3, 3), padding=1, training=True, activation="silu"),
        _conv_norm((2, 5, 13, 11), (7, 5, 3, 3), stride=2, activation="gelu"),
    ],
    "channel_max_pool": [_pool((2, 19, 7, 9), 2), _pool((2, 12, 7, 5), 3, 2)],
    "channel_avg_pool": [_pool((2, 19, 7, 9), 2), _pool((2, 12, 7, 5), 3, 2)],
}


def _flipped_conv2d(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.conv2d(input, weight.flip(-2, -1), *args, **kwargs)


_OWN_NAMES: dict[str, Callable[..., Any]] = {
    "cross_correlation2d": F.conv2d,
    "convolution2d": _flipped_conv2d,
}


def twin(name: str) -> Callable[..., Any]:
    """What a user of torch writes for the operator `name`."""
    return _OWN_NAMES.get(name) or getattr(peers, name)


# ---- one call and its comparison ---------------------------------------------------------


def _values(problem: Problem) -> dict[str, Tensor]:
    """The tensor arguments in float64; the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, shape in problem.tensors.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        drawn[name] = value.abs() + 0.5 if name == "running_var" else value
    return drawn


def _compute(
    function: Callable[..., Any], problem: Problem, values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Everything that a call computes: outputs, updated running statistics, gradients."""
    tensors = {name: value.clone() for name, value in values.items()}
    statistics = {name: t for name, t in tensors.items() if name.startswith("running_")}
    inputs = {name: t.requires_grad_() for name, t in tensors.items() if name not in statistics}
    # Cloned, because an operator may activate in place what it was given.
    result = function(
        **{**tensors, **{k: t.clone() for k, t in inputs.items()}}, **problem.arguments
    )
    output, *indices = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad(output, list(inputs.values()), grad_output.to(output))
    return {
        "output": output.detach(),
        **{f"index {i}": tensor for i, tensor in enumerate(indices)},
        **statistics,
        **{f"grad of {name}": grad for name, grad in zip(inputs, grads, strict=True)},
    }


def _native_lives(problem: Problem, dtype: torch.dtype) -> bool:
    """torch 2.13 on CPUs crashes the process in some grouped 16-bit convolutions."""
    return dtype.itemsize > 2 or problem.arguments.get("groups", 1) == 1


class Outcome(NamedTuple):
    """The largest error of a call in units of what is allowed, both in ulps, or what went wrong."""

    error: float
    allowed: float
    miss: str = ""

    @property
    def share(self) -> float:
        return float("inf") if self.miss else self.error / self.allowed

    def __str__(self) -> str:
        return "✗" if self.miss else f"✓ {self.error:.2f}/{self.allowed:.0f}"


def check(
    name: str, problem: Problem, dtype: torch.dtype, memory_format: str, device: str
) -> Outcome:
    """Our result of one call beside the reference's, under the tolerance rule."""
    rounded = {
        key: value.to(dtype).contiguous(memory_format=FORMATS[memory_format])
        if value.dim() == 4
        else value.to(dtype)
        for key, value in _values(problem).items()
    }
    expected = _compute(twin(name), problem, {k: v.double() for k, v in rounded.items()})
    here = {key: value.to(device) for key, value in rounded.items()}
    native = _native(name, problem, dtype, here)
    try:
        actual = _compute(getattr(TF, name), problem, here)
    except Exception as error:
        return Outcome(0.0, 0.0, f"{type(error).__name__}: {error}")
    return max(
        (_compare(key, actual[key], expected[key], native.get(key)) for key in expected),
        key=lambda outcome: outcome.share,
    )


def _native(
    name: str, problem: Problem, dtype: torch.dtype, values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The twin's own result in this dtype, or nothing where torch has none."""
    if not _native_lives(problem, dtype):
        return {}
    try:
        return _compute(twin(name), problem, values)
    except RuntimeError:
        return {}


def _compare(key: str, actual: Tensor, expected: Tensor, native: Tensor | None) -> Outcome:
    actual = actual.cpu()
    if not actual.is_floating_point():
        miss = "" if torch.equal(actual, expected) else f"{key}: differs from native's"
        return Outcome(0.0, 1.0, miss)
    result = _tolerance.check(actual, expected, None if native is None else native.cpu())
    miss = "" if result else f"{key}: {result.reason}"
    return Outcome(result.ulps, result.allowed / result.ulp, miss)


# ---- the run and its table ---------------------------------------------------------------


class Row(NamedTuple):
    operator: str
    memory_format: str
    cells: list[str]
    misses: list[str]


def rows(names: list[str], device: str, quick: bool) -> Iterator[Row]:
    """One row per operator and memory format, with one cell per dtype."""
    for name in names:
        problems = PROBLEMS.get(name, [])[: 1 if quick else None]
        if not problems:
            yield Row(name, "", ["✗"] * len(DTYPES), ["torchops/_verify.py has no problem for it"])
        for memory_format in FORMATS:
            having = [p for p in problems if memory_format == "contiguous" or _has_4d(p)]
            if having:
                yield _row(name, having, memory_format, device)


def _has_4d(problem: Problem) -> bool:
    return len(problem.tensors["input"]) == 4


def _row(name: str, problems: list[Problem], memory_format: str, device: str) -> Row:
    cells, misses = [], []
    for dtype in DTYPES:
        outcomes = [check(name, p, dtype, memory_format, device) for p in problems]
        cells.append(str(max(outcomes, key=lambda outcome: outcome.share)))
        misses += [
            f"{dtype}, {problem}: {outcome.miss}"
            for problem, outcome in zip(problems, outcomes, strict=True)
            if outcome.miss
        ]
    return Row(name, memory_format, cells, misses)


@contextlib.contextmanager
def _only_our_kernels(device: str) -> Iterator[None]:
    """A native call must not be able to verify itself, nor tf32 pass for float32."""
    with backend("own"), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield


def main(argv: list[str]) -> int:
    arguments = _parse(argv)
    names = arguments.op or sorted(name for name, op in OPERATORS.items() if op.own)
    native_only = sorted(name for name, op in OPERATORS.items() if not op.own)
    start = time.perf_counter()
    print(
        f"torch {torch.__version__}, {_where(arguments.device)}; largest error of outputs, running"
        " statistics and gradients\nagainst float64, in ulps/allowed"
    )
    done = []
    with _only_our_kernels(arguments.device), _table() as show:
        for row in rows(names, arguments.device, arguments.quick):
            show([row.operator, row.memory_format, *row.cells])
            done.append(row)
    misses = [(row, miss) for row in done for miss in row.misses]
    for row, miss in misses:
        print(f"✗ {row.operator} {row.memory_format} {miss}")
    if not arguments.op and native_only:
        print(f"not checked, since they run natively: {', '.join(native_only)}")
    verdict = f"✗ {len(misses)} misses" if misses else "✓ all within tolerance"
    print(f"{verdict}: {len(names)} operators in {time.perf_counter() - start:.0f} s")
    return 1 if misses else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchops verify",
        description="Checks every operator on this machine, forward and gradients, against float64."
        " Exit code 1 when any result is further off than the tolerance rule allows.",
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    add("--op", action="append", metavar="NAME", help="only this operator; may be given again")
    add("--quick", action="store_true", help="one problem per operator")
    arguments = parser.parse_args(argv)
    covered = [name for name, op in OPERATORS.items() if op.own]
    for name in arguments.op or []:
        if name not in covered:
            known = ", ".join(sorted(covered))
            parser.error(f"--op {name}: no such operator with kernels; known: {known}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    return arguments


def _where(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_C.cpu_isa()} kernels, {torch.get_num_threads()} threads"


_HEADER = ["operator", "format", *(str(dtype).removeprefix("torch.") for dtype in DTYPES)]


@contextlib.contextmanager
def _table() -> Iterator[Callable[[list[str]], None]]:
    """A function that shows one more row: of a rich table on a terminal, else of plain text."""
    rich = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
    if not rich:
        _print_row(_HEADER)
        yield _print_row
        return
    from rich.live import Live
    from rich.table import Table

    table = Table(*_HEADER)
    with Live(table, vertical_overflow="visible"):
        yield lambda cells: table.add_row(*map(_coloured, cells))


def _print_row(cells: list[str]) -> None:
    operator, memory_format, *dtypes = cells
    print(f"{operator:20}{memory_format:14}", *(f"{cell:12}" for cell in dtypes), flush=True)


def _coloured(cell: str) -> str:
    colours = {"✓": "green", "✗": "red"}
    return f"[{colours[cell[0]]}]{cell}[/]" if cell[:1] in colours else cell
