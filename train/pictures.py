"""The pictures of a report: curves over the epochs, the confusion matrix, the most confident mistakes.

Names of classes are drawn as they are: matplotlib would take `$` for the start of a formula.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from torch import Tensor

from train.augment import Normalize
from train.evaluation import Findings, Mistake

TRAIN, VAL, RATE, SPEED = "#4477AA", "#EE6677", "#228833", "#AA3377"  # Paul Tol's bright palette, colour-blind safe
FEW_CLASSES = 25  # up to this number, a confusion matrix shows names and counts
COLUMNS = 5

log = logging.getLogger(__name__)


def attempt(draw: Callable[..., None], *arguments: Any) -> None:
    """Draw a picture, or log a warning if that fails: the results of a run matter more.

    Args:
        draw: a function of this module.
        arguments: its arguments, of which the last is the file to write.
    """
    try:
        draw(*arguments)
    except Exception as error:
        log.warning(f"{arguments[-1]} could not be drawn ({type(error).__name__}: {error})")


def draw_test(findings: Findings, names: Sequence[str], normalize: Normalize, directory: Path) -> None:
    """Draw the confusion matrix and the mistakes of a test.

    Args:
        names: of the classes.
        normalize: has normalized the images, with its mean and std.
        directory: where the files are written.
    """
    mean, std = normalize.mean, normalize.std
    attempt(draw_confusion, findings.confusion, names, directory / "confusion.png")
    attempt(draw_mistakes, findings.mistakes, names, mean, std, directory / "mistakes.png")


def draw_curves(epochs: Sequence[Mapping[str, float]], rates: Sequence[tuple[float, float]], path: Path) -> None:
    """Draw loss, accuracy, learning rate and throughput over the epochs.

    Args:
        epochs: one mapping per epoch: `epoch` and, if known, `train_loss`, `val_loss`, `train_accuracy`,
            `val_accuracy`, `images_per_second`.
        rates: (epochs done, learning rate).
        path: file to write.
    """
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    (loss, accuracy), (rate, speed) = figure.subplots(2, 2)
    for axes, what in ((loss, "loss"), (accuracy, "accuracy")):
        for part, label, colour in (("train", "train (running)", TRAIN), ("val", "validation", VAL)):
            _draw_column(axes, epochs, f"{part}_{what}", label=label, color=colour)
        axes.legend(frameon=False)
    loss.set(title="Cross-entropy", ylabel="mean over images", yscale="log")
    bottom, top = loss.get_ylim()
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("{x:g}" if top < 10 * bottom else NullFormatter())
    accuracy.set(title="Accuracy", ylabel="images classified correctly")
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    rate.plot([epoch for epoch, _ in rates], [value for _, value in rates], color=RATE, linewidth=1.8)
    rate.set(title="Learning rate", ylabel="rate of one step")
    _draw_column(speed, epochs, "images_per_second", color=SPEED)
    speed.set(title="Throughput", ylabel="images per second, all ranks")
    speed.set_ylim(bottom=0)
    for axes in (loss, accuracy, rate, speed):
        axes.set_xlabel("epoch")
        axes.set_xlim(0, max(row["epoch"] for row in epochs) + 0.2)
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_confusion(confusion: Tensor, names: Sequence[str], path: Path) -> None:
    """Draw the confusion matrix (num_classes, num_classes), rows are labels, shaded by share of the row."""
    counts = confusion.numpy()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(7.5, 7), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the label's images")
    axes.set(title="Confusion", xlabel="predicted", ylabel="label")
    if len(names) <= FEW_CLASSES:
        axes.set_xticks(range(len(names)), names, parse_math=False)
        if max(map(len, names)) > 2:
            axes.tick_params(axis="x", rotation=45)
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names, parse_math=False)
        for row, column in zip(*counts.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(path, dpi=150)


def draw_mistakes(
    mistakes: Sequence[Mistake], names: Sequence[str], mean: Sequence[float], std: Sequence[float], path: Path
) -> None:
    """Draw the images that were misclassified with the most confidence, with label, prediction and probability."""
    columns = min(COLUMNS, max(1, len(mistakes)))
    rows = max(1, -(-len(mistakes) // columns))
    figure = Figure(figsize=(2 * columns, 2.35 * rows), layout="constrained")
    bare = {"frame_on": False, "xticks": [], "yticks": []}  # drawing ticks would take most of the time
    grid = figure.subplots(rows, columns, squeeze=False, subplot_kw=bare).ravel()
    for axes, mistake in zip(grid, mistakes, strict=False):
        pixels = mistake.image.float().permute(1, 2, 0).numpy() * np.array(std) + np.array(mean)
        axes.imshow(pixels.clip(0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
        axes.set_title(
            f"{names[mistake.label]}, taken for\n{names[mistake.predicted]} ({mistake.probability:.0%})",
            fontsize=9,
            parse_math=False,
        )
    if not mistakes:
        grid[0].text(0.5, 0.5, "no mistakes", ha="center", va="center")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _draw_column(axes, rows: Sequence[Mapping[str, float]], name: str, **style: str) -> None:  # type: ignore[no-untyped-def]
    points = [(row["epoch"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), marker=".", linewidth=1.8, **style)
