"""Checkpoints from which a run continues exactly, wherever it was killed, and the end of a run that is asked to stop.

A snapshot is taken just before a training batch or when training is over. Only then have the loggers received all
metrics of the earlier batches; at the end of a batch or an epoch they have not.
"""

import hashlib
import signal
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, Timer
from torch import Tensor

from train import distenv, lightning_internals, rng
from train.distenv import Refusal
from train.stop import Stopped, StopSignals

STEPS_BEHIND = 2  # on an accelerator, a step's sums are read when this many more steps are queued, to avoid a wait


class Snapshots(Checkpoint):
    """Keeps `last.ckpt`: loops, sampler position, optimizer, LR scheduler, generators, averages and logger positions.

    It is written:

    - at the start of every epoch,
    - every `every_n_steps` optimizer steps,
    - before the last batch of an epoch, so that a stop during validation loses one step,
    - when training is over,
    - on SIGTERM or SIGINT, where all ranks stop after the same step.

    A run that has ended stays ended when it is resumed: by its limit of epochs, steps or time until that limit is
    raised, by a callback such as early stopping until the settings of such callbacks change. A run that ended within an
    epoch then continues with its next batch.

    A loss that is not finite ends the run on every rank; the error names the step and the last good snapshot. A
    snapshot with a parameter that is not finite is never written.

    Args:
        directory: directory of the file.
        every_n_steps: optimizer steps between two snapshots.
    """

    def __init__(self, directory: str, every_n_steps: int = 200) -> None:
        self.path = Path(directory) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._signals = StopSignals()
        self._sums: deque[tuple[int, Tensor, Any]] = deque()
        self._stop = False  # True on all ranks once one was asked to stop
        self._ends = False  # a callback has ended the run, which waits for the end of the optimizer step
        self._resumed: dict[str, Any] | None = None
        self._saving: dict[str, Any] | None = None
        self._saved_step: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers."""
        self._signals.install()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore a snapshot, or take one if due."""
        if self._resumed is not None:
            self._restore(trainer, pl_module)
            return
        if trainer.fast_dev_run or batch_idx % trainer.accumulate_grad_batches:  # type: ignore[attr-defined]
            return  # a checkpoint does not contain accumulated gradients
        if self._stop:
            self._save(trainer, pl_module, batch_idx)
            self._leave(trainer)
        steps = trainer.global_step
        is_last = batch_idx + trainer.accumulate_grad_batches >= trainer.num_training_batches
        if batch_idx == 0 or is_last or steps - (self._saved_step or 0) >= self.every_n_steps:
            self._save(trainer, pl_module, batch_idx)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Pass a signal on to the other ranks with the next step, and check the sums of the last steps."""
        pl_module.stop_requested = self._signals.received is not None
        self._sums.append((trainer.global_step, *_to_host(pl_module.step_sums)))
        self._look(0 if pl_module.device.type == "cpu" else STEPS_BEHIND)
        self._end_after_a_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a run that early stopping has ended finish the optimizer step."""
        self._end_after_a_step(trainer)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop a validation at once: the snapshot from before the epoch's last batch exists."""
        if self._signals.received is not None:
            self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the last snapshot."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
            self._save(trainer, pl_module, done if 0 < done < trainer.num_training_batches else None, is_end=True)
        if self._signals.received is not None:
            self._leave(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous signal handlers."""
        self._signals.remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous signal handlers."""
        self._signals.remove()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the state that Lightning does not save; every rank calls it."""
        if self._saving is None:
            return  # the best checkpoint is for evaluation only
        checkpoint["snapshot"] = self._saving
        if self._saving["batch_idx"] is not None:
            checkpoint["epoch"] = lightning_internals.take_back_the_batch(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set where the data module starts; the rest is restored at the first batch."""
        self._resumed = checkpoint["snapshot"]
        self._saved_step = checkpoint["global_step"]
        config: Any = pl_module.config
        if self._resumed.get("was_stopped") and _stoppers(checkpoint["config"]) == _stoppers(config):
            trainer.should_stop = True
        _keep_patience(trainer, checkpoint["callbacks"])
        if self._resumed["batch_idx"] is None:
            lightning_internals.forget_the_epoch(checkpoint["loops"]["fit_loop"])
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.resume_at = (checkpoint["epoch"], self._resumed["batch_idx"] or 0)

    def _end_after_a_step(self, trainer: Trainer) -> None:
        """Postpone the end of a run to the end of an optimizer step: a checkpoint has no accumulated gradients."""
        self._ends = self._ends or trainer.should_stop
        trainer.should_stop = self._ends and not lightning_internals.is_accumulating(trainer)

    def _save(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int | None, is_end: bool = False) -> None:
        self._look(0)
        if not all(bool(parameter.isfinite().all()) for parameter in pl_module.parameters()):
            raise Refusal(self._not_finite("a parameter", trainer.global_step))
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._saving = {
            "batch_idx": batch_idx,
            "is_end": is_end,
            "was_stopped": is_end and trainer.should_stop and not _is_out_of_time(trainer),
            "batches_that_stepped": lightning_internals.batches_that_stepped(trainer),
            "world_size": trainer.world_size,
            "local_world_size": distenv.local_world_size(),
            "global_batch_size": data.global_batch_size,
            "rng": _gather(rng.get_state(), trainer),
            "buffers": _differing_buffers(trainer, pl_module),
            "loggers": {type(logger).__name__: _state_of(logger) for logger in trainer.loggers},
        }
        trainer.save_checkpoint(self.path)
        self._saving = None
        self._saved_step = trainer.global_step

    def _leave(self, trainer: Trainer) -> NoReturn:
        signum = signal.Signals(self._signals.received or signal.SIGTERM)
        if trainer.is_global_zero:
            print(
                f"stopped by {signum.name}: {self.path} continues after step {self._saved_step}, with resume=auto "
                f"run_dir='{self.path.parents[1]}'",
                flush=True,
            )
        raise Stopped(signum)

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._resumed is not None
        resumed, self._resumed = self._resumed, None
        if resumed.get("is_end") and _averages(trainer):
            raise Refusal(
                f"{trainer.ckpt_path} is of a finished run whose weights have become their average: it cannot train "
                "on, start a new run"
            )
        lightning_internals.set_batches_that_stepped(trainer, resumed["batches_that_stepped"])
        if resumed["world_size"] != trainer.world_size:
            return  # already refused where it would change the result
        if resumed["buffers"] is not None:
            for buffer, value in zip(
                _buffers(trainer, pl_module), resumed["buffers"][trainer.global_rank], strict=True
            ):
                buffer.copy_(value)
        rng.set_state(resumed["rng"][trainer.global_rank])

    def _look(self, behind: int) -> None:
        """Check the sums of all steps except the last `behind`; they are equal on all ranks, so all decide alike."""
        while len(self._sums) > behind:
            step, sums, ready = self._sums.popleft()
            if ready is not None:
                ready.synchronize()
            loss, stop = float(sums[0]), float(sums[-1])
            if not torch.isfinite(sums[0]):
                self._sums.clear()
                raise Refusal(self._not_finite(f"the loss ({loss})", step))
            self._stop = self._stop or stop > 0

    def _not_finite(self, what: str, step: int) -> str:
        good = f"the last good checkpoint is {self.path}, after step {self._saved_step}"
        none = "there is no checkpoint yet"
        return (
            f"{what} is not finite at step {step}: lower optimizer.lr_per_256 or set trainer.gradient_clip_val; "
            f"{none if self._saved_step is None else good}"
        )


def _stoppers(config: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings of the callbacks that may end a run: all but the trainer's own."""
    callbacks = (config or {}).get("callbacks") or {}
    return {name: own for name, own in callbacks.items() if own and not own["_target_"].startswith("train.")}


def _is_out_of_time(trainer: Trainer) -> bool:
    """Return whether `trainer.max_time` has ended the run; its timer checks this again when the run is resumed."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return any(left is not None and left <= 0 for left in (timer.time_remaining() for timer in timers))


def _keep_patience(trainer: Trainer, states: dict[str, Any]) -> None:
    """Replace the patience in the states of early stopping, which would undo a change of the configuration."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and callback.state_key in states:
            states[callback.state_key]["patience"] = callback.patience


def _to_host(tensor: Tensor) -> tuple[Tensor, Any]:
    """Return a copy on the host, and the event after which it may be read; None if it may be read at once."""
    if tensor.device.type == "cpu":
        return tensor, None
    copy = tensor.to("cpu", non_blocking=True)
    event = torch.Event(device=tensor.device)
    event.record()
    return copy, event


def _gather(value: Any, trainer: Trainer) -> list[Any]:
    values = [value] * trainer.world_size
    if trainer.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def _buffers(trainer: Trainer, pl_module: LightningModule) -> list[Tensor]:
    """Return the buffers of the model and of its averaged copies."""
    return [buffer for module in [pl_module, *_averages(trainer)] for buffer in module.buffers()]


def _averages(trainer: Trainer) -> list[Any]:
    """Return the averaged copies of the model."""
    return [callback.average for callback in trainer.callbacks if hasattr(callback, "average")]  # type: ignore[attr-defined]


def _differing_buffers(trainer: Trainer, pl_module: LightningModule) -> list[list[Tensor]] | None:
    """Return every rank's buffers, or None if they are equal on all ranks."""
    buffers = [buffer.cpu() for buffer in _buffers(trainer, pl_module)]
    digest = hashlib.sha256(
        b"".join(buffer.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for buffer in buffers)
    )
    if len(set(_gather(digest.hexdigest(), trainer))) == 1:
        return None
    return _gather(buffers, trainer)


def _state_of(logger: Any) -> dict[str, Any] | None:
    return logger.state_dict() if hasattr(logger, "state_dict") else None
