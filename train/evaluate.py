"""`python -m train.evaluate checkpoint=FILE [output=DIR] [key=value ...]`: test a checkpoint, alone or under torchrun.

The correct and total counts are the same integers for every number of ranks and every batch size, and equal those that
training printed for the same weights. Any value of the run's configuration can be overridden, such as data.root=DIR.
Classes of other data are matched by name: they may be some of the run's, and the others then have a total of 0.

    python -m train.evaluate checkpoint=outputs/RUN/checkpoints/best.ckpt
    torchrun --standalone --nproc-per-node=4 -m train.evaluate checkpoint=outputs/RUN/checkpoints/last.ckpt
"""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from train import commands, identity, images, pictures
from train.commands import Run
from train.evaluation import Findings
from train.stop import StopsTests


def evaluate(options: DictConfig, run: Run) -> None:
    """Test, print a table of the classes, and write `evaluation.json` and pictures to `output`."""
    path = Path(options.checkpoint)
    config, model, data, classes = run
    identity.match(data, classes)
    findings = Findings(data.num_classes)
    trainer = commands.trainer_for(config, [findings, StopsTests()])
    trainer.test(model, datamodule=data, verbose=False)
    if not trainer.is_global_zero:
        return
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    output = Path(options.output or path.parent.parent / f"evaluation_{path.stem}")
    output.mkdir(parents=True, exist_ok=True)
    figures = {
        "test_accuracy": metrics["test_accuracy"],
        "top5_accuracy": metrics["test_top5_accuracy"],
        "correct": int(metrics["test_correct"]),
        "total": int(metrics["test_total"]),
        "test_loss": metrics["test_loss"],
        "world_size": trainer.world_size,
        "checkpoint": str(path),
    }
    per_class: list[dict[str, Any]] = [
        {"class": name, "correct": correct, "total": total}
        for name, (correct, total) in zip(classes, findings.per_class(), strict=True)
    ]
    (output / "evaluation.json").write_text(json.dumps({**figures, "per_class": per_class}, indent=2) + "\n")
    pictures.draw_test(findings, classes, data.normalize, output)
    table = Table("class", "correct", "total", "accuracy", title="test")
    for row in per_class:
        correct, total = row["correct"], row["total"]
        accuracy = f"{correct / total:.4f}" if total else "-"
        table.add_row(Text(images.printable(row["class"])), str(correct), str(total), accuracy)
    Console().print(table)
    print(f"pictures: {output}")
    print("RESULT", *(f"{name}={_text(value)}" for name, value in figures.items()), flush=True)


def _text(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    commands.main("evaluate", evaluate, __doc__)
