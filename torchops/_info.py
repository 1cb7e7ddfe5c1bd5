"""`torchops.info()` and `torchops info`: what was built, what is running, what covers what."""

from __future__ import annotations

import argparse
import json
import platform
from itertools import chain
from typing import Any

import torch

from torchops import _C, _backend, _tuning, functional
from torchops.ops import _drop_in
from torchops.ops._drop_in import Operator

CUDA_VERIFIED_ON: tuple[str, ...] = ()
"""GPUs on which `torchops verify --device cuda` was all ticks. Elsewhere CUDA is only compiled."""


OPERATORS: dict[str, Operator] = {
    name: _drop_in.OPERATORS[getattr(functional, name).__name__] for name in functional.__all__
}
"""By public name, of which an operator may have two: conv2d is cross_correlation2d."""


class Info(dict[str, Any]):
    """Plain data under "torchops", "built", "running", "operators" and "debts"; prints as text."""

    def __str__(self) -> str:
        return as_text(self)


def info() -> Info:
    """Version, what was built, what is running, which operators have kernels, tuning debts.

    Returns:
        A dict of plain JSON values (`print` shows it as text):
        `torchops` the version; `built` and `running` facts by name; `operators` by name, each with
        `kernel` (False: runs natively), `dtypes`, `formats` and `devices`; `debts` the families of
        problems that backend("auto") hands to native, with the measured ratio.
    """
    import torchops

    return Info(
        torchops=torchops.__version__,
        built=_built(),
        running=_running(),
        operators={name: _coverage(name, OPERATORS[name]) for name in sorted(OPERATORS)},
        debts=[
            {
                "operator": debt.operator,
                "device": debt.device,
                "family": debt.family,
                "ratio": debt.ratio,
                "measured": debt.measured,
            }
            for debt in chain(*_tuning.DEBTS.values())
        ],
    )


def _built() -> dict[str, Any]:
    return {
        "cuda": bool(_C.CUDA_ARCHS),
        "cuda_archs": _C.CUDA_ARCHS.split(",") if _C.CUDA_ARCHS else [],
        "cuda_verified_on": list(CUDA_VERIFIED_ON),
        "isas": _C.ISAS.split(","),
        "torch": _C.TORCH_BUILT_AGAINST,
        "torch_target": _C.TORCH_TARGET,
        "compiler": _C.COMPILER,
        "type": _C.BUILD_TYPE,
    }


def _running() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "isa": _C.cpu_isa(),
        "isas": _C.cpu_isas(),
        "threads": torch.get_num_threads(),
        "cuda_device": torch.cuda.get_device_name() if cuda else None,
        "backend": _backend.mode,
    }


def _coverage(name: str, operator: Operator) -> dict[str, Any]:
    if not operator.own:
        return {"kernel": False, "dtypes": [], "formats": [], "devices": []}
    devices = ["cpu"]
    if _C.CUDA_ARCHS:
        untried = "cuda (never run on a GPU)"
        devices.append("cuda" if CUDA_VERIFIED_ON else untried)
    return {
        "kernel": True,
        "dtypes": sorted(
            (_short(dtype) for dtype in _drop_in.KERNEL_DTYPES), key=_width, reverse=True
        ),
        "formats": ["contiguous"] if name.endswith("1d") else _FORMATS,
        "devices": devices,
    }


_FORMATS = ["contiguous", "channels_last"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _width(dtype: str) -> tuple[int, str]:
    return int(dtype.lstrip("bfloat")), dtype


# ---- as text -----------------------------------------------------------------------------


def as_text(facts: dict[str, Any]) -> str:
    built, running = facts["built"], facts["running"]
    lines = [f"torchops {facts['torchops']}", "", "built"]
    lines += _pairs(
        {
            "CUDA": _cuda_text(built),
            "CPU ISAs": ", ".join(built["isas"]),
            "torch": f"{built['torch']}; runs with {built['torch_target']} and newer",
            "compiler": f"{built['compiler']}, {built['type']}",
        }
    )
    lines += ["", "running"]
    lines += _pairs(
        {
            "torch": running["torch"],
            "Python": f"{running['python']} on {running['system']}",
            "CPU": f"{running['isa']} kernels (this CPU has {', '.join(running['isas'])}), "
            f"{running['threads']} threads",
            "CUDA device": running["cuda_device"] or "none",
            "backend": running["backend"],
        }
    )
    return "\n".join([*lines, "", *_operators_text(facts["operators"]), "", *_debts_text(facts)])


def _cuda_text(built: dict[str, Any]) -> str:
    if not built["cuda"]:
        return "no"
    untried = "no GPU yet: compiled and emulated, not known to work"
    tried = ", ".join(built["cuda_verified_on"]) or untried
    return f"sm {', '.join(built['cuda_archs'])}; verified on {tried}"


def _pairs(facts: dict[str, str]) -> list[str]:
    return [f"  {name:12} {value}" for name, value in facts.items()]


def _operators_text(operators: dict[str, Any]) -> list[str]:
    """One paragraph per kind of coverage, so that 25 operators stay readable."""
    groups: dict[str, list[str]] = {}
    for name, covered in operators.items():
        groups.setdefault(_group(covered), []).append(name)
    lines = ["operators"]
    for title in sorted(groups, key=lambda title: title == _NATIVE):
        lines += [f"  {title}", *_wrapped(groups[title])]
    return lines


_NATIVE = "no kernel yet, run natively:"


def _group(covered: dict[str, Any]) -> str:
    if not covered["kernel"]:
        return _NATIVE
    fields = (" ".join(covered[field]) for field in ("dtypes", "formats", "devices"))
    return "own kernels, " + "; ".join(fields) + ":"


def _wrapped(names: list[str]) -> list[str]:
    import textwrap

    indent = " " * 4
    return textwrap.wrap(" ".join(names), 96, initial_indent=indent, subsequent_indent=indent)


def _debts_text(facts: dict[str, Any]) -> list[str]:
    title = 'handed to native by backend("auto"), which is faster'
    lines = [
        f"  {debt['operator']} on {debt['device']}, {debt['family']}: "
        f"{debt['ratio']:.2f}x ({debt['measured']})"
        for debt in facts["debts"]
    ]
    return [title, *(lines or ["  nothing"])]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="torchops info",
        description="What was built, what is running, which operators have kernels of their own.",
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    facts = info()
    print(json.dumps(facts, indent=2) if parser.parse_args(argv).json else facts)
    return 0
