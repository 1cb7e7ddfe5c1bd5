"""The demo's results as tables and as a picture."""

from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table

from torchops.demo.layer_times import LayerTime
from torchops.demo.training import Comparison, Training

Results = list[tuple[Comparison, list[LayerTime]]]
NATIVE, CONVERTED = "torch.nn", "torchops"
COLOURS = {NATIVE: "#9aa5b1", CONVERTED: "#d1495b"}
INK = "#323f4b"


def print_tables(console: Console, results: Results) -> None:
    table = new_table("Training", "network", "layers")
    for heading in (
        "test\naccuracy",
        "final\nloss",
        "seconds\nper epoch",
        "gradient\nerror",
        "gradient\ndifference",
    ):
        table.add_column(heading, justify="right")
    for comparison, _ in results:
        native, converted = comparison.native, comparison.converted
        table.add_row(comparison.network, NATIVE, *training_cells(comparison, native), "")
        difference = f"{comparison.gradient_difference:.1e}"
        table.add_row("", CONVERTED, *training_cells(comparison, converted), difference)
        table.add_section()
    console.print(table)
    console.print(
        "Final loss: mean of the last epoch. Gradient error: from float64, at step 1, the\n"
        "largest of all parameters, relative to the largest gradient. Gradient difference:\n"
        "the same between the two. Ratios: above 1 torchops is faster.\n",
        soft_wrap=True,
    )
    for comparison, layers in results:
        console.print(layer_table(comparison.network, layers))


def training_cells(comparison: Comparison, training: Training) -> tuple[str, ...]:
    return (
        f"{training.accuracy:.1%}",
        f"{training.mean_loss(comparison.plan.steps_per_epoch):.4f}",
        f"{training.seconds / comparison.plan.epochs:.2f}",
        f"{training.gradient_error:.1e}",
    )


def layer_table(network: str, layers: list[LayerTime]) -> Table:
    table = new_table(f"{network}: forward + backward of each layer alone, ms", "layer", "input")
    for heading in NATIVE, CONVERTED, "ratio":
        table.add_column(heading, justify="right")
    for layer in layers:
        table.add_row(layer.layer, layer.input, *time_cells(layer.native, layer.converted))
    table.add_section()
    table.add_row(
        "together",
        "",
        *time_cells(
            sum(layer.native for layer in layers), sum(layer.converted for layer in layers)
        ),
    )
    return table


def time_cells(native: float, converted: float) -> tuple[str, str, str]:
    return f"{native * 1e3:.3f}", f"{converted * 1e3:.3f}", f"{native / converted:.2f}x"


def new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def plot(path: Path, results: Results) -> None:
    """One column per network: loss curves above, layer times below."""
    heights = 4.2, 1.4 + 0.3 * max(len(layers) for _, layers in results)
    figure = Figure(figsize=(8 * len(results), sum(heights)))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    for column, (comparison, layers) in enumerate(results, 1):
        plot_losses(above.add_subplot(1, len(results), column), comparison)
        plot_layers(below.add_subplot(1, len(results), column), comparison.network, layers)
    figure.savefig(path, dpi=110)


def plot_losses(axes: Axes, comparison: Comparison) -> None:
    """Every step faintly, their running mean on top; torchops thin over torch.nn wide, so that
    both show where they agree."""
    runs = (NATIVE, comparison.native, 5.0), (CONVERTED, comparison.converted, 1.5)
    for name, training, width in runs:
        epochs = [
            (step + 1) / comparison.plan.steps_per_epoch for step in range(len(training.losses))
        ]
        seconds = training.seconds / comparison.plan.epochs
        label = f"{name}: {training.accuracy:.1%} test accuracy, {seconds:.2f} s / epoch"
        colour = COLOURS[name]
        axes.plot(epochs, training.losses, color=colour, linewidth=width / 3, alpha=0.3)
        axes.plot(epochs, running_mean(training.losses), color=colour, linewidth=width, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, comparison.plan.epochs)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch", color=INK)
    tidy(axes, f"{comparison.network}: training loss", "y")
    axes.legend(frameon=False, labelcolor=INK)


def running_mean(losses: list[float], reach: int = 10) -> list[float]:
    """Over `reach` steps before and after; the first steps reach only as far as the start."""
    means = []
    for step in range(len(losses)):
        reached = min(reach, step)
        window = losses[step - reached : step + reached + 1]
        means.append(sum(window) / len(window))
    return means


def plot_layers(axes: Axes, network: str, layers: list[LayerTime]) -> None:
    """Two bars per layer in call order and their ratio."""
    native = [layer.native * 1e3 for layer in layers]
    converted = [layer.converted * 1e3 for layer in layers]
    for name, times, shift in (NATIVE, native, -0.2), (CONVERTED, converted, 0.2):
        positions = [row + shift for row in range(len(layers))]
        axes.barh(positions, times, 0.4, color=COLOURS[name], label=name)
    for row, (own, other) in enumerate(zip(converted, native, strict=True)):
        axes.text(max(own, other), row, f"  {other / own:.2f}x", va="center", color=INK)
    axes.set_yticks(range(len(layers)), [f"{layer.layer}  {layer.input}" for layer in layers])
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.set_xlabel("forward + backward of each layer alone, ms", color=INK)
    tidy(axes, f"{network}: layer times", "x")
    axes.legend(frameon=False, labelcolor=INK, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def tidy(axes: Axes, title: str, grid: Literal["x", "y"]) -> None:
    axes.set_title(title, loc="left", color=INK, fontweight="bold")
    axes.grid(axis=grid, color="#e4e7eb")
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    axes.spines[["top", "right", "left" if grid == "y" else "bottom"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd2d9")
