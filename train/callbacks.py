"""Callbacks that report on a run: throughput, progress, and the history of its epochs."""

import logging
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from train import pictures
from train.pictures import draw_curves

SECONDS_BETWEEN_FIGURES = 0.5
EPOCH_LINE = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "images_per_second")
EPOCH_FIGURES = (*EPOCH_LINE, "val_top5_accuracy", "data_wait")

log = logging.getLogger(__name__)


class Throughput(Callback):
    """Logs `images_per_second` of every epoch over all ranks; it waits for the device only to report.

    `data_wait` is the share of this time in which rank 0 waited for its next batch. Validation is not counted. Within
    an epoch the progress bar shows `images_per_second_step`.

    Args:
        warmup_steps: steps to exclude at the start of the process: allocation, kernel selection, first collectives. An
            epoch that has no others is measured with them, and does not count for the whole run.
        every_n_steps: steps between two reports within an epoch.
    """

    def __init__(self, warmup_steps: int = 5, every_n_steps: int = 20) -> None:
        self.warmup_steps = warmup_steps
        self.every_n_steps = every_n_steps
        self._steps = 0  # in this process
        self._images = self._epoch_images = 0
        self._start = self._batch_end = self._epoch_start = 0.0
        self._waited = 0.0
        self._past_images = 0
        self._past_seconds = self._past_waited = 0.0

    figures = ("images_per_second", "data_wait")

    @property
    def images_per_second(self) -> float:
        """Images per second of all ranks, over all epochs so far; NaN before the first epoch ends."""
        return self._past_images / self._past_seconds if self._past_seconds else float("nan")

    @property
    def data_wait(self) -> float:
        """Share of the time spent waiting for data, over all epochs so far; NaN before the first epoch ends."""
        return self._past_waited / self._past_seconds if self._past_seconds else float("nan")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock: a run resumed within an epoch skips `on_train_epoch_start`."""
        self._steps = 0
        self._restart(trainer)
        self._epoch_start, self._epoch_images = self._start, 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clock."""
        self._restart(trainer)
        self._epoch_start, self._epoch_images = self._start, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the time since the previous batch ended to the data wait."""
        self._waited += time.perf_counter() - self._batch_end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images of the global batch, and report if due."""
        self._steps += 1
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        loader: Any = trainer.train_dataloader
        images = loader.batch_sampler.global_size(batch_idx)
        self._epoch_images += images
        if self._steps <= self.warmup_steps or any(getattr(callback, "is_profiling", False) for callback in callbacks):
            self._restart(trainer)
            if trainer.is_last_batch:
                self._log(pl_module, self._epoch_images, self._start - self._epoch_start, float("nan"))
            return
        self._images += images
        if trainer.is_last_batch:
            _finish(trainer)
            seconds = time.perf_counter() - self._start
            self._log(pl_module, self._images, seconds, self._waited / seconds)
            self._past_images += self._images
            self._past_seconds += seconds
            self._past_waited += self._waited
        elif (batch_idx + 1) % self.every_n_steps == 0:
            _finish(trainer)
            speed = self._images / (time.perf_counter() - self._start)
            pl_module.log("images_per_second_step", speed, logger=False, batch_size=1)
        self._batch_end = time.perf_counter()

    @staticmethod
    def _log(pl_module: LightningModule, images: int, seconds: float, data_wait: float) -> None:
        """Log the figures of an epoch; of values of a step, Lightning would write every tenth alone."""
        for name, value in (("images_per_second", images / seconds), ("data_wait", data_wait)):
            pl_module.log(name, value, on_step=False, on_epoch=True, batch_size=1)

    def _restart(self, trainer: Trainer) -> None:
        _finish(trainer)
        self._images, self._waited = 0, 0.0
        self._start = self._batch_end = time.perf_counter()


class EpochLines(ProgressBar):
    """Prints one line per epoch, for log files and pipes, where a progress bar is unreadable."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True

    def disable(self) -> None:
        """Stop printing; Lightning calls this on every rank except 0."""
        self._enabled = False

    def enable(self) -> None:
        """Resume printing."""
        self._enabled = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of the epoch."""
        if self._enabled:
            print(_epoch_line(trainer), flush=True)


class EpochBars(RichProgressBar):
    """A Rich progress bar per epoch; its metrics refresh twice a second, because reading one waits for its step."""

    names: ClassVar = {
        "train_loss_step": "loss",
        "train_accuracy_step": "accuracy",
        "val_accuracy": "val",
        "images_per_second_step": "images/s",
    }

    def __init__(self) -> None:
        super().__init__(refresh_rate=10, leave=True)
        self._figures: dict[str, str] = {}
        self._read_at = 0.0

    def configure_columns(self, trainer: Trainer) -> list:
        """Return Lightning's columns with a shorter bar and without the steps per second."""
        columns = super().configure_columns(trainer)[:-1]
        columns[1].bar_width = 20
        return columns

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:  # type: ignore[override]
        """Return the metrics to display."""
        if trainer.is_last_batch or time.monotonic() > self._read_at + SECONDS_BETWEEN_FIGURES:
            known = trainer.callback_metrics
            self._figures = {short: f"{known[name]:.4g}" for name, short in self.names.items() if name in known}
            self._read_at = time.monotonic()
        return self._figures


def progress() -> ProgressBar:
    """Return Rich progress bars on a terminal, otherwise one line per epoch."""
    return EpochBars() if sys.stdout.isatty() else EpochLines()


class History(Callback):
    """Keeps the metrics of every epoch across resumes, logs them, and draws `curves.png` at the end.

    Args:
        directory: the run directory.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.epochs: list[dict[str, float]] = []
        self.rates: list[tuple[float, float]] = []  # (epochs done, learning rate)

    def state_dict(self) -> dict[str, Any]:
        """Return the history for a checkpoint."""
        return {"epochs": self.epochs, "rates": self.rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the history from a checkpoint."""
        self.epochs, self.rates = state_dict["epochs"], state_dict["rates"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record the learning rate about ten times per epoch."""
        steps = max(1, int(trainer.num_training_batches))
        if batch_idx % max(1, steps // 10) == 0:
            done = trainer.current_epoch + batch_idx / steps
            self.rates.append((done, trainer.optimizers[0].param_groups[0]["lr"]))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record and log the metrics of the epoch; those of its first part, if a run ended there, are replaced."""
        epoch = trainer.current_epoch + 1
        self.epochs = [row for row in self.epochs if row["epoch"] != epoch]
        self.epochs.append({"epoch": epoch, **_epoch_figures(trainer)})
        if trainer.is_global_zero:
            log.info(_epoch_line(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the curves, on rank 0."""
        if trainer.is_global_zero and self.epochs and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            pictures.attempt(draw_curves, self.epochs, self.rates, self.directory / "curves.png")


def _epoch_figures(trainer: Trainer) -> dict[str, float]:
    figures = trainer.callback_metrics
    return {name: float(figures[name]) for name in EPOCH_FIGURES if name in figures}


def _epoch_line(trainer: Trainer) -> str:
    figures = [f"{name} {value:.4g}" for name, value in _epoch_figures(trainer).items() if name in EPOCH_LINE]
    of = "" if trainer.max_epochs == -1 else f"/{trainer.max_epochs}"
    return "  ".join([f"epoch {trainer.current_epoch + 1}{of}", *figures])


def _finish(trainer: Trainer) -> None:
    """Wait until the device has finished all queued work."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
