"""Which setting is best? Train every combination of some overrides, each in fresh processes, and compare them.

    python scripts/sweep.py --nproc 4 norm=sync,local,group data.batch_size_per_rank=2,8 trainer.max_epochs=8

Commas separate the values to try. Each job is a torchrun on a free port (or `python -m train` with --nproc 1). If a job
fails, the sweep records it and starts the next one. When started again, the sweep skips finished jobs and resumes
interrupted ones; other settings need another --output. At the end it writes sweep.csv and sweep.png to the output
directory and prints a table; the exit code is 1 if a job failed.
"""

import argparse
import contextlib
import csv
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.table import Table

SECONDS_TO_SAVE = 15
FIGURES = ("test_accuracy", "correct", "total", "train_loss", "images_per_second", "fit_seconds")


def values_of(override: str) -> list[str]:
    """Return `key=a` and `key=b` for `key=a,b`; commas within brackets do not separate values."""
    key, separator, values = override.partition("=")
    if not key or not separator or not values:
        raise SystemExit(f"error: expected key=value or key=value,value, got {override}")
    return [f"{key}={value}" for value in re.split(r",(?![^\[{(]*[\]})])", values)]


def name_of(job: tuple[str, ...]) -> str:
    """Return a directory name for a job's choices."""
    return re.sub(r"[^\w.=,+-]+", "_", ",".join(job)) or "default"


def run_job(job: tuple[str, ...], fixed: list[str], directory: Path, nproc: int) -> str:
    """Train unless the job is done; return "done" or "failed".

    Raises:
        SystemExit: the directory has a job with other settings.
    """
    settings = "\n".join([f"--nproc {nproc}", *sorted(fixed), *job]) + "\n"
    record = directory / "settings.txt"
    if record.exists() and record.read_text() != settings:
        raise SystemExit(
            f"error: {directory} has a job with other settings ({', '.join(record.read_text().split())}): "
            "name another directory with --output DIR"
        )
    if (directory / "result.json").exists():
        return "done"
    directory.mkdir(parents=True, exist_ok=True)
    record.write_text(settings)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"] if nproc > 1 else []
    command = [sys.executable, *launcher, "-m", "train", *fixed, *job]
    command += [f"run_name='{directory.name}'", f"run_dir='{directory}'", "resume=auto"]
    with (
        (directory / "output.log").open("a") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the job receives the signal too, and saves
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_SAVE)
            process.kill()
            raise
    return "done" if code == 0 and (directory / "result.json").exists() else "failed"


def error_of(directory: Path) -> str:
    """Return the last error message in the output of a job."""
    lines = (directory / "output.log").read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if "rror" in line), "no error message")


def write(rows: list[dict[str, str]], output: Path) -> None:
    """Write sweep.csv and sweep.png, and print the table."""
    with (output / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table = Table(*rows[0], title=str(output))
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    console.width = max(console.width, 160)  # output to a file has no terminal width
    console.print(table)
    done = [row for row in rows if row["state"] == "done"]
    figure = Figure(figsize=(8, 1.2 + 0.4 * max(1, len(done))), layout="constrained")
    axes = figure.subplots()
    accuracies = [float(row["test_accuracy"]) for row in done]
    bars = axes.barh([row["job"] for row in done], accuracies, color="#4477AA")
    axes.bar_label(bars, [f" {accuracy:.2%}" for accuracy in accuracies])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.12), xlabel="test accuracy", xticks=[share / 5 for share in range(6)])
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1))
    if not done:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no job is done", transform=axes.transAxes, ha="center")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output / "sweep.png", dpi=150)


def main() -> None:
    """Read the command line and run the jobs in sequence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="key=value[,value]")
    parser.add_argument("--nproc", type=int, default=1, help="ranks of each job")
    parser.add_argument("--output", type=Path, default=Path("outputs/sweep"))
    arguments = parser.parse_args()
    if arguments.nproc < 1:
        parser.error(f"--nproc must be at least 1, got {arguments.nproc}")
    choices = [values_of(override) for override in arguments.overrides]
    fixed = [values[0] for values in choices if len(values) == 1]
    axes = [values for values in choices if len(values) > 1]
    rows = []
    for job in itertools.product(*axes):
        directory = (arguments.output / name_of(job)).resolve()
        try:
            state = run_job(job, fixed, directory, arguments.nproc)
        except KeyboardInterrupt:
            sys.exit("stopped: run the same command again to resume this job")
        print(f"{state}: {name_of(job)} ({directory}/output.log)", flush=True)
        if state == "failed":
            print(f"    {error_of(directory)}", flush=True)
        result = json.loads((directory / "result.json").read_text()) if state == "done" else {}
        figures = {name: "" if result.get(name) is None else f"{result[name]:.5g}" for name in FIGURES}
        rows.append({"job": " ".join(job) or "default", "state": state, **figures})
    write(rows, arguments.output)
    if any(row["state"] != "done" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
