"""Invalid values of the configuration are refused before anything is built."""

import shlex
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from train import distenv, errors
from train.distenv import Refusal

LARGEST_SEED = 2**32 - 1  # of NumPy and Lightning
NEEDED = ("seed", "data.seed", "trainer.max_epochs")  # other values may be null
LOGGED = ("val_accuracy", "val_top5_accuracy", "val_loss", "train_accuracy", "train_loss")
DERIVED = {
    "model.num_classes": "data.num_classes",
    "model.in_channels": "data.in_channels",
    "model.image_size": "data.image_size",
    "mixing.num_classes": "data.num_classes",
    "data.source.num_classes": "data.num_classes",
    "data.source.in_channels": "data.in_channels",
    "data.source.image_size": "data.image_size",
    "trainer.strategy.accelerator": "trainer.accelerator",
}


def check(config: DictConfig) -> None:
    """Raise Refusal, on every rank, for the first invalid value."""
    for key, (holds, must_be) in RULES.items():
        value = OmegaConf.select(config, key)
        is_valid = key not in NEEDED if value is None else holds(value)
        if not is_valid:
            raise Refusal(f"{key} must be {must_be}, got {'null' if value is None else value}")
    for key in ("seed", "data.seed"):
        if OmegaConf.select(config, key) > LARGEST_SEED:
            raise Refusal(f"{key} must be at most {LARGEST_SEED}, got {OmegaConf.select(config, key)}")


def check_keys(config: DictConfig) -> None:
    """Raise Refusal, on every rank, for a key that nothing reads: Hydra adds every key that begins with `+`."""
    known: Any = OmegaConf.to_container(config)
    read = {*map(str, OmegaConf.load(errors.CONF / "train.yaml")), *(path.name for path in errors.CONF.iterdir())}
    for key in sorted(known.keys() - read):
        raise Refusal(f"{key}: {errors.no_such_key(key, str(known[key]), known)}")
    for key, target, name, value in _arguments(known):
        parameters = errors.parameters_of(target)
        takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
        is_read_elsewhere = key == "model" and name == "pretrained"
        if parameters and name not in parameters and not takes_any and not is_read_elsewhere:
            sentence = errors.no_such_key(f"{key}.{name}", str(value), known)
            raise Refusal(f"{key}.{name} is no argument of {target}: {sentence}")


def check_launch(config: DictConfig) -> None:
    """Raise Refusal, on every rank, for values that contradict the launcher, the machine or each other."""
    check_devices(config)
    check_processes(config)
    _check_decoder(config)
    _check_derived(config)
    _check_length(config)
    _check_monitors(config)
    _check_best(config)
    _check_frozen(config)


def check_devices(config: DictConfig) -> None:
    """Raise Refusal, on every rank, if the requested device is not available or does not support the precision."""
    trainer = config.trainer
    if trainer.accelerator not in ("gpu", "cpu"):
        raise Refusal(f"trainer.accelerator must be gpu or cpu, got {trainer.accelerator}: use trainer=auto for either")
    if trainer.accelerator == "gpu" and not torch.cuda.is_available():
        raise Refusal("trainer.accelerator is gpu, but torch finds no GPU: use trainer=cpu or trainer=auto")
    if trainer.accelerator == "cpu" and str(trainer.precision) in ("16-mixed", "16"):
        raise Refusal(
            f"trainer.precision={trainer.precision} needs a GPU, as CPUs train in bfloat16: use "
            "trainer.precision=bf16-mixed or 32-true"
        )


def _check_decoder(config: DictConfig) -> None:
    """Refuse to decode on a GPU without one."""
    if config.data.get("decode") == "gpu" and config.trainer.accelerator != "gpu":
        raise Refusal(
            f"data.decode=gpu needs a GPU, and trainer.accelerator is {config.trainer.accelerator}: use torchvision"
        )


def _arguments(node: Any, key: str = "") -> Iterator[tuple[str, str, str, Any]]:
    """Yield each argument of every constructor: the name of its mapping, the constructor, its own name, its value."""
    if isinstance(node, dict):
        own = {name: value for name, value in node.items() if not name.startswith("_")}
        if "_target_" in node:
            yield from ((key, node["_target_"], name, value) for name, value in own.items())
        for name, value in own.items():
            yield from _arguments(value, f"{key}.{name}" if key else name)


