"""`torchops demo`: trains two networks on Fashion-MNIST with torch.nn and with torchops."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

BATCH = 64
EPOCHS, IMAGES, REPEATS = 5, 6000, 21
QUICK_EPOCHS, QUICK_IMAGES, QUICK_REPEATS = 1, 640, 5


def main(argv: list[str]) -> int:
    """Runs the demo; 0 when it went through, 1 after one readable error when it could not."""
    arguments = parse(argv)
    try:
        from torchops.demo.run import run
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("rich", "matplotlib"):
            raise
        return fail(
            f"the demo needs {package}, which is not installed (it comes with the extra"
            f" torchops[bench]). Type:\n  {sys.executable} -m pip install rich matplotlib"
        )
    from torchops.demo.data import DataError

    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        run(arguments)
    except DataError as error:
        return fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        return fail(f"{error.filename}: {error.strerror}. Choose a folder with --output DIR.")
    return 0


def fail(message: str) -> int:
    print(f"torchops demo: {message}", file=sys.stderr)
    return 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchops demo",
        description="Trains BN-LeNet and a small ResNet (ResNet-8) on Fashion-MNIST, once with"
        " torch.nn and once with torchops from the same weights and batches, and compares them.",
        epilog="Data: the folder that TORCHOPS_DATA names, else Debian's package"
        " dataset-fashion-mnist, else the subset in the repository's examples/data.",
    )
    add = parser.add_argument
    add("--epochs", type=at_least(1), metavar="N", help=f"default {EPOCHS}")
    add(
        "--images",
        type=at_least(BATCH),
        metavar="N",
        help=f"training images per epoch, default {IMAGES}; each epoch draws its own",
    )
    add(
        "--quick",
        action="store_true",
        help=f"{QUICK_EPOCHS} epoch of {QUICK_IMAGES} images: only shows that everything works",
    )
    add("--threads", type=at_least(1), metavar="N", help="default: as many as torch takes")
    add("--seed", type=at_least(0), default=0, metavar="N", help="default 0")
    add(
        "--output",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder for demo.png, default demo-output",
    )
    arguments = parser.parse_args(argv)
    arguments.epochs = arguments.epochs or (QUICK_EPOCHS if arguments.quick else EPOCHS)
    arguments.images = arguments.images or (QUICK_IMAGES if arguments.quick else IMAGES)
    arguments.repeats = QUICK_REPEATS if arguments.quick else REPEATS
    return arguments


def at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a number from {minimum} up, got {text!r}")
        return int(text)

    return number
