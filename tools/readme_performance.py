"""Writes README's performance section from result files: no figure in it is typed.

Whole networks come first (bench/results/networks, of `bench/models.py --json`, the newest file),
then the layers. Those of the newest one's machine stand there, the others behind a line to click.

    python tools/readme_performance.py                # from every file in bench/results
    python tools/readme_performance.py --check        # exit code 1 where README is out of date

The section stands between two comments, and only what is between them is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from torchops.bench import units
from torchops.bench.results import Report, ResultError, Row, load
from torchops.bench.totals import Total, totals

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- performance: begin, written by tools/readme_performance.py -->"
END = "<!-- performance: end -->"


def networks(files: Sequence[Path]) -> str:
    """The Markdown of the newest file of whole networks; nothing if there is none."""
    reports = [json.loads(file.read_text("utf-8")) for file in files]
    if not reports:
        return ""
    report = max(reports, key=lambda report: datetime.fromisoformat(report["created"]))
    where = report["environment"]
    lines = [
        f"### Whole networks, {where['gpu'] or where['cpu']}",
        "",
        f"torch {where['torch']}, {where['isa']}, commit {where['commit'] or 'unknown'}. Made by:",
        "",
        f"    {report['command']}",
        "",
        "`torchops.convert(model)`, times as fast as torch.nn:",
        "",
        _line(["network", "batch", "training", "inference", "memory of a training step"]),
        _line(["---", *["---:"] * 4]),
    ]
    native: dict[str, int] = {}
    for row in report["rows"]:
        if row["run"] == "torch.nn":
            native[row["network"]] = row["peak_memory"]
        elif row["run"] == "torchops":
            speeds = [f"{units.significant(row[f'{way}_speed'])}x" for way in ("train", "infer")]
            held = [native[row["network"]], row["peak_memory"]]
            memory = " → ".join(units.size(size) for size in held) if all(held) else "–"
            lines.append(_line([row["network"], str(row["batch"]), *speeds, memory]))
    return "\n".join([*lines, "", ""])


def section(files: Sequence[Path]) -> str:
    """The Markdown of all result files: the newest day first, of a day the longest,
    those of other machines folded."""
    reports = sorted(((load(file), file) for file in files), key=_age)
    newest = _machine(max((report for report, _ in reports), key=_time))
    shown = [_of_file(file, report) for report, file in reports if _machine(report) == newest]
    return "\n".join([*shown, *(_folded(r, f) for r, f in reports if _machine(r) != newest)])


def _machine(report: Report) -> tuple[str, str, str]:
    where = report.environment
    return where.gpu, where.cpu, where.isa


def _time(report: Report) -> datetime:
    return datetime.fromisoformat(report.created)


def _age(item: tuple[Report, Path]) -> tuple[int, int, Path]:
    report, file = item
    return -_time(report).toordinal(), -len(report.rows), file


def _folded(report: Report, file: Path) -> str:
    dtypes = ", ".join(sorted({row.dtype for row in report.rows}))
    where = report.environment
    return "\n".join(
        [
            f"<details><summary>{where.gpu or where.cpu}, {where.isa}, {dtypes}</summary>",
            "",
            _of_file(file, report),
            "</details>",
            "",
        ]
    )


def _of_file(file: Path, report: Report) -> str:
    where = report.environment
    link = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
    lines = [
        f"### {where.gpu or where.cpu}",
        "",
        f"torch {where.torch}, {where.isa}, commit {where.commit or 'unknown'}; "
        f"every row is in [{link.name}]({link.as_posix()}). Made by:",
        "",
        f"    {report.command}",
        "",
    ]
    for peer in report.peers:
        lines += _table(totals(_once(report), peer), peer)
    return "\n".join(lines)


def _once(report: Report) -> list[Row]:
    """The rows without their networks, so that a layer of two networks counts once."""
    return [replace(row, multiplicity={}) for row in report.rows]


def _table(groups: Sequence[Total], peer: str) -> list[str]:
    head = ["family", "setting", "forward", "backward", "worst row", f"rows {peer} wins"]
    lines = [f"Times as fast as torch ({peer}), geometric mean over the layers:", ""]
    lines += [_line(head), _line(["---"] * 2 + ["---:"] * 4)]
    by_setting: dict[tuple[str, str], dict[str, Total]] = {}
    for total in groups:
        setting = f"{total.dtype} {total.layout}, {total.threads} thread{'s' * (total.threads > 1)}"
        by_setting.setdefault((total.family, setting), {})[total.direction] = total
    for (family, setting), ways in by_setting.items():
        forward, backward = (
            f"{units.significant(ways[way].ratio)}x" if way in ways else "–"
            for way in ("fwd", "bwd")
        )
        worst = min(total.worst for total in ways.values())
        lost, rows = (sum(getattr(t, name) for t in ways.values()) for name in ("lost", "rows"))
        cells = [family, setting, forward, backward, f"{units.significant(worst)}x"]
        lines.append(_line([*cells, f"{lost} of {rows}"]))
    return [*lines, ""]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def replaced(text: str, new: str) -> str:
    """`text` with `new` between the two comments."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the two lines\n{BEGIN}\n{END}\nin this order")
    return f"{before}{begin}\n\n{new}\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: bench/results/*.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    arguments = parser.parse_args(argv)
    files = arguments.files or sorted(RESULTS.glob("*.json"))
    if not files:
        print("readme_performance: no result files in bench/results", file=sys.stderr)
        return 2
    try:
        old = arguments.readme.read_text("utf-8")
        whole = () if arguments.files else sorted((RESULTS / "networks").glob("*.json"))
        new = replaced(old, networks(whole) + section(files))
    except (OSError, ValueError, ResultError) as error:
        print(f"readme_performance: {arguments.readme}: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        if new != old:
            print(f"{arguments.readme} is out of date; run python tools/readme_performance.py")
        return int(new != old)
    arguments.readme.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
