"""The command line: `torchops info | verify | bench | demo`, also as `python -m torchops`."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "info": ("torchops._info", "what was built, what is running, which operators have kernels"),
    "verify": ("torchops._verify", "check every operator on this machine against float64"),
    "bench": ("torchops.bench.cli", "measure torchops beside torch on the layers of real networks"),
    "demo": ("torchops.demo", "train two networks with torch.nn and with torchops, and compare"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs `torchops *argv` and returns the exit code: 0 good, 1 a failed check, 2 bad usage."""
    # Only the command's name is parsed here: what follows belongs to the command's own parser.
    argv = sys.argv[1:] if argv is None else argv
    command = _parser().parse_args(argv[:1]).command
    return importlib.import_module(COMMANDS[command][0]).main(argv[1:])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchops",
        description="Hand-written kernels for CNN layers, as drop-ins for torch.nn.",
        epilog="Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"torchops {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def _version() -> str:
    from torchops import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
