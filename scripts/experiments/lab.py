"""What every experiment needs: many small trainings in a few processes that stay, intervals, a CSV, a page.

An experiment is a script with four functions and a docstring:

    jobs(seeds, quick) -> a list of dicts, each the settings of one job
    run(job) -> a list of rows, each a dict; called on every rank, and the rows of rank 0 count
    draw(rows) -> a matplotlib Figure
    sentence(rows) -> what was seen

The first line of the docstring is the title, the paragraph after it the claim with its source, the rest says how.
"""

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also runs from a checkout that is not installed

import torch  # noqa: E402
from common import COLOURS, append_rows, head, plain_log, read_rows, save, tidy  # noqa: E402
from figures import Interval, Row, column, difference, interval, levels, line, panels, where  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything  # noqa: E402
from torch import Tensor  # noqa: E402
from torchvision.datasets import CIFAR10  # noqa: E402

from train import console, datasets  # noqa: E402
from train.classifier import ImageClassifier  # noqa: E402
from train.data import ImageData  # noqa: E402
from train.run import build, compose  # noqa: E402

__all__ = [  # what experiments use, beside what is defined below
    "COLOURS",
    "Interval",
    "column",
    "difference",
    "interval",
    "levels",
    "line",
    "panels",
    "plain_log",
    "tidy",
    "where",
]

ROWS = ROOT / "benchmarks" / "experiments"
PAGES = ROOT / "docs" / "experiments"
CORES = 2  # single-process jobs run in as many processes, so that results do not depend on the machine's cores
SEEDS = 5
ORDER = ["images_per_rank", "segmentation", "world_size", "evaluation_statistics", "batch_size", "initialization_scale"]
ORDER += ["learning_rate", "gradient_flow", "order", "regularization", "temperature", "smoothness"]  # in the gallery
GALLERY = """
What papers and texts claim about batch normalization, tried on real images with the trainer and the public API, on two
CPU cores. Each page names the claim and its source, the method, the command that repeats it, and what was seen, whether
it agrees or not. Intervals are 95 % confidence intervals of a mean over the seeds (Student's t). `make experiments
DATA=DIR` repeats all of them, with `cifar-10-batches-py` in `DIR`. The networks are small and the trainings short; what
they show about large ones is a matter of judgement.
"""
WORKER = "SYNCBN_EXPERIMENT"  # set in the processes that train
SMALL_RESNET = [  # pre-activation ResNet with one unit in each of 3 stages: 7 norms
    "model=own",
    "model._target_=train.preact_resnet.PreActResNet",
    "+model.block={_target_: hydra.utils.get_class, path: train.preact_resnet.PreActBlock}",
    "+model.units=[1,1,1]",
    "+model.width=8",
    "+model.fused=false",  # for such small layers the fused unit takes three times as long
    "+model.in_channels=${data.in_channels}",
]
CONVNET = ["model=own", "model._target_=convnet.ConvNet", "+model.in_channels=${data.in_channels}"]
ADAM = ["optimizer=adamw", "optimizer.weight_decay=0", "scheduler=constant"]
SGD = ["optimizer.factory.nesterov=false", "optimizer.weight_decay=0", "scheduler=constant"]
TRAINS_ONLY = ["+trainer.limit_val_batches=0"]


