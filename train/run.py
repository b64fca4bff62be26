"""One run from a configuration: seed, build, fit, test, report."""

import logging
import math
import shlex
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate as hydra_instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig, OmegaConf

from train import (
    distenv,
    finetune,
    identity,
    lightning_internals,
    models,
    pictures,
    pretrained,
    report,
    resume,
    settings,
)
from train.best import Best
from train.callbacks import History, Throughput
from train.classifier import ImageClassifier
from train.data import ImageData
from train.distenv import Refusal
from train.evaluation import Findings
from train.norms import Norm
from train.plugins import AtomicFiles
from train.stop import StopsTests
from train.timing import TimeShares

log = logging.getLogger(__name__)
instantiate = partial(hydra_instantiate, _convert_="all")  # constructors get lists and dicts


def compose(overrides: list[str] | None = None) -> DictConfig:
    """Return the configuration that `python -m train` composes from these overrides."""
    distenv.register_resolvers()
    with initialize_config_module("conf", version_base="1.3"):
        return hydra_compose("train", overrides or [])


def build_model(config: DictConfig, needs_weights: bool = True) -> tuple[ImageClassifier, ImageData]:
    """Return the untrained model of a configuration, and its data.

    Args:
        needs_weights: whether to read `model.pretrained`; not if a checkpoint will be loaded.
    """
    data: ImageData = instantiate(config.data)
    network = models.build(config.model, instantiate(config.norm).layer)
    is_own = models.is_own(config.model)
    if not is_own:
        models.check_output(network, data.collate.image_shape, data.num_classes)
    if needs_weights and config.model.get("pretrained"):
        path = Path(config.model.pretrained)
        loaded = pretrained.load(network, path, data.num_classes)
        if distenv.rank() == 0:
            _say(loaded.line(path))
    tuning = config.get("finetune") or {}
    head = pretrained.heads(network, data.num_classes)
    frozen = finetune.freeze(network, tuning.get("freeze"), head)
    rates = finetune.rates(network, tuning.get("layer_decay", 1.0), tuning.get("rates") or {}, head)
    if str(config.trainer.precision).startswith("64"):
        network.double()  # Lightning converts only after loading a checkpoint, which would round its weights
    if config.compile:
        torch.compiler.reset()  # graphs of an earlier job in this process also count towards the limit
        torch._dynamo.config.recompile_limit = 64  # for training, evaluation, and batches of one image or none
        network.compile(fullgraph=is_own)
    images_per_update = data.global_batch_size * config.trainer.accumulate_grad_batches
    model = ImageClassifier(
        network,
        partial(instantiate(config.optimizer, global_batch_size=images_per_update), rates=rates),
        instantiate(config.scheduler),
        label_smoothing=config.label_smoothing,
        mixing=instantiate(config.mixing),
        channels_last=config.channels_last,
        frozen=frozen,
        config=OmegaConf.to_container(config),  # type: ignore[arg-type]
    )
    return model, data


def build(config: DictConfig, needs_weights: bool = True) -> tuple[Trainer, ImageClassifier, ImageData]:
    """Return the trainer, the untrained model and the data of a configuration; every rank calls it.

    Args:
        needs_weights: see `build_model`.
    """
    settings.check(config)
    settings.check_launch(config)
    model, data = build_model(config, needs_weights)
    data.check_batch_size()
    sync = instantiate(config.norm).sync
    callbacks = [instantiate(callback) for callback in config.callbacks.values() if callback]
    # `Throughput` last: it does not count the time of other callbacks as waiting
    callbacks.sort(key=lambda callback: isinstance(callback, Throughput))
    keeps_checkpoints = any(isinstance(callback, Checkpoint) for callback in callbacks)
    trainer: Trainer = instantiate(
        config.trainer,
        enable_checkpointing=config.trainer.get("enable_checkpointing", keeps_checkpoints),
        callbacks=callbacks,
        logger=[instantiate(logger) for logger in config.logger.values() if logger],
        plugins=[AtomicFiles(), *([sync] if sync else [])],
    )
    lightning_internals.do_not_broadcast_sigterm(trainer)
    return trainer, model, data


