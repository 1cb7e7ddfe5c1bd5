"""The roofline as a picture: `--plot FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchops.bench.extras import extra
from torchops.bench.results import Report, Row

_PANEL_INCHES = (7.0, 5.0)


def kinds() -> list[str]:
    """The file name endings that matplotlib can write."""
    return sorted(_figure(1).canvas.get_supported_filetypes())


def save(report: Report, path: Path) -> None:
    """One panel per roofline: rows as points, ours filled and the first peer hollow."""
    figure = _figure(len(report.rooflines))
    panels = figure.subplots(1, len(report.rooflines), squeeze=False)[0]
    for panel, (name, roof) in zip(panels, report.rooflines.items(), strict=True):
        rows = [row for row in report.rows if row.roofline == name and row.times]
        _draw(panel, rows, report.peers[:1])
        _draw_roof(panel, roof.bytes_per_second, roof.flops_per_second)
        panel.set_title(f"{report.environment.gpu or report.environment.cpu}, {name}")
    figure.savefig(path, dpi=150)


def _figure(panels: int) -> Any:
    width, height = _PANEL_INCHES
    # Without pyplot there is no window and no global state.
    return extra("matplotlib.figure").Figure((width * panels, height), layout="constrained")


def _draw(panel: Any, rows: list[Row], peers: list[str]) -> None:
    for index, family in enumerate(dict.fromkeys(row.family for row in rows)):
        members = [row for row in rows if row.family == family]
        intensity = [row.flops / row.bytes for row in members]
        for who in ["ours", *peers]:
            panel.scatter(
                intensity,
                [row.flops / row.times[who].median for row in members],
                s=22,
                edgecolors=f"C{index}",
                facecolors=f"C{index}" if who == "ours" else "none",
                label=family if who == "ours" else None,
            )
    panel.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="FLOP/s")
    panel.legend(fontsize="small", title=f"filled: ours, hollow: {', '.join(peers)}")


def _draw_roof(panel: Any, bytes_per_second: float, flops_per_second: float) -> None:
    low, high = panel.get_xlim()
    ridge = flops_per_second / bytes_per_second
    xs = sorted({low, min(max(ridge, low), high), high})
    ys = [min(x * bytes_per_second, flops_per_second) for x in xs]
    panel.plot(xs, ys, color="black", linewidth=1)
    panel.set_xlim(low, high)