def check_processes(config: DictConfig, module: str = "train") -> None:
    """Raise Refusal, on every rank, for devices and nodes that contradict the launcher.

    Lightning would start processes of its own, or wait for some that nobody starts.

    Args:
        module: what is run, for the message.
    """
    trainer, strategy = config.trainer, config.trainer.strategy
    asked = {"trainer.devices": _count(trainer.devices), "trainer.num_nodes": _count(trainer.num_nodes)}
    started = {"trainer.devices": distenv.local_world_size(), "trainer.num_nodes": distenv.num_nodes()}
    command = distenv.torchrun(
        asked["trainer.devices"] or started["trainer.devices"],
        asked["trainer.num_nodes"] or started["trainer.num_nodes"],
        module,
    )
    remedy = f"leave it out and start the ranks with `{command} {_other_overrides()}`"
    for key, number in started.items():
        if asked[key] != number:
            what = "processes on this node" if key == "trainer.devices" else "nodes"
            raise Refusal(
                f"{key} must be the number of {what} that the launcher has started, {number}, got "
                f"{OmegaConf.select(config, key)}: {remedy}"
            )
    if not isinstance(strategy, DictConfig) or strategy.get("_target_") != "train.plugins.strategy":
        raise Refusal(f"trainer.strategy must be DDP over the launcher's ranks, got {strategy}: {remedy}")
    if trainer.use_distributed_sampler:
        raise Refusal("trainer.use_distributed_sampler must be false, as train.samplers distributes the images")


def _other_overrides() -> str:
    """Return the overrides of this command, without those of devices, nodes and strategy."""
    derived = tuple(f"trainer.{name}" for name in ("devices", "num_nodes", "strategy"))
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return shlex.join(override for override in overrides if not override.lstrip("+").startswith(derived)) or "..."


def _count(value: Any) -> int | None:
    """Return the number of devices or nodes that a value asks for; None if that depends on the machine."""
    if isinstance(value, ListConfig):
        return len(value)
    return int(value) if str(value).isdigit() else None


def _check_derived(config: DictConfig) -> None:
    """Refuse values that follow from others in every configuration file and were set to something else."""
    for key, source in DERIVED.items():
        value, expected = OmegaConf.select(config, key), OmegaConf.select(config, source)
        if value is not None and value != expected:
            raise Refusal(f"{key} must be that of {source}, which is {expected}, got {value}: set {source} instead")
    channels = config.data.in_channels
    for key in ("mean", "std"):
        if len(config.data[key]) not in (1, channels):
            raise Refusal(
                f"data.{key} must have a value for each of the data.in_channels={channels} channels, got "
                f"{config.data[key]}: change one of them"
            )


def _check_length(config: DictConfig) -> None:
    """Refuse a run without a last step for a schedule that ends with it."""
    is_endless = config.trainer.max_epochs == -1 and config.trainer.get("max_steps", -1) == -1
    target = config.scheduler.get("_target_", "")
    if is_endless and target.startswith("train.optim.") and target != "train.optim.constant":
        raise Refusal(
            f"the schedule {target} needs the number of steps of the run, and trainer.max_epochs is -1: set "
            "trainer.max_epochs or +trainer.max_steps, or use scheduler=constant"
        )


def _check_monitors(config: DictConfig) -> None:
    """Refuse to monitor a metric that is not logged, unless a callback of the user may log it."""
    callbacks = {name: callback for name, callback in config.callbacks.items() if callback}
    has_own = not all(callback._target_.startswith(("train.", "lightning.")) for callback in callbacks.values())
    is_validated = config.trainer.get("limit_val_batches") != 0
    for name, callback in callbacks.items():
        monitor = callback.get("monitor")
        if monitor is None or has_own:
            continue
        if monitor not in LOGGED:
            raise Refusal(f"callbacks.{name}.monitor must be one of {', '.join(LOGGED)}, got {monitor}")
        if monitor.startswith("val_") and not is_validated and callback._target_ != "train.best.Best":
            raise Refusal(
                f"callbacks.{name}.monitor={monitor} needs a validation, and trainer.limit_val_batches is 0: leave it "
                "out, or monitor train_accuracy or train_loss"
            )


