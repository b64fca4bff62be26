"""The checkpoints with the best values of a metric."""

import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from train.distenv import Refusal

log = logging.getLogger(__name__)


class Best(Checkpoint):
    """Keeps the checkpoints with the best values of a metric, for evaluation.

    A metric of the validation is read after every validation, also within an epoch; another one after every epoch. Of
    equal values the earlier one is better; NaN is never kept. The state has names and values but no directory, so that
    a run directory can be moved. A run that continues in another directory copies the files.

    Args:
        dirpath: directory of the files.
        filename: name of the file; if there are several, their names also have the step and the value.
        monitor: name of the metric.
        mode: "max" or "min".
        save_top_k: number of files; -1 keeps all, 0 none.

    Attributes:
        kept: value of each file, by name.
    """

    def __init__(
        self,
        dirpath: str,
        filename: str = "best",
        monitor: str = "val_accuracy",
        mode: Literal["max", "min"] = "max",
        save_top_k: int = 1,
    ) -> None:
        if mode not in ("max", "min"):
            raise Refusal(f"callbacks.best.mode must be max or min, got {mode}")
        if set(filename) & set("{}/"):
            raise Refusal(
                f"callbacks.best.filename must be a plain name, got {filename}: step and value are added if "
                "save_top_k is not 1"
            )
        self.directory = Path(dirpath)
        self.filename = filename
        self.monitor = monitor
        self.mode = mode
        self.save_top_k = save_top_k
        self.kept: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        """The key of the state in a checkpoint: values of another metric are not compared with these."""
        return "Best{'monitor': self.monitor, 'mode': self.mode}"

    @property
    def best_model_path(self) -> str:
        """The file with the best value; empty if there is none."""
        return str(self.directory / max(self.kept, key=self._rank)) if self.kept else ""

    def state_dict(self) -> dict[str, Any]:
        """Return the kept names and values for a checkpoint."""
        return {"kept": dict(self.kept)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the kept names and values from a checkpoint.

        Raises:
            Refusal: a name is not that of a file in the same directory; on every rank.
        """
        for name in state_dict["kept"]:
            if name in ("", ".", "..") or Path(name).name != name:
                raise Refusal(f"a best checkpoint must have a plain file name, got {name!r}: use another checkpoint")
        self.kept = dict(state_dict["kept"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the files if the run continues in another directory, and forget those that are missing."""
        if not self.kept:
            return
        if trainer.is_global_zero and trainer.ckpt_path is not None:
            _copy(self.kept, Path(trainer.ckpt_path).parent, self.directory)
        there = trainer.strategy.broadcast([name for name in self.kept if (self.directory / name).is_file()])
        missing = sorted(set(self.kept) - set(there))
        if missing and trainer.is_global_zero:
            log.warning(f"{', '.join(missing)} of {trainer.ckpt_path} is missing and no longer counts as best")
        self.kept = {name: value for name, value in self.kept.items() if name in there}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if this validation is one of the best."""
        if self.monitor.startswith("val_"):
            self._consider(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if this epoch is one of the best in a metric of the training."""
        if not self.monitor.startswith("val_"):
            self._consider(trainer)

    def _consider(self, trainer: Trainer) -> None:
        is_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not is_fit or trainer.fast_dev_run or not self.save_top_k:  # type: ignore[attr-defined]
            return
        if self.monitor not in trainer.callback_metrics:
            raise Refusal(
                f"callbacks.best.monitor={self.monitor} is not logged: choose one of {sorted(trainer.callback_metrics)}"
            )
        value = float(trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor])))
        worst = min(reversed(self.kept), key=self._rank, default=None)
        is_full = 0 < self.save_top_k <= len(self.kept)
        if math.isnan(value) or (is_full and worst is not None and self._sign * value <= self._rank(worst)):
            return
        name = f"{self.filename}.ckpt"
        if self.save_top_k != 1:
            name = f"{self.filename}-step{trainer.global_step}-{self.monitor}{value:.4f}.ckpt"
        trainer.save_checkpoint(self.directory / name)
        self.kept[name] = value
        while 0 < self.save_top_k < len(self.kept):
            dropped = min(reversed(self.kept), key=self._rank)
            del self.kept[dropped]
            trainer.strategy.remove_checkpoint(self.directory / dropped)

    @property
    def _sign(self) -> int:
        return 1 if self.mode == "max" else -1

    def _rank(self, name: str) -> float:
        return self._sign * self.kept[name]


def path_of(trainer: Trainer) -> Path:
    """Return the file with the best value that a run has kept.

    Raises:
        Refusal: there is none yet.
    """
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, Best)]  # type: ignore[attr-defined]
    paths = [callback.best_model_path for callback in callbacks if callback.best_model_path]
    if not paths:
        raise Refusal(
            "test_checkpoint=best needs a validation, and the run ended before its first one: test the last weights "
            "with resume=auto test_checkpoint=last"
        )
    return Path(paths[0])


def _copy(names: Iterable[str], source: Path, directory: Path) -> None:
    """Copy files into another directory, each completely or not at all."""
    if source.resolve() == directory.resolve():
        return
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (source / name).is_file():
            part = (directory / name).with_suffix(".part")
            shutil.copyfile(source / name, part)
            part.replace(directory / name)
