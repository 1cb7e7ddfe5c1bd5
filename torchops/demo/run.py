"""The demo from data to picture, with its progress on the way."""

import argparse
import os
import time
from functools import partial

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import torchops
from torchops.bench.models import NETWORKS
from torchops.demo import BATCH, data, report
from torchops.demo.layer_times import LayerTime, layer_times
from torchops.demo.training import Comparison, Plan, compare

NAMES = {"bn_lenet": "BN-LeNet", "small_resnet": "ResNet-8"}


def run(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dataset = data.load()
    available = len(dataset.train.labels)
    steps_per_epoch = min(arguments.images, available) // BATCH
    if not steps_per_epoch:
        raise data.DataError(
            f"{dataset.folder}: {available} training images are fewer than one batch of {BATCH}."
        )
    plan = Plan(arguments.epochs, steps_per_epoch, arguments.seed)
    console = Console(highlight=False, markup=False)
    # The figures are to be those of torchops' kernels, also where "auto" would choose torch's.
    mode = os.environ.get("TORCHOPS_BACKEND", "own")
    console.print(
        f"torchops {torchops.__version__} (backend {mode}), torch {torch.__version__},"
        f" {torch.get_num_threads()} threads\n"
        f"Fashion-MNIST from {dataset.folder}:\n{steps_per_epoch * BATCH:,} of {available:,}"
        f" training images per epoch, {len(dataset.test.labels):,} test images",
        soft_wrap=True,
    )
    results: list[tuple[Comparison, list[LayerTime]]] = []
    with torchops.backend(mode), progress_bar(console) as progress:
        for network, name in NAMES.items():
            task = progress.add_task(name, total=plan.epochs * plan.steps_per_epoch)
            torch.manual_seed(plan.seed)
            model = NETWORKS[network].build()
            comparison = compare(
                name,
                model,
                dataset,
                plan,
                after_step=partial(progress.advance, task),
                after_epoch=partial(print_epoch, progress.console, name, plan.epochs),
            )
            images = data.normalised(dataset.train.images[:BATCH])
            results.append((comparison, layer_times(model, images, arguments.repeats)))
    report.print_tables(console, results)
    path = arguments.output / "demo.png"
    report.plot(path, results)
    seconds = time.perf_counter() - start
    console.print(f"Picture: {path}. {seconds:.0f} seconds in all.", soft_wrap=True)


def print_epoch(
    console: Console, name: str, epochs: int, epoch: int, native: float, converted: float
) -> None:
    console.print(
        f"{name}, epoch {epoch + 1}/{epochs}: loss {native:.4f} torch.nn, {converted:.4f} torchops"
    )


def progress_bar(console: Console) -> Progress:
    """On a terminal; a pipe or a file gets the lines of the epochs only."""
    return Progress(
        TextColumn("{task.description:12}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
