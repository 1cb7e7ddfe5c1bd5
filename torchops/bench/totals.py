"""Rows taken together: a network's time per op family, and the mean ratio of a family."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torchops.bench.results import Row
from torchops.bench.statistics import SLOWER, geometric_mean, verdict


@dataclass(frozen=True)
class Total:
    """All rows of one family in one setting.

    `ours` and `peer` are seconds, each row times its multiplicity in `suite`; `ratio` is the
    geometric mean over the rows' ratios, `lost` how many of them the peer wins.
    """

    suite: str
    family: str
    dtype: str
    layout: str
    direction: str
    threads: int
    rows: int
    lost: int
    ours: float
    peer: float
    ratio: float
    worst: float


def totals(rows: Iterable[Row], peer: str) -> list[Total]:
    """One Total per suite, family and setting; rows of no suite come under the suite ""."""
    groups: dict[tuple[str, str, str, str, str, int], list[Row]] = {}
    for row in rows:
        if peer not in row.ratios:
            continue
        for suite in row.multiplicity or [""]:
            key = (suite, row.family, row.dtype, row.layout, row.direction, row.threads)
            groups.setdefault(key, []).append(row)
    return [_total(key, group, peer) for key, group in groups.items()]


def _total(key: tuple[str, str, str, str, str, int], rows: list[Row], peer: str) -> Total:
    suite = key[0]
    calls = [row.multiplicity.get(suite, 1) for row in rows]
    ratios = [row.ratios[peer].median for row in rows]
    return Total(
        *key,
        rows=len(rows),
        lost=sum(verdict(row.speed(peer)) == SLOWER for row in rows),
        ours=sum(n * row.times["ours"].median for n, row in zip(calls, rows, strict=True)),
        peer=sum(n * row.times[peer].median for n, row in zip(calls, rows, strict=True)),
        ratio=geometric_mean(ratios),
        worst=min(ratios),
    )
