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

_LEFT = (
    *("problem", "suite", "family", "dtype", "layout", "dir", "match", "verdict"),
    *("network", "run", "layer", "call"),
)
_SETTINGS = ("dtype", "layout", "thr")
STYLES = {FASTER: "green", SAME: "", SLOWER: "bold red", UNCERTAIN: "yellow"}

# Cores that others may use before rows of several threads show the scheduler more than the kernel.
_QUIET = 0.2

# Wide enough for every column on one line: a terminal folds what is cut off otherwise.
_WIDTH = 220


def console() -> Any:
    """Standard output for whole tables."""
    rich = extra("rich.console")
    width = rich.Console().width
    return rich.Console(highlight=False, width=max(width, _WIDTH))


@contextmanager
def progress(total: int, peers: Sequence[str]) -> Iterator[Any]:
    """Yields the callback that shows each finished row."""
    out = extra("rich.console").Console(highlight=False)
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
    # Drawn between the rows only: a thread that draws would take time from the one that is timed.
    with extra("rich.live").Live(bar, console=out, transient=True, auto_refresh=False) as live:

        def on_row(row: Row) -> None:
            rows.append(row)
            bar.advance(task)
            room = max(1, out.height - 8)
            live.update(group(rows_table(rows[-room:], peers), bar), refresh=True)

        yield on_row


def print_report(report: Report) -> None:
    """The environment, every row, and the totals per family."""
    out = console()
    out.print(rows_table(report.rows, report.peers))
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
    settings = [{row.dtype for row in report.rows}, {row.layout for row in report.rows}]
    lines = [
        f"$ {report.command}",
        f"{report.created}, torchops {where.torchops} {where.commit}",
        f"{where.gpu or where.cpu}, {where.isa}, {where.cores} cores",
        f"torch {where.torch}, Python {where.python}, {where.system}",
        ", ".join("/".join(sorted(names)) for names in settings),
    ]
    for name, roof in report.rooflines.items():
        copy = units.rate(roof.bytes_per_second, "B/s")
        matmul = units.rate(roof.flops_per_second, "FLOP/s")
        lines.append(f"roofline at {name}: copy {copy}, matmul {matmul}")
    if report.rotation_bytes:
        cache = units.size(where.last_level_cache)
        turn = units.size(report.rotation_bytes)
        lines.append(f"buffers rotate over {turn}, last-level cache {cache}")
    if report.others is not None:
        busy = f"other processes used {report.others:.1f} of {where.cores} cores meanwhile"
        threaded = any(row.threads > 1 for row in report.rows)
        if report.others > _QUIET and threaded:
            busy += ": do not trust rows of more than one thread"
        lines.append(busy)
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
    """The rich table of `rows`; a setting that all of them share has no column."""
    return table([_cells(row, peers) for row in rows], optional=_SETTINGS)


def _cells(row: Row, peers: Sequence[str]) -> dict[str, Any]:
    text = extra("rich.text").Text
    calls = ",".join(str(count) for count in dict.fromkeys(row.multiplicity.values())) or "1"
    cells = {"problem": row.problem, "×": calls, "dtype": row.dtype, "layout": row.layout}
    cells |= {"dir": row.direction, "thr": str(row.threads), "ours [IQR]": ""}
    if row.error:
        return cells | {"ours [IQR]": text("failed", style="bold red")}
    times = row.times["ours"]
    cells["ours [IQR]"] = units.spread(times.median, times.q1, times.q3)
    for peer in peers:
        cells[peer] = units.seconds(row.times[peer].median)
        style = STYLES[verdict(row.speed(peer))]
        cells[f"vs {peer}"] = text(_ratio(row, peer), style=style)
    matched = row.match is not None and row.match.ok
    return cells | {
        "rate": achieved(row),
        "of roof": f"{row.fraction:.0%}",
        "min bytes": units.size(row.bytes),
        "peak": units.size(row.peak_memory["ours"]) if "ours" in row.peak_memory else "–",
        "match": text("✓" if matched else "✗", style="green" if matched else "bold red"),
    }


def totals_table(groups: Sequence[Total], peer: str) -> Any:
    """The rich table of `groups`: a network's time per family, ours and the peer's."""
    cells = [
        {
            "suite": total.suite or "–",
            "family": total.family,
            "dtype": total.dtype,
            "layout": total.layout,
            "dir": total.direction,
            "thr": str(total.threads),
            "rows": str(total.rows),
            "lost": str(total.lost),
            "ours": units.seconds(total.ours),
            peer: units.seconds(total.peer),
            "of total": f"{units.significant(total.peer / total.ours)}x",
            "mean": f"{units.significant(total.ratio)}x",
            "worst": f"{units.significant(total.worst)}x",
        }
        for total in groups
    ]
    title = f"times as fast as {peer}, by family"
    return table(cells, optional=_SETTINGS, title=title)


def table(
    rows: Sequence[Mapping[str, Any]], *, optional: Sequence[str] = (), **options: Any
) -> Any:
    """A rich table with a column per key; `optional` ones only where their cells differ."""
    box = extra("rich.box").SIMPLE_HEAD
    made = extra("rich.table").Table(box=box, pad_edge=False, title_justify="left", **options)
    names = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if name not in optional or len({row[name] for row in rows}) > 1
    ]
    for name in names:
        made.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(row.get(name, "") for name in names))
    return made


def _ratio(row: Row, peer: str) -> str:
    return f"{units.significant(row.ratios[peer].median)}x {verdict(row.speed(peer))}"


def achieved(row: Row) -> str:
    """The rate in the unit that bounds the row."""
    seconds = row.times["ours"].median
    if row.bandwidth_bound:
        return units.rate(row.bytes / seconds, "B/s")
    return units.rate(row.flops / seconds, "FLOP/s")