def fit(config: DictConfig) -> dict[str, float]:
    """Train, test and report; every rank calls it and gets the same metrics.

    The test uses the weights of the last step, or with `test_checkpoint=best` those of the best validation accuracy.

    Returns:
        the last epoch's metrics, and `test_loss`, `test_accuracy`, `test_correct` and `test_total`.
    """
    quiet()
    directory = Path(config.run_dir)
    settings.check(config)
    settings.check_keys(config)
    seed_everything(config.seed, workers=True, verbose=False)
    norm: Norm = instantiate(config.norm)
    norm.check(config.trainer.accelerator)
    path = resume.find(config)
    trainer, model, data = build(config, needs_weights=path is None)
    if path is not None:
        checkpoint = resume.load(path)
        resume.check(path, checkpoint, config, norm, model.network, data.global_batch_size)
        if not data.download:  # then only Lightning knows when the files are there
            data.setup("fit")
            identity.check_unchanged(path, checkpoint, data)
        for logger in trainer.loggers:
            state = checkpoint["snapshot"]["loggers"].get(type(logger).__name__)
            if state is not None and hasattr(logger, "resume"):
                logger.resume(state)
    if trainer.is_global_zero:
        directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, directory / "config.yaml", resolve=True)
        _say(_headline(config, trainer, data))
        _say(norm.batch_line(data.global_batch_size / trainer.world_size, model.network))
        if path is not None:
            _say(f"resumed from {path}, after step {checkpoint['global_step']}")
    start = time.perf_counter()
    trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=True if path else None)
    seconds = time.perf_counter() - start
    metrics = _last_epoch(trainer)
    if path is not None and trainer.global_step == checkpoint["global_step"] and trainer.is_global_zero:
        _say("the run has ended before and is only tested again: to continue it, raise the limit that ended it")
    if config.test_checkpoint != "last":
        model.load_state_dict(resume.load(_best_checkpoint(trainer))["state_dict"])
    findings = Findings(data.num_classes)
    trainer.callbacks += [findings, StopsTests()]  # type: ignore[attr-defined]
    trainer.test(model, datamodule=data, verbose=False)
    metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        figures = _figures(config, trainer, metrics, seconds)
        record = (directory, figures, _command(), report.environment(trainer), OmegaConf.to_yaml(config))
        report.write_report(*record)
        pictures.draw_test(findings, data.class_names(), data.collate, directory)
        path = report.write_report(*record)  # with the pictures
        report.print_table(figures)
        print(f"report: {path}")
        _say(report.result_line(figures))
    return metrics


def quiet() -> None:
    """Silence warnings about deliberate choices.

    The metrics need no `sync_dist`: they are already summed over all ranks, and its means are wrong for uneven ranks.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        *(".*does not have many workers.*", ".*sync_dist=True.*", ".*LeafSpec.*", ".*logging interval.*"),
        *(".*dataloader is not resumable.*", ".*exists and is not empty.*"),  # `Snapshots` handles both
        ".*overridden `on_before_batch_transfer`.*",  # `ImageClassifier` checks every batch there
        *(".*weights.only.*", ".*checkpoint was not created with WeightAveraging.*"),
    ):
        warnings.filterwarnings("ignore", message)


def _say(line: str) -> None:
    """Print a line and log it."""
    print(line, flush=True)
    log.info(line)


def _last_epoch(trainer: Trainer) -> dict[str, float]:
    """Return the metrics of the last epoch, which may have been trained before a resume."""
    history = [callback.epochs[-1] for callback in _callbacks(trainer, History) if callback.epochs]
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return dict(history[0]) | figures if history else figures


def _callbacks(trainer: Trainer, kind: type) -> list[Any]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def _best_checkpoint(trainer: Trainer) -> Path:
    """Return the checkpoint with the best validation accuracy, or the best value of another metric."""
    best = [callback.best_model_path for callback in _callbacks(trainer, Best) if callback.best_model_path]
    if not best:
        raise Refusal(
            "test_checkpoint=best needs a validation, and the run ended before its first one: test the last weights "
            "with resume=auto test_checkpoint=last"
        )
    return Path(best[0])


def _headline(config: DictConfig, trainer: Trainer, data: ImageData) -> str:
    """Return one line with the run directory, the ranks and their device, and the batch size."""
    ranks = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
    per_rank = data.global_batch_size / trainer.world_size
    return f"{config.run_dir}: {ranks}, global batch {data.global_batch_size} = {trainer.world_size} x {per_rank:g}"


def _epochs(trainer: Trainer) -> int:
    """Return the number of epochs that have begun; Lightning's differs for a run that ended within one."""
    if not trainer.global_step:
        return 0
    return math.ceil(trainer.global_step / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))


def _figures(config: DictConfig, trainer: Trainer, metrics: dict[str, float], seconds: float) -> dict[str, Any]:
    times = [
        *((name, getattr(clock, name)) for clock in _callbacks(trainer, Throughput) for name in clock.figures),
        *((name, share) for clock in _callbacks(trainer, TimeShares) for name, share in clock.shares.items()),
    ]
    return {
        "test_accuracy": metrics["test_accuracy"],
        "correct": int(metrics["test_correct"]),
        "total": int(metrics["test_total"]),
        "top5_accuracy": metrics["test_top5_accuracy"],
        "test_loss": metrics["test_loss"],
        "tested_weights": config.test_checkpoint,
        **{name: metrics[name] for name in ("val_accuracy", "train_accuracy", "train_loss") if name in metrics},
        "epochs": _epochs(trainer),
        "fit_seconds": seconds,
        **dict(times),
        "world_size": trainer.world_size,
        "parameters": sum(parameter.numel() for parameter in trainer.lightning_module.parameters()),
        "run_dir": config.run_dir,
    }


def _command() -> str:
    """Return the command that repeats this run on this node."""
    ranks = distenv.local_world_size()
    launcher = ["python"] if distenv.world_size() == 1 else ["torchrun", "--standalone", f"--nproc-per-node={ranks}"]
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return shlex.join([*launcher, "-m", "train", *overrides])
