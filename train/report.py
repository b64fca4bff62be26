"""The record of a run: a report, its figures as JSON, and one machine-readable line."""

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text

PICTURES = {
    "curves.png": "loss, accuracy, learning rate and throughput over the epochs",
    "confusion.png": "labels and predictions of the test images",
    "mistakes.png": "the test images misclassified with the most confidence",
}
KEPT = {"csv/metrics.csv": "Every logged row", "checkpoints": "Weights"}


def environment(trainer: Trainer) -> dict[str, str]:
    """Return the conditions of the measurement: versions, commit, device, world size and precision."""
    device = trainer.strategy.root_device
    versions = {name: version(name) for name in ("torch", "torchvision", "lightning", "hydra-core")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return {
        "versions": ", ".join(f"{package} {number}" for package, number in versions.items()),
        "Python": platform.python_version(),
        "commit": commit(),
        "device": name,
        "world": f"{count(trainer.world_size, 'rank')} on {count(trainer.num_nodes, 'node')}",
        "precision": str(trainer.precision),
    }


def count(number: int, what: str) -> str:
    """Return "1 rank" or "2 ranks"."""
    return f"{number} {what}{'s' * (number != 1)}"


def commit() -> str:
    """Return the commit of this source, plus "with changes" if files differ from it, or "none" outside a git clone."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return found.stdout.strip() + (" with changes" if changes.stdout.strip() else "")


def write_report(
    directory: Path, figures: Mapping[str, object], command: str, environment: Mapping[str, str], config: str
) -> Path:
    """Write `report.md` and `result.json` into the run's directory and return the path of `report.md`.

    Args:
        figures: the names and values of the table.
        command: the command that repeats the run.
        environment: names and values of the conditions, see `environment`.
        config: the configuration as YAML.
    """
    known = {name: None if value != value else value for name, value in figures.items()}  # JSON has no NaN
    (directory / "result.json").write_text(json.dumps({**known, "environment": environment}, indent=2) + "\n")
    shown = [f"![{text}]({name})\n" for name, text in PICTURES.items() if (directory / name).exists()]
    path = directory / "report.md"
    path.write_text(
        "\n".join(
            [
                f"# {directory.name}\n\n    {command}\n",
                _markdown_table(figures),
                *shown,
                "Measured with:\n",
                _markdown_table(environment),
                f"Configuration:\n\n```yaml\n{config}```\n",
                *(f"{text}: `{name}`\n" for name, text in KEPT.items() if (directory / name).exists()),
            ]
        )
    )
    return path


def _markdown_table(rows: Mapping[str, object]) -> str:
    lines = [f"| {name.replace('_', ' ')} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _cell(value: object) -> str:
    return _text(value).replace("|", "\\|")


def print_table(figures: Mapping[str, object]) -> None:
    """Print the figures as a table."""
    table = Table(title="result", show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), Text(_text(value)))  # a string would be read as markup
    Console().print(table)


def result_line(figures: Mapping[str, object]) -> str:
    """Return the line `RESULT test_accuracy=... correct=... total=... epochs=... world_size=... run_dir=...`."""
    names = ("test_accuracy", "correct", "total", "epochs", "world_size", "run_dir")
    return " ".join(["RESULT", *(f"{name}={_text(figures[name])}" for name in names)])


def _text(value: object) -> str:
    if value != value:
        return "not measured"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