def _check_best(config: DictConfig) -> None:
    """Refuse `test_checkpoint=best` if no checkpoint can be the best."""
    trainer, best = config.trainer, config.callbacks.get("best")
    if config.test_checkpoint != "best":
        return
    every = trainer.get("check_val_every_n_epoch") or 1
    reasons = {
        "callbacks.best is missing: use callbacks=default": not best,
        "callbacks.best.save_top_k is 0: set it to 1": bool(best) and best.get("save_top_k") == 0,
        "trainer.limit_val_batches is 0: leave it out": trainer.get("limit_val_batches") == 0,
        "trainer.fast_dev_run writes no checkpoint: leave it out": bool(trainer.get("fast_dev_run")),
        "trainer.enable_checkpointing is false: leave it out": trainer.get("enable_checkpointing") is False,
        f"trainer.check_val_every_n_epoch is {every} and trainer.max_epochs {trainer.max_epochs}: validate earlier": (
            0 <= trainer.max_epochs < every
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise Refusal(
                f"test_checkpoint=best needs a validated checkpoint, and {reason}, or use test_checkpoint=last"
            )


def _check_frozen(config: DictConfig) -> None:
    """Refuse to measure statistics that are frozen."""
    freeze, callbacks = config.finetune.freeze, config.callbacks
    if not freeze:
        return
    if callbacks.get("recalibrate"):
        raise Refusal(
            f"callbacks.recalibrate measures the statistics of every layer, and finetune.freeze={freeze} keeps some: "
            "leave one of them out"
        )
    if callbacks.get("ema") and callbacks.ema.get("recalibrate_batches", 1):
        raise Refusal(
            f"callbacks.ema measures the statistics of every layer, and finetune.freeze={freeze} keeps some: set "
            "callbacks.ema.recalibrate_batches=0"
        )


def _whole(at_least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _number(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Real) and not isinstance(value, bool) and holds(value)


def _rises_within_the_run(value: Any) -> bool:
    is_share = _number(lambda share: 0 < share < 1)
    return isinstance(value, ListConfig) and all(map(is_share, value)) and sorted(value) == list(value)


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (_whole(0), "a whole number of at least 0"),
    "data.seed": (_whole(0), "a whole number of at least 0"),
    "test_checkpoint": (lambda value: value in ("last", "best"), "last or best"),
    "label_smoothing": (_number(lambda value: 0 <= value < 1), "a number from 0 to below 1"),
    "model.width": (_whole(1), "a whole number of at least 1, or null for the published width"),
    "optimizer.lr_per_256": (_number(lambda value: value >= 0), "a number of at least 0"),
    "optimizer.weight_decay": (_number(lambda value: value >= 0), "a number of at least 0"),
    "scheduler.milestones": (_rises_within_the_run, "a rising list of shares of the run such as [0.5, 0.75]"),
    "finetune.layer_decay": (_number(lambda value: 0 < value <= 1), "a number above 0 and up to 1"),
    "mixing.mixup_alpha": (_number(lambda value: value >= 0), "a number of at least 0"),
    "mixing.cutmix_alpha": (_number(lambda value: value >= 0), "a number of at least 0"),
    "data.eval_batch_size": (_whole(1), "a whole number of at least 1"),
    "data.global_batch_size": (_whole(0), "a whole number of at least the number of ranks"),
    "data.batch_size_per_rank": (_whole(1), "a whole number of at least 1"),
    "data.num_workers": (_whole(0), "a whole number of at least 0"),
    "data.val_fraction": (_number(lambda value: 0 <= value < 1), "a share from 0 to below 1"),
    "callbacks.best.save_top_k": (_whole(-1), "a whole number, -1 for all"),
    "trainer.max_epochs": (_whole(-1), "a whole number, -1 for no limit"),
    "trainer.accumulate_grad_batches": (_whole(1), "a whole number of at least 1"),
    "trainer.precision": (
        lambda value: str(value) not in ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16"),
        "32-true, bf16-mixed, 16-mixed or 64-true, as evaluation uses the precision of the weights",
    ),
}
