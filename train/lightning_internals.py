"""Everything that rests on names which Lightning does not promise: each use in one function, each with a test.

If a name goes, its test in tests/test_lightning_internals.py fails and says what rests on it.
"""

from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy


def do_not_broadcast_sigterm(trainer: Trainer) -> None:
    """Stop Lightning from broadcasting rank 0's SIGTERM flag before every step and waiting for the device to send it.

    `Snapshots` sends the flag with the sums of a step. Without this name every step on a GPU waits for the host.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]


def batches_that_stepped(trainer: Trainer) -> int:
    """Return the number of batches whose metrics the loggers count as steps."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def set_batches_that_stepped(trainer: Trainer, number: int) -> None:
    """Set this number: Lightning counts one too many when it restarts at the first batch of an epoch."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = number


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether the gradients of the last batch wait for those of the next one."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def process_group_options(strategy: DDPStrategy) -> tuple[str, timedelta | None]:
    """Return the backend and the time-out with which a strategy initializes its process group."""
    return strategy._get_process_group_backend(), strategy._timeout


def average_of(callback: EMAWeightAveraging) -> Any:
    """Return torch's averaged model in Lightning's callback, or None before `setup`."""
    return callback._average_model


def hide_events_from(logger: TensorBoardLogger, step: int) -> None:
    """Let a logger that has not written yet hide the events of an earlier process from this step on."""
    logger._kwargs["purge_step"] = step


def take_back_the_batch(fit_loop: dict[str, Any]) -> int:
    """Set the loops' progress in a checkpoint back to between two batches, and return the epoch.

    Lightning has already counted the next batch, or the epoch if the run ended within it.

    Args:
        fit_loop: `checkpoint["loops"]["fit_loop"]`.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False
    for count in (progress["current"], progress["total"]):
        count["ready"] = count["completed"]
    for count in (fit_loop["epoch_progress"]["current"], fit_loop["epoch_progress"]["total"]):
        count["processed"] = count["completed"] = count["started"] - 1
    return fit_loop["epoch_progress"]["current"]["processed"]


def forget_the_epoch(fit_loop: dict[str, Any]) -> None:
    """Set the progress within an epoch that is over to 0: with `max_steps`, Lightning would restart within it.

    Args:
        fit_loop: `checkpoint["loops"]["fit_loop"]`.
    """
    progress = fit_loop["epoch_loop.batch_progress"]
    progress["is_last_batch"] = False
    progress["current"] = dict.fromkeys(progress["current"], 0)


def _nothing() -> None:
    pass
