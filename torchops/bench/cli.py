"""`torchops bench`: the command line of the benchmark."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from torchops.bench import compare, page, plot, report, results
from torchops.bench.extras import MissingExtra
from torchops.bench.parse import parse
from torchops.bench.problem import FAMILIES, OPS, Problem, ProblemError
from torchops.bench.run import Plan, dtype_name, run
from torchops.bench.statistics import BAND
from torchops.bench.subject import PEERS, Case
from torchops.bench.suites import ALL, network_name, suite
from torchops.bench.workload import LAYOUTS, Setting, has_layout

_DTYPES = {
    **{dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)},
    "float64": torch.float64,
    **{"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64},
}

# A batch that fills the machine: the GPU's is the one that published figures mostly use.
_BATCH = {"cpu": 8, "cuda": 256}

_EPILOG = """
OP is a problem string in benchdnn's style, or the name of an operator or op family, which picks
its rows out of the suites. Examples:

  torchops bench --suite resnet50 --quick --threads 1
  torchops bench conv2d:mb8_ic64ih56oc64kh3ph1 --dtype f32,bf16 --layout contiguous,channels_last
  torchops bench depthwise --suite all --json after.json --html after.html
  torchops bench compare before.json after.json --fail-below 0.95

Exit code 1: a result does not match float64, a call failed, or a compared row became slower.
"""


class UsageError(ValueError):
    """Arguments that do not fit together; the message says what does."""


def main(argv: Sequence[str]) -> int:
    """Runs `torchops bench *argv`; returns the exit code."""
    try:
        if list(argv[:1]) == ["compare"]:
            return _compare(argv[1:])
        return _bench(argv)
    except (UsageError, ProblemError, results.ResultError, MissingExtra) as error:
        print(f"torchops bench: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `torchops bench --dry-run | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (lives as long as the process)
        return 1


def _bench(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    plan = _plan(arguments, shlex.join(["torchops", "bench", *argv]))
    if arguments.dry_run:
        for case, direction in plan.rows():
            print(_listing(case, direction))
        return 0
    outputs = [arguments.json, arguments.html, arguments.plot]
    _check_outputs([path for path in outputs if path], arguments.plot)
    with report.progress(len(plan.rows()), plan.peers) as on_row:
        measured = run(plan, on_row)
    if arguments.json:
        results.save(measured, arguments.json)
    if arguments.html:
        page.save(measured, arguments.html)
    if arguments.plot:
        plot.save(measured, arguments.plot)
    report.print_report(measured)
    missing = len(plan.rows()) - len(measured.rows)
    if missing:
        print(f"interrupted: {missing} rows were not measured", file=sys.stderr)
    return 1 if missing or not all(row.ok for row in measured.rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchops bench",
        description="Measure torchops beside torch on the layers of real networks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="problem string, operator or op family")
    add("--suite", help=f"layers of a network: {', '.join(ALL)}, or all (default: resnet50)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--dtype", default="float32", help=f"comma-separated: {', '.join(_DTYPES)}")
    add("--layout", default="contiguous", help=f"comma-separated: {', '.join(LAYOUTS)}")
    add("--batch", type=_positive, help="images per call (default: 8, on a GPU 256)")
    add("--direction", choices=("fwd", "bwd", "all"), default="all", help="default: all")
    add("--eval", action="store_true", help="suites in evaluation mode, forward only")
    add("--threads", help="comma-separated counts; 1 is pinned to a core (default: torch's)")
    add("--vs", default="eager", help=f"comma-separated peers: {', '.join(PEERS)} (default: eager)")
    add("--quick", action="store_true", help="fewer samples: seconds per suite, wider spreads")
    add("--dry-run", action="store_true", help="list the problems and measure nothing")
    add("--json", type=Path, metavar="FILE", help="write the results")
    add("--html", type=Path, metavar="FILE", help="write the results as a page")
    add("--plot", type=Path, metavar="FILE", help="write a roofline plot (png, svg, pdf)")
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return value


def _plan(arguments: argparse.Namespace, command: str) -> Plan:
    device = _device(arguments.device)
    dtypes = [_DTYPES[name] for name in _choices("--dtype", arguments.dtype, _DTYPES)]
    layouts = _choices("--layout", arguments.layout, LAYOUTS)
    threads = [_thread_count(text) for text in (arguments.threads or "").split(",") if text]
    problems = _problems(arguments, arguments.batch or _BATCH[torch.device(device).type])
    cases = [
        Case(problem, Setting(dtype, layout, device), count, multiplicity)
        for count in threads or [torch.get_num_threads()]
        for problem, multiplicity in problems.items()
        for dtype in dict.fromkeys(dtypes)
        for layout in layouts
        if has_layout(problem, layout)
    ]
    if not cases:
        raise UsageError(f"no problem has the layout {arguments.layout}")
    return Plan(
        cases=cases,
        directions=("fwd", "bwd") if arguments.direction == "all" else (arguments.direction,),
        peers=_choices("--vs", arguments.vs, PEERS),
        device=device,
        quick=arguments.quick,
        command=command,
    )


def _device(name: str) -> str:
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = ""
    if kind not in _BATCH:
        raise UsageError(f"--device {name}: expected cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch {torch.__version__} sees no CUDA device")
    return name


def _choices(option: str, text: str, known: Sequence[str] | dict[str, torch.dtype]) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise UsageError(f"{option}: unknown {name!r}; known: {', '.join(known)}")
    return names


def _thread_count(text: str) -> int:
    try:
        return _positive(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--threads: {error}") from None


def _problems(arguments: argparse.Namespace, batch: int) -> dict[Problem, dict[str, int]]:
    """Every problem once, with how often each suite calls it."""
    strings = [text for text in arguments.ops if ":" in text]
    filters = [text for text in arguments.ops if ":" not in text]
    problems: dict[Problem, dict[str, int]] = {parse(text, batch=batch): {} for text in strings}
    if strings and not filters and not arguments.suite:
        return problems
    for text in filters:
        if text not in OPS and text not in FAMILIES:
            known = ", ".join([*FAMILIES, *OPS])
            raise UsageError(f"unknown operator or family {text!r}; known: {known}")
    name = arguments.suite or ("all" if filters else "resnet50")
    for problem, multiplicity in _suites(name, batch, not arguments.eval).items():
        family = problem.family.removesuffix(" eval")
        if not filters or problem.op in filters or family in filters:
            problems[problem] = multiplicity
    if not problems:
        raise UsageError(f"suite {name} has no {' or '.join(filters)}")
    return problems


def _suites(name: str, batch: int, training: bool) -> dict[Problem, dict[str, int]]:
    found: dict[Problem, dict[str, int]] = {}
    for network in ALL if name == "all" else name.split(","):
        try:
            full = network_name(network)
        except ValueError as error:
            raise UsageError(f"--suite: {error}") from None
        for problem, count in suite(full, batch=batch, training=training).items():
            found.setdefault(problem, {})[full] = count
    return found


def _listing(case: Case, direction: str) -> str:
    calls = " ".join(f"{name}×{count}" for name, count in case.multiplicity.items())
    setting = f"{dtype_name(case.setting.dtype)} {case.setting.layout}"
    return f"{case.problem} {setting} {direction} {case.threads}t {calls}".rstrip()


def _check_outputs(paths: Sequence[Path], plot_path: Path | None) -> None:
    """Before anything is measured: minutes of work must not end in an unwritable file."""
    for path in paths:
        if not path.parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    if plot_path and plot_path.suffix.lstrip(".") not in plot.kinds():
        raise UsageError(f"--plot {plot_path}: expected an ending out of {', '.join(plot.kinds())}")


def _compare(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="torchops bench compare", description="Compare two result files row by row."
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--fail-below",
        type=float,
        default=BAND,
        metavar="SPEED",
        help=f"slowest speed that still counts as the same (default: {BAND})",
    )
    parser.add_argument(
        "--by", default="time", help="time, or a peer: compares the ratios to it (default: time)"
    )
    arguments = parser.parse_args(argv)
    if not 0 < arguments.fail_below <= 1:
        raise UsageError(f"--fail-below: expected a speed in (0, 1], got {arguments.fail_below}")
    before, after = results.load(arguments.before), results.load(arguments.after)
    found = compare.changes(before, after, band=arguments.fail_below, by=arguments.by)
    if not found:
        raise UsageError(f"{arguments.before} and {arguments.after} share no row to compare")
    compare.print_changes(before, after, found, arguments.by)
    return 1 if compare.regressed(found) else 0
