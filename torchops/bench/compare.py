"""Two result files side by side: which rows became faster, which slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchops.bench import units
from torchops.bench.extras import extra
from torchops.bench.report import STYLES, console, table
from torchops.bench.results import Report, Row
from torchops.bench.statistics import (
    SLOWER,
    Speed,
    geometric_mean,
    speed_of_times,
    verdict,
)

# How far two runs' ratios to a peer may lie apart and still repeat each other.
_REPEATS = 1.1


@dataclass(frozen=True)
class Change:
    """One row in both files; `speed` above 1 means that the second is faster."""

    before: Row
    after: Row
    speed: Speed
    verdict: str


def changes(before: Report, after: Report, *, band: float, by: str = "time") -> list[Change]:
    """Every row that both files measured.

    `by` "time" compares our own times; the name of a peer compares the ratios to it, in which the
    difference between a quiet and a busy machine cancels. `band` is the slowest speed that still
    counts as the same.
    """
    old = {row.key: row for row in before.rows if _measured(row, by)}
    found = []
    for row in after.rows:
        if row.key in old and _measured(row, by):
            speed = _speed(old[row.key], row, by)
            found.append(Change(old[row.key], row, speed, verdict(speed, band)))
    return found


def _measured(row: Row, by: str) -> bool:
    return not row.error and (by == "time" or by in row.ratios)


def _speed(before: Row, after: Row, by: str) -> Speed:
    if by == "time":
        return speed_of_times(after.times["ours"], before.times["ours"])
    # A ratio is peer over ours, so the larger one is the faster.
    return speed_of_times(before.ratios[by], after.ratios[by])


def repeatability(found: Sequence[Change], peer: str) -> float:
    """The share of rows whose ratios to `peer` in the two files lie within 10 % of each other."""
    pairs = [
        (change.before.ratios[peer].median, change.after.ratios[peer].median)
        for change in found
        if peer in change.before.ratios and peer in change.after.ratios
    ]
    close = [max(a, b) <= _REPEATS * min(a, b) for a, b in pairs]
    return sum(close) / len(close) if close else 0.0


def print_changes(before: Report, after: Report, found: Sequence[Change], by: str) -> None:
    """The table of changes, what stands in one file only, and a summary."""
    out = console()
    out.print(_table(found))
    for name in ("cpu", "gpu", "isa", "torch", "python"):
        old, new = getattr(before.environment, name), getattr(after.environment, name)
        if old != new:
            text = f"note: {name} differs: {old or '–'} before, {new or '–'} after"
            out.print(text, markup=False, soft_wrap=True)
    single = {row.key for row in before.rows} ^ {row.key for row in after.rows}
    if single:
        out.print(f"note: {len(single)} rows stand in only one of the files")
    counts = [f"{sum(c.verdict == name for c in found)} {name}" for name in STYLES]
    mean = geometric_mean([change.speed.ratio for change in found])
    what = "time" if by == "time" else f"ratio to {by}"
    out.print(f"{', '.join(counts)}; mean speed by {what} {units.significant(mean)}x")
    for peer in (peer for peer in before.peers if peer in after.peers):
        share = repeatability(found, peer)
        out.print(f"ratios to {peer} within 10 % of each other: {share:.0%} of the rows")


def _table(found: Sequence[Change]) -> Any:
    text = extra("rich.text").Text
    rows = []
    for change in sorted(found, key=lambda change: change.speed.ratio):
        row, speed = change.after, change.speed
        ends = f"[{units.significant(speed.low)}–{units.significant(speed.high)}]"
        rows.append(
            {
                "problem": row.problem,
                "dtype": row.dtype,
                "layout": row.layout,
                "dir": row.direction,
                "thr": str(row.threads),
                "before": units.seconds(change.before.times["ours"].median),
                "after": units.seconds(row.times["ours"].median),
                "speed": f"{units.significant(speed.ratio)}x {ends}",
                "verdict": text(change.verdict, style=STYLES[change.verdict]),
            }
        )
    return table(rows)


def regressed(found: Sequence[Change]) -> bool:
    """Whether any row became slower."""
    return any(change.verdict == SLOWER for change in found)
