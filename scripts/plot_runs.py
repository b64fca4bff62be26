"""How do runs compare? Draw the validation accuracy and training loss of several run directories into one picture.

    python scripts/plot_runs.py sync=outputs/sync local=outputs/local --title "2 images per rank" --output norms.png

For example, from the repository's root (about 20 minutes on 2 cores):

    for norm in sync group local; do
        torchrun --standalone --nproc-per-node=4 -m train norm=$norm data.batch_size_per_rank=2 \\
            trainer.max_epochs=8 run_name=small_$norm
    done
    cd outputs; python ../scripts/plot_runs.py SyncBN=small_sync GroupNorm=small_group "local BN=small_local" \\
        --title "digits, 4 ranks with 2 images each" --output small_batch.png
"""

import argparse
import csv
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

COLOURS = ["#4477AA", "#228833", "#EE6677", "#AA3377", "#CCBB44", "#66CCEE"]  # Paul Tol's bright palette


def read_column(run: Path, name: str) -> list[tuple[int, float]]:
    """Return (epoch, value) from the metrics of a run, epochs counted from 1.

    Raises:
        SystemExit: the run has no metrics file, or no values in that column.
    """
    path = run / "csv" / "metrics.csv"
    if not path.exists():
        raise SystemExit(
            f"expected {path}, written by logger=csv or logger=default, got none: is {run} a run directory?"
        )
    with path.open(newline="") as file:
        points = [(int(row["epoch"]) + 1, float(row[name])) for row in csv.DictReader(file) if row.get(name)]
    if not points:
        raise SystemExit(f"expected a column {name} with values in {path}, got none: has an epoch ended?")
    return points


def draw(runs: dict[str, Path], title: str, output: Path) -> None:
    """Draw one line per run."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    for (label, run), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
        for axes, name in ((accuracy, "val_accuracy"), (loss, "train_loss")):
            axes.plot(*zip(*read_column(run, name), strict=True), label=label, color=colour, marker=".", linewidth=1.8)
    accuracy.set(title="Validation accuracy", ylabel="images classified correctly")
    accuracy.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    loss.set(title="Training loss", ylabel="cross-entropy, mean over images", yscale="log")
    for axes in (accuracy, loss):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(output, dpi=150)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="label=directory")
    parser.add_argument("--title", default="")
    parser.add_argument("--output", type=Path, default=Path("runs.png"))
    arguments = parser.parse_args()
    runs = dict(run.split("=", 1) if "=" in run else (Path(run).name, run) for run in arguments.runs)
    draw({label: Path(run) for label, run in runs.items()}, arguments.title, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    main()
