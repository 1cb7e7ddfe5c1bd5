"""The page: `--html FILE`, one self-contained file that needs no network.

page.html holds layout, styles and script; this module puts the rows into it as JSON, figures
already formatted, so that a figure reads the same on the page and in the terminal.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from torchops.bench import report as terminal
from torchops.bench import units
from torchops.bench.results import Report, Row
from torchops.bench.statistics import verdict

_DATA = "/*DATA*/null"


def save(report: Report, path: Path) -> None:
    """Write the page of `report`."""
    path.write_text(render(report), encoding="utf-8")


def render(report: Report) -> str:
    """The page of `report` as text."""
    template = resources.files("torchops.bench").joinpath("page.html").read_text("utf-8")
    # "</script>" in a string would end the script that holds it.
    data = json.dumps(_data(report), allow_nan=False).replace("<", "\\u003c")
    return template.replace(_DATA, data)


def _data(report: Report) -> dict[str, Any]:
    return {
        "title": report.environment.gpu or report.environment.cpu,
        "environment": terminal.environment_lines(report),
        "peers": report.peers,
        "rooflines": {
            name: {"bytes": roof.bytes_per_second, "flops": roof.flops_per_second}
            for name, roof in report.rooflines.items()
        },
        "rows": [_row(row, report.peers) for row in report.rows],
    }


def _row(row: Row, peers: list[str]) -> dict[str, Any]:
    shown = {
        "problem": row.problem,
        "family": row.family,
        "dtype": row.dtype,
        "layout": row.layout,
        "direction": row.direction,
        "threads": row.threads,
        "calls": row.multiplicity,
        "roofline": row.roofline,
        "intensity": row.flops / row.bytes,
        "bytes": row.bytes,
        "bytes_text": units.size(row.bytes),
        "ok": row.ok,
        "error": row.error,
        "reason": row.match.reason if row.match else row.error,
        "times": {},
        "ratios": {},
    }
    if row.error:
        return shown
    peak = row.peak_memory.get("ours")
    return shown | {
        "times": {
            name: {"seconds": times.median, "text": units.spread(times.median, times.q1, times.q3)}
            for name, times in row.times.items()
        },
        "ratios": {
            name: {
                "ratio": ratio.median,
                "text": f"{units.significant(ratio.median)}x",
                "verdict": verdict(row.speed(name)),
            }
            for name, ratio in row.ratios.items()
        },
        "performance": row.flops / row.times["ours"].median,
        "peer_performance": row.flops / row.times[peers[0]].median,
        "rate": terminal.achieved(row),
        "fraction": row.fraction,
        "peak": peak,
        "peak_text": "–" if peak is None else units.size(peak),
    }
