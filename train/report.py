"""The record of a run: curves, a report, and one line that machines read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.table import Table

TRAIN, VAL, RATE = "#4477AA", "#EE6677", "#228833"  # Paul Tol's bright palette, safe for colour-blind readers


def draw_curves(epochs: Sequence[Mapping[str, float]], rates: Sequence[tuple[float, float]], path: Path) -> None:
    """Draw loss, accuracy and learning rate over the epochs.

    Args:
        epochs: for each epoch `epoch` and, where known, `train_loss`, `val_loss`, `train_accuracy`, `val_accuracy`.
        rates: (epochs done, learning rate).
        path: of the picture.
    """
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, what in ((loss, "loss"), (accuracy, "accuracy")):
        for part, label, colour in (("train", "train (running)", TRAIN), ("val", "validation", VAL)):
            points = [(row["epoch"], row[f"{part}_{what}"]) for row in epochs if f"{part}_{what}" in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, color=colour, marker=".", linewidth=1.8)
        axes.legend(frameon=False)
    loss.set(title="Cross-entropy", ylabel="mean over images", yscale="log")
    accuracy.set(title="Accuracy", ylabel="images classified correctly")
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    rate.plot([epoch for epoch, _ in rates], [value for _, value in rates], color=RATE, linewidth=1.8)
    rate.set(title="Learning rate", ylabel="rate of one step")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def write_report(directory: Path, figures: Mapping[str, object], command: str) -> Path:
    """Write `report.md` and `result.json` into the run's directory and return the former's path.

    Args:
        figures: the names and values of the table.
        command: that repeats the run.
    """
    (directory / "result.json").write_text(json.dumps(figures, indent=2) + "\n")
    rows = "\n".join(f"| {name.replace('_', ' ')} | {_text(value)} |" for name, value in figures.items())
    curves = "\n![loss, accuracy and learning rate over the epochs](curves.png)\n"
    path = directory / "report.md"
    path.write_text(
        f"# {directory.name}\n\n    {command}\n\n| | |\n|---|---|\n{rows}\n"
        + (curves if (directory / "curves.png").exists() else "")
        + "\nEvery epoch: `csv/metrics.csv`; configuration: `config.yaml`; weights: `checkpoints/`.\n"
    )
    return path


def print_table(figures: Mapping[str, object]) -> None:
    """Show the figures on the console."""
    table = Table(title="result", show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), _text(value))
    Console().print(table)


def result_line(figures: Mapping[str, object]) -> str:
    """Return the line `RESULT test_accuracy=... correct=... total=... epochs=... world_size=... run_dir=...`."""
    names = ("test_accuracy", "correct", "total", "epochs", "world_size", "run_dir")
    return " ".join(["RESULT", *(f"{name}={_text(figures[name])}" for name in names)])


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