# --- training -----------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A run of the trainer.

    Attributes:
        train_loss, train_accuracy: of every optimizer step, over all ranks.
        epochs: the metrics that Lightning logged, after every epoch.
        test: `test_loss` and `test_accuracy`.
        trainer, model, data: as they are after the test.
    """

    train_loss: list[float]
    train_accuracy: list[float]
    epochs: list[dict[str, float]]
    test: dict[str, float]
    trainer: Trainer
    model: ImageClassifier
    data: ImageData


class _Curves(Callback):
    """Records the sums of every optimizer step, and the metrics of every epoch."""

    def __init__(self) -> None:
        self.sums: list[list[float]] = []  # of an optimizer step: loss, correct, total
        self.epochs: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss, correct, _, total, _ = pl_module.step_sums.tolist()  # type: ignore[union-attr, operator]
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.sums.append([0.0, 0.0, 0.0])
        self.sums[-1] = [old + new for old, new in zip(self.sums[-1], (loss, correct, total), strict=True)]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def train(overrides: Sequence[str], callbacks: Sequence[Callback] = (), test: bool = True) -> Trained:
    """Train with the trainer, and test on the whole test set; every rank calls it.

    Args:
        overrides: of the configuration of `python -m train`, on the CPU, without files.
        callbacks: more of them, which measure or change something during the run.
        test: whether to compute the test loss and accuracy.
    """
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["trainer=cpu", "logger=none", "callbacks=none", "trainer.log_every_n_steps=1000000"]
        fixed += ["+trainer.enable_progress_bar=false", "+trainer.enable_checkpointing=false", f"run_dir={folder}"]
        config = compose([*fixed, *overrides])
        seed_everything(config.seed, workers=True, verbose=False)
        trainer, model, data = build(config)
        curves = _Curves()
        trainer.callbacks += [*callbacks, curves]  # type: ignore[attr-defined]
        trainer.fit(model, datamodule=data)
        tested = trainer.test(model, datamodule=data, verbose=False)[0] if test else {}
    sums = torch.tensor(curves.sums, dtype=torch.float64)
    return Trained(
        (sums[:, 0] / sums[:, 2]).tolist(),
        (sums[:, 1] / sums[:, 2]).tolist(),
        curves.epochs,
        {name: float(value) for name, value in tested.items()},
        trainer,
        model,
        data,
    )


def rate(learning_rate: float, batch: int) -> list[str]:
    """Return overrides for batches of `batch` images and this learning rate."""
    return [f"data.global_batch_size={batch}", f"optimizer.lr_per_256={learning_rate * 256 / batch!r}"]


@torch.no_grad()
def logits(trained: Trained, part: str) -> tuple[Tensor, Tensor]:
    """Return the logits (N, num_classes) and labels (N,) of the network in evaluation mode.

    Args:
        part: "train", for the training images in their order, or "test".
    """
    data = trained.data
    dataset = data.train_set if part == "train" else data.test_set
    network = trained.model.network.eval()
    found = []
    for images, labels in torch.utils.data.DataLoader(dataset, 500, collate_fn=data.collate):
        found.append((network(data.normalize(images)), labels))
    return torch.cat([scores for scores, _ in found]), torch.cat([labels for _, labels in found])


def accuracy(trained: Trained, part: str) -> float:
    """Return the accuracy in percent, see `logits`."""
    scores, labels = logits(trained, part)
    return 100 * (scores.argmax(1) == labels).double().mean().item()


@cache
def _cifar10(root: str) -> datasets.Splits:
    return datasets.torchvision_dataset(root, factory=CIFAR10)


def cifar10(root: str, download: bool = False) -> datasets.Splits:
    """Return CIFAR-10, read once by each process."""
    return _cifar10(root)


def small_cifar10(num_train: int, num_test: int = 10_000, num_val: int = 0) -> list[str]:
    """Return overrides for images that are the same for all seeds, without augmentation.

    Args:
        num_train, num_val: images of the training set to train and to validate with.
        num_test: images at the beginning of the test set.
    """
    root = os.environ.get("SYNCBN_DATA", "data")
    found = ["data=cifar10", "data.source._target_=lab.cifar10_subset", "~data.source.factory"]
    found += [f"data.root={root}", f"+data.source.num_test={num_test}", "data.train_transforms=[]"]
    total = num_train + num_val
    return [*found, f"+data.source.num_train={total}", f"data.val_fraction={num_val / total!r}"]


def cifar10_subset(root: str, download: bool = False, *, num_train: int, num_test: int) -> datasets.Splits:
    """Return part of CIFAR-10: a stratified choice of training images, and the first test images."""
    splits = datasets.fewer(cifar10(root), num_train, 0)
    test = torch.utils.data.TensorDataset(*splits.test[:num_test])
    return splits._replace(test=test)


# --- the experiment -----------------------------------------------------------------------------------------------


def main(ranks: int = 1) -> None:
    """Read the command line of an experiment, and run, draw and describe it.

    Args:
        ranks: ranks of each job; a job may ask for others with the key "ranks".
    """
    experiment = sys.modules["__main__"]
    if WORKER in os.environ:
        _work(experiment.run)
        return
    name = Path(experiment.__file__).stem  # type: ignore[arg-type]
    parser = argparse.ArgumentParser(description=(experiment.__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds 0, 1, ... (at least 2 for intervals)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="directory of cifar-10-batches-py")
    parser.add_argument("--csv", type=Path, default=ROWS / f"{name}.csv")
    parser.add_argument("--pages", type=Path, default=PAGES, help="directory of the page and its picture")
    parser.add_argument("--draw", action="store_true", help="draw and describe the rows of the CSV, without a run")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps, to see that it runs; needs --csv and --pages"
    )
    arguments = parser.parse_args()
    if arguments.quick and (arguments.csv == ROWS / f"{name}.csv" or arguments.pages == PAGES):
        parser.error("--quick measures nothing worth keeping: name other files with --csv and --pages")
    os.environ["SYNCBN_DATA"] = str(arguments.data.resolve())
    if not arguments.draw:
        jobs = experiment.jobs(range(arguments.seeds), arguments.quick)
        start = datetime.datetime.now()
        found = measure(Path(experiment.__file__), jobs, ranks)  # type: ignore[arg-type]
        minutes = (datetime.datetime.now() - start).total_seconds() / 60
        facts = {**head(), "date": f"{start:%Y-%m-%d}", "minutes": f"{minutes:.1f}"}
        arguments.csv.unlink(missing_ok=True)
        append_rows(arguments.csv, [{**row, **facts} for row in found])
    publish(experiment, name, read_rows(arguments.csv), arguments.pages)


def measure(script: Path, jobs: list[Row], ranks: int) -> list[Row]:
    """Return the rows of all jobs, in the order of the jobs; those with the same number of ranks share processes."""
    groups: dict[int, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.get("ranks", ranks), []).append(index)
    found: dict[int, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for world_size, indices in groups.items():
            parts = [indices[first::CORES] for first in range(CORES)] if world_size == 1 else [indices]
            processes = []
            for number, part in enumerate(filter(None, parts)):
                task, answer = Path(folder, f"{world_size}_{number}.json"), Path(folder, f"{world_size}_{number}.rows")
                task.write_text(json.dumps([(index, jobs[index]) for index in part]))
                launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
                command = [sys.executable, *(launcher if world_size > 1 else []), str(script)]
                variables = {"OMP_NUM_THREADS": "1", WORKER: json.dumps([str(task), str(answer)])}
                processes.append((subprocess.Popen(command, env={**os.environ, **variables}), answer))
            for process, answer in processes:
                if process.wait() != 0:
                    raise SystemExit(f"error: a job of {script.name} failed, see above")
                found |= dict(map(json.loads, answer.read_text().splitlines()))
    return [row for index in sorted(found) for row in found[index]]


def _work(run: Callable[[Row], list[Row]]) -> None:
    """Run the jobs of this process; rank 0 writes their rows."""
    console.quiet()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task, answer = json.loads(os.environ[WORKER])
    is_first = os.environ.get("RANK", "0") == "0"
    jobs = json.loads(Path(task).read_text())
    with Path(answer).open("w") as file:
        for done, (index, job) in enumerate(jobs):
            rows = run(job)
            if is_first:
                print(json.dumps([index, rows]), file=file, flush=True)
                print(f"{done + 1}/{len(jobs)} {job}", file=sys.stderr, flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # no rank leaves while another still communicates with it
        torch.distributed.destroy_process_group()


def publish(experiment: Any, name: str, rows: list[Row], folder: Path) -> None:
    """Draw the picture, write the page and print the sentence."""
    save(experiment.draw(rows), folder / f"{name}.png")
    (folder / f"{name}.md").write_text(page(experiment, name, rows))
    if folder == PAGES:
        (folder / "index.md").write_text(gallery())
    print(f"{name}: {experiment.sentence(rows)}")


def page(experiment: Any, name: str, rows: list[Row]) -> str:
    """Return the Markdown page of an experiment."""
    title, claim, *how = experiment.__doc__.strip().split("\n\n")
    facts, seeds = rows[0], len(levels(rows, "seed"))
    needs_data = "small_cifar10" in Path(experiment.__file__).read_text()
    command = f"python scripts/experiments/{name}.py" + (" --data DIR" if needs_data else "")
    caption = f"{seeds} seeds; bands and bars are 95 % confidence intervals of the mean. {facts['device']}, "
    caption += f"torch {facts['torch']}, commit {facts['commit']}, {facts['date']}, {facts['minutes']} minutes."
    parts = [f"# {title.rstrip('.')}", f"**Claim.** {_flow(claim)}", f"![{title.rstrip('.')}]({name}.png)"]
    parts += [f"`{command}`: {caption}", f"**Seen.** {experiment.sentence(rows)}", "## How", *how]
    return "\n\n".join(parts) + f"\n\nRows: [`{name}.csv`](../../benchmarks/experiments/{name}.csv).\n"


def gallery() -> str:
    """Return the Markdown page with all experiments that have rows."""
    sys.path.insert(0, str(Path(__file__).parent))
    names = [name for name in ORDER if (ROWS / f"{name}.csv").exists()]
    parts = ["# Experiments", _flow(GALLERY)]
    for name in names:
        experiment = importlib.import_module(name)
        title = experiment.__doc__.split("\n")[0].rstrip(".")
        parts.append(f"## {title}\n\n{experiment.sentence(read_rows(ROWS / f'{name}.csv'))}")
        parts.append(f"[![{title}]({name}.png)]({name}.md)\n\n[Claim, method and rows]({name}.md)")
    return "\n\n".join([*parts, "```{toctree}\n:hidden:\n\n" + "\n".join(names) + "\n```\n"])


def _flow(paragraph: str) -> str:
    return " ".join(paragraph.split())
