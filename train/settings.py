"""Invalid values of the configuration are refused before anything is built."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from train.distenv import Refusal


def check(config: DictConfig) -> None:
    """Raise Refusal, on every rank, for the first invalid value."""
    for key, (holds, must_be) in RULES.items():
        value = OmegaConf.select(config, key)
        if value is not None and not holds(value):
            raise Refusal(f"{key} must be {must_be}, got {value}")


def check_devices(config: DictConfig) -> None:
    """Raise Refusal, on every rank, if the requested device is not available."""
    if config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise Refusal("trainer.accelerator is gpu, but torch finds no GPU: use trainer=cpu or trainer=auto")


def _whole(at_least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _number(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Real) and not isinstance(value, bool) and holds(value)


def _rises_within_the_run(value: Any) -> bool:
    is_share = _number(lambda share: 0 < share < 1)
    return isinstance(value, ListConfig) and all(map(is_share, value)) and sorted(value) == list(value)


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_whole(0), "a whole number of at least 0"),
    "test_checkpoint": (lambda value: value in ("last", "best"), "last or best"),
    "label_smoothing": (_number(lambda value: 0 <= value < 1), "a number from 0 to below 1"),
    "model.width": (_whole(1), "a whole number of at least 1, or null for the published width"),
    "optimizer.lr_per_256": (_number(lambda value: value >= 0), "a number of at least 0"),
    "optimizer.weight_decay": (_number(lambda value: value >= 0), "a number of at least 0"),
    "scheduler.milestones": (_rises_within_the_run, "a rising list of shares of the run such as [0.5, 0.75]"),
    "mixing.mixup_alpha": (_number(lambda value: value >= 0), "a number of at least 0"),
    "mixing.cutmix_alpha": (_number(lambda value: value >= 0), "a number of at least 0"),
    "data.eval_batch_size": (_whole(1), "a whole number of at least 1"),
    "data.global_batch_size": (_whole(0), "a whole number of at least the number of ranks"),
    "data.batch_size_per_rank": (_whole(1), "a whole number of at least 1"),
    "data.num_workers": (_whole(0), "a whole number of at least 0"),
    "data.val_fraction": (_number(lambda value: 0 <= value < 1), "a share from 0 to below 1"),
    "trainer.max_epochs": (_whole(-1), "a whole number, -1 for no limit"),
    "trainer.accumulate_grad_batches": (_whole(1), "a whole number of at least 1"),
    "trainer.precision": (
        lambda value: str(value) not in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"),
        "32-true, bf16-mixed, 16-mixed or 64-true, as evaluation uses the precision of the weights",
    ),
}
