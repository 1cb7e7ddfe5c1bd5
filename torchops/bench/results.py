"""The result file: what a run measured, as dataclasses that are also its schema.

A file says which version of the schema it follows; a change that readers would notice raises the
version. Reading checks every field, and an error names the place in the file.
"""

from __future__ import annotations

import json
import math
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from torchops.bench.environment import Environment
from torchops.bench.roofline import Roofline
from torchops.bench.statistics import Speed, Summary, speed_of_pairs

SCHEMA = "torchops.bench/1"


class ResultError(ValueError):
    """A result file that cannot be read."""


@dataclass(frozen=True)
class Match:
    """Outcome of the comparison with float64; errors are absolute, `ulps` of the output's scale."""

    ok: bool
    ulps: float
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One problem in one setting and direction.

    `times` are seconds per call, "ours" and the peers by name. `ratios` are a peer's time over
    ours, from neighbouring samples: above 1 is faster than the peer. `floor` is the least time
    that `bytes` and `flops` need under the run's roofline. `multiplicity` says how often each
    network calls the layer. `error` is set, and nothing else measured, where the call failed.
    """

    problem: str
    op: str
    family: str
    dtype: str
    layout: str
    direction: str
    threads: int
    bytes: int
    flops: int
    floor: float
    bandwidth_bound: bool
    multiplicity: dict[str, int] = field(default_factory=dict)
    times: dict[str, Summary] = field(default_factory=dict)
    ratios: dict[str, Summary] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)
    match: Match | None = None
    error: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What makes two rows of two files the same measurement."""
        return self.problem, self.dtype, self.layout, self.direction, self.threads

    @property
    def roofline(self) -> str:
        """The key of the roofline that holds for this row."""
        return roofline_name(self.dtype, self.threads)

    @property
    def ok(self) -> bool:
        """Whether the call ran and its results are right."""
        return not self.error and (self.match is None or self.match.ok)

    @property
    def fraction(self) -> float:
        """The part of the measured roofline that is reached."""
        return self.floor / self.times["ours"].median

    def speed(self, peer: str) -> Speed:
        """How many times as fast as `peer`."""
        return speed_of_pairs(self.ratios[peer])


def roofline_name(dtype: str, threads: int) -> str:
    """The key of a roofline, such as "float32, 1 thread"."""
    return f"{dtype}, {threads} thread{'s' * (threads > 1)}"


@dataclass(frozen=True)
class Report:
    """A whole run.

    `rooflines` are keyed by `roofline_name`. `others` is how many cores other processes used
    meanwhile, None where the system does not tell.
    """

    command: str
    created: str
    device: str
    environment: Environment
    rooflines: dict[str, Roofline]
    rotation_bytes: int
    quick: bool
    others: float | None
    rows: list[Row]
    schema: str = SCHEMA

    @property
    def peers(self) -> list[str]:
        """Names of the peers that were measured, in the order of the run."""
        return list(dict.fromkeys(peer for row in self.rows for peer in row.ratios))


def save(report: Report, path: Path) -> None:
    """Write the result file."""
    path.write_text(dumps(report) + "\n")


def dumps(report: Report) -> str:
    return json.dumps(asdict(report), indent=1, allow_nan=False)


def load(path: Path) -> Report:
    """Read a result file. Raises ResultError saying what is wrong and where."""
    try:
        value = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: {error}") from None
    except json.JSONDecodeError as error:
        raise ResultError(f"{path} is not JSON: {error}") from None
    schema = value.get("schema") if isinstance(value, dict) else None
    if schema != SCHEMA:
        raise ResultError(
            f"{path}: schema is {schema!r}, this version reads {SCHEMA!r}; "
            "measure again with `torchops bench … --json FILE`"
        )
    try:
        return _read(Report, value, "report")
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None


def _read(kind: Any, value: Any, place: str) -> Any:
    """`value` as an instance of the annotated type `kind`."""
    if is_dataclass(kind):
        return _read_fields(kind, value, place)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        chosen = type(None) if value is None else arguments[0]
        return _read(chosen, value, place)
    if origin is dict:
        items = _expect(dict, value, place).items()
        return {name: _read(arguments[1], item, f"{place}.{name}") for name, item in items}
    if origin is list:
        items = enumerate(_expect(list, value, place))
        return [_read(arguments[0], item, f"{place}[{i}]") for i, item in items]
    if kind is float and type(value) is int:
        return float(value)
    number = _expect(kind, value, place)
    if kind in (int, float) and not (math.isfinite(number) and number >= 0):
        raise ResultError(f"{place}: expected a number of at least 0, got {value!r}")
    return number


def _read_fields(kind: Any, value: Any, place: str) -> Any:
    items = dict(_expect(dict, value, place))
    hints = typing.get_type_hints(kind)
    read = {}
    for item in fields(kind):
        if item.name in items:
            name = f"{place}.{item.name}"
            read[item.name] = _read(hints[item.name], items.pop(item.name), name)
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ResultError(f"{place}: {item.name!r} is missing")
    if items:
        raise ResultError(f"{place}: unknown field {next(iter(items))!r}")
    return kind(**read)


def _expect(kind: type, value: Any, place: str) -> Any:
    if type(value) is not kind:
        raise ResultError(
            f"{place}: expected {kind.__name__}, got {type(value).__name__} {value!r:.40}"
        )
    return value
