"""The record of a run: a report, its figures as JSON and in the loggers, and one machine-readable line."""

import json
import math
import platform
import shlex
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from train import console, distenv, pictures, resume
from train.callbacks import History, Throughput
from train.data import ImageData
from train.evaluation import Findings
from train.timing import TimeShares

PICTURES = {
    "curves.png": "loss, accuracy, learning rate and throughput over the epochs",
    "confusion.png": "labels and predictions of the test images",
    "mistakes.png": "the test images misclassified with the most confidence",
}
UNITS = {
    **dict.fromkeys(("test_accuracy", "top5_accuracy", "val_accuracy", "val_top5_accuracy"), "share of images"),
    "train_accuracy": "share of images, while the weights change",
    **dict.fromkeys(("test_loss", "train_loss"), "nats per image"),
    **dict.fromkeys(("correct", "total"), "test images"),
    "tested_weights": "checkpoint",
    "epochs": "passes over the training images",
    "fit_seconds": "s, validation included",
    "images_per_second": "images/s of all ranks",
    "data_wait": "share of the time between steps",
    **dict.fromkeys(("data_wait_share", "collective_share", "compute_share"), "share of a step"),
    "world_size": "ranks",
    "bn_batch": "images that share batch statistics",
    "parameters": "numbers, trained and frozen",
    "run_dir": "directory",
}
KEPT = {"csv/metrics.csv": "Every logged row", "checkpoints": "Weights"}


def headline(run_dir: str, trainer: Trainer, global_batch_size: int) -> str:
    """Return one line with the run directory, the ranks and their device, and the batch size."""
    ranks = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
    per_rank = global_batch_size / trainer.world_size
    return f"{run_dir}: {ranks}, global batch {global_batch_size} = {trainer.world_size} x {per_rank:g}"


def last_epoch(trainer: Trainer) -> dict[str, float]:
    """Return the metrics of the last epoch, which may have been trained before a resume."""
    history = [callback.epochs[-1] for callback in _callbacks(trainer, History) if callback.epochs]
    known = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return dict(history[0]) | known if history else known


def figures(
    config: DictConfig, trainer: Trainer, metrics: Mapping[str, float], seconds: float, bn_batch: float | None
) -> dict[str, Any]:
    """Return the names and values of the report's table.

    Args:
        metrics: of the last epoch and the test.
        seconds: duration of the training in this process.
        bn_batch: images that share batch statistics, None without such statistics.
    """
    times = [
        *((name, getattr(clock, name)) for clock in _callbacks(trainer, Throughput) for name in clock.figures),
        *((name, share) for clock in _callbacks(trainer, TimeShares) for name, share in clock.shares.items()),
    ]
    last = ("val_accuracy", "val_top5_accuracy", "train_accuracy", "train_loss")
    return {
        "test_accuracy": metrics["test_accuracy"],
        "correct": int(metrics["test_correct"]),
        "total": int(metrics["test_total"]),
        "top5_accuracy": metrics["test_top5_accuracy"],
        "test_loss": metrics["test_loss"],
        "tested_weights": config.test_checkpoint,
        **{name: metrics[name] for name in last if name in metrics},
        "epochs": _epochs(trainer),
        "fit_seconds": seconds,
        **dict(times),
        "world_size": trainer.world_size,
        "bn_batch": bn_batch,
        "parameters": sum(parameter.numel() for parameter in trainer.lightning_module.parameters()),
        "run_dir": config.run_dir,
    }


def publish(
    config: DictConfig, trainer: Trainer, figures: Mapping[str, Any], findings: Findings, data: ImageData
) -> None:
    """Write the report with its pictures, hand both to the loggers, and print the figures; rank 0 calls it."""
    directory = Path(config.run_dir)
    record = (directory, figures, command(), environment(trainer), OmegaConf.to_yaml(config))
    write_report(*record)
    pictures.draw_test(findings, data.class_names(), data.normalize, directory)
    path = write_report(*record)  # with the pictures
    drawn = [directory / name for name in PICTURES if (directory / name).exists()]
    for logger in trainer.loggers:
        if hasattr(logger, "record"):
            logger.record(resume.flat(OmegaConf.to_container(config, resolve=True)), figures, drawn)
    print_table(figures)
    print(f"report: {path}")
    console.say(result_line(figures))


def command() -> str:
    """Return the command that repeats this run on this node."""
    ranks = distenv.local_world_size()
    launcher = ["python"] if distenv.world_size() == 1 else ["torchrun", "--standalone", f"--nproc-per-node={ranks}"]
    return shlex.join([*launcher, "-m", "train", *_hydra_arguments()])


def _hydra_arguments() -> list[str]:
    """Return the flags and overrides of this process's command line; a job of a sweep becomes a run of its own."""
    if not HydraConfig.initialized():
        return []
    hydra = HydraConfig.get()
    flags = [] if hydra.job.config_name == "train" else ["--config-name", str(hydra.job.config_name)]
    for source in hydra.runtime.config_sources:
        path = source.path.removeprefix("file://")
        if source.provider == "main" and source.path != "conf" and source.schema != "pkg":
            flags += ["--config-path", path]
        if source.provider == "command-line":
            flags += ["--config-dir", path]
    of_hydra = [override for override in hydra.overrides.hydra if not override.startswith("hydra.mode=")]
    return [*flags, *hydra.overrides.task, *of_hydra]


def _callbacks(trainer: Trainer, kind: type) -> list[Any]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def _epochs(trainer: Trainer) -> int:
    """Return the number of epochs that have begun; Lightning's differs for a run that ended within one."""
    if not trainer.global_step:
        return 0
    return math.ceil(trainer.global_step / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))


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
                _markdown_table(figures, UNITS),
                *shown,
                "Measured with:\n",
                _markdown_table(environment),
                f"Configuration:\n\n```yaml\n{config}```\n",
                *(f"{text}: `{name}`\n" for name, text in KEPT.items() if (directory / name).exists()),
            ]
        )
    )
    return path


def _markdown_table(rows: Mapping[str, object], units: Mapping[str, str] | None = None) -> str:
    lines = [f"| {_title(name)} | {_cell(value)} |" for name, value in rows.items()]
    if units is None:
        return "\n".join(["| | |", "|---|---|", *lines, ""])
    lines = [f"{line} {units.get(name, '')} |" for line, name in zip(lines, rows, strict=True)]
    return "\n".join(["| | | unit |", "|---|---|---|", *lines, ""])


def _title(name: str) -> str:
    return name.replace("_", " ").replace("bn ", "BN ")


def _cell(value: object) -> str:
    return _text(value).replace("|", "\\|")


def print_table(figures: Mapping[str, object]) -> None:
    """Print the figures as a table."""
    table = Table(title="result", show_header=False)
    for name, value in figures.items():
        table.add_row(_title(name), Text(_text(value)), UNITS.get(name, ""))  # a string would be read as markup
    Console().print(table)


def result_line(figures: Mapping[str, object]) -> str:
    """Return the line `RESULT test_accuracy=... correct=... total=... epochs=... world_size=... run_dir=...`."""
    names = ("test_accuracy", "correct", "total", "epochs", "world_size", "run_dir")
    return " ".join(["RESULT", *(f"{name}={_text(figures[name])}" for name in names)])


def _text(value: object) -> str:
    if value is None:
        return "none"
    if value != value:
        return "not measured"
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)
