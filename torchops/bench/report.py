"""The terminal: a live table while the benchmark runs, and the whole of it at the end.

Rich draws both. Where there is no terminal the rows come as they are measured, one line each, on
standard error, and the tables as plain text on standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torchops.bench import units
from torchops.bench.extras import extra
from torchops.bench.results import Report, Row
from torchops.bench.statistics import FASTER, SAME, SLOWER, UNCERTAIN, verdict
from torchops.bench.totals import Total, totals

_COLUMNS = {
    "problem": "left",
    "×": "right",
    "dtype": "left",
    "layout": "left",
    "dir": "left",
    "thr": "right",
    "ours [IQR]": "right",
}
_LAST_COLUMNS = {
    "rate": "right",
    "of roof": "right",
    "min bytes": "right",
    "peak": "right",
    "match": "left",
}
_TOTAL_COLUMNS = {
    **dict.fromkeys(("suite", "family", "dtype", "layout", "dir"), "left"),
    **dict.fromkeys(("thr", "rows", "lost", "ours", "peer", "of total"), "right"),
    **dict.fromkeys(("mean ratio", "worst"), "right"),
}
STYLES = {FASTER: "green", SAME: "", SLOWER: "bold red", UNCERTAIN: "yellow"}

# Wide enough for every column on one line; only a terminal knows its own width.
_PLAIN_WIDTH = 220


def console() -> Any:
    """Standard output, as wide as the table where it is not a terminal."""
    rich = extra("rich.console")
    out = rich.Console(highlight=False)
    return out if out.is_terminal else rich.Console(highlight=False, width=_PLAIN_WIDTH)


@contextmanager
def progress(total: int, peers: Sequence[str]) -> Iterator[Any]:
    """Yields the callback that shows each finished row."""
    out = console()
    if out.is_terminal:
        with _live(out, total, peers) as on_row:
            yield on_row
    else:
        done = iter(range(1, total + 1))
        yield lambda row: print(f"[{next(done)}/{total}] {line(row)}", file=sys.stderr, flush=True)


@contextmanager
def _live(out: Any, total: int, peers: Sequence[str]) -> Iterator[Any]:
    bars = extra("rich.progress")
    group = extra("rich.console").Group
    bar = bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    task = bar.add_task("measuring", total=total)
    rows: list[Row] = []
    with extra("rich.live").Live(bar, console=out, transient=True) as live:

        def on_row(row: Row) -> None:
            rows.append(row)
            bar.advance(task)
            room = max(1, out.height - 8)
            live.update(group(rows_table(rows[-room:], peers), bar))

        yield on_row


def print_report(report: Report) -> None:
    """The environment, every row, and the totals per family."""
    out = console()
    table = rows_table(report.rows, report.peers)
    out.print(table)
    for peer in report.peers:
        out.print(totals_table(totals(report.rows, peer), peer))
    for text in environment_lines(report):
        out.print(text, markup=False, soft_wrap=True)
    for row in report.rows:
        if not row.ok:
            out.print(f"WRONG {line(row)}", markup=False, soft_wrap=True, style="bold red")


def environment_lines(report: Report) -> list[str]:
    """Where the figures hold."""
    where = report.environment
    lines = [f"$ {report.command}", f"{report.created}  torchops {where.torchops} {where.commit}"]
    lines.append(
        f"{where.gpu or where.cpu}, {where.isa}, {where.cores} cores, load {where.load:.1f}"
    )
    lines.append(f"torch {where.torch}, Python {where.python}, {where.system}")
    for name, roof in report.rooflines.items():
        copy = units.rate(roof.bytes_per_second, "B/s")
        matmul = units.rate(roof.flops_per_second, "FLOP/s")
        lines.append(f"roofline at {name}: copy {copy}, matmul {matmul}")
    if report.rotation_bytes:
        cache = units.size(where.last_level_cache)
        text = f"buffers rotate over {units.size(report.rotation_bytes)}, last-level cache {cache}"
        lines.append(text)
    return lines


def line(row: Row) -> str:
    """A row in one line of plain text."""
    head = f"{row.problem} {row.dtype} {row.layout} {row.direction} {row.threads}t"
    if row.error:
        return f"{head}: {row.error}"
    ratios = [f"{name} {_ratio(row, name)}" for name in row.ratios]
    text = f"{head}: {units.seconds(row.times['ours'].median)}, {', '.join(ratios)}"
    return text if row.ok or row.match is None else f"{text}, {row.match.reason}"


def rows_table(rows: Sequence[Row], peers: Sequence[str]) -> Any:
    """The rich table of `rows`."""
    compared = {name: "right" for peer in peers for name in (peer, f"vs {peer}")}
    table = plain_table({**_COLUMNS, **compared, **_LAST_COLUMNS})
    for row in rows:
        table.add_row(*_cells(row, peers))
    return table


def _cells(row: Row, peers: Sequence[str]) -> list[Any]:
    text = extra("rich.text").Text
    calls = ",".join(str(count) for count in dict.fromkeys(row.multiplicity.values())) or "1"
    cells = [row.problem, calls, row.dtype, row.layout, row.direction, str(row.threads)]
    if row.error:
        return [*cells, text("failed", style="bold red")]
    times = row.times["ours"]
    cells.append(units.spread(times.median, times.q1, times.q3))
    for peer in peers:
        cells.append(units.seconds(row.times[peer].median))
        cells.append(text(_ratio(row, peer), style=STYLES[verdict(row.speed(peer))]))
    cells += [achieved(row), f"{row.fraction:.0%}", units.size(row.bytes)]
    cells.append(units.size(row.peak_memory["ours"]) if "ours" in row.peak_memory else "–")
    matched = row.match is not None and row.match.ok
    cells.append(text("✓" if matched else "✗", style="green" if matched else "bold red"))
    return cells


def totals_table(groups: Sequence[Total], peer: str) -> Any:
    """The rich table of `groups`: a network's time per family, ours and the peer's."""
    table = plain_table(_TOTAL_COLUMNS, title=f"ours against {peer}, by family")
    for total in groups:
        table.add_row(
            *(total.suite or "–", total.family, total.dtype, total.layout, total.direction),
            *(str(total.threads), str(total.rows), str(total.lost)),
            *(units.seconds(total.ours), units.seconds(total.peer)),
            *(units.significant(total.peer / total.ours),),
            *(units.significant(total.ratio), units.significant(total.worst)),
        )
    return table


def plain_table(columns: Mapping[str, str], **options: Any) -> Any:
    """A rich table of `columns`, each with the side it is aligned to, that never folds a cell."""
    box = extra("rich.box").SIMPLE_HEAD
    table = extra("rich.table").Table(box=box, pad_edge=False, title_justify="left", **options)
    for name, side in columns.items():
        table.add_column(name, justify=side, no_wrap=True)
    return table


def _ratio(row: Row, peer: str) -> str:
    return f"{units.significant(row.ratios[peer].median)}x {verdict(row.speed(peer))}"


def achieved(row: Row) -> str:
    """The rate in the unit that bounds the row."""
    seconds = row.times["ours"].median
    if row.bandwidth_bound:
        return units.rate(row.bytes / seconds, "B/s")
    return units.rate(row.flops / seconds, "FLOP/s")
