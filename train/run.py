"""One run from a configuration: build, fit, test, report."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.utils import instantiate as hydra_instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig, OmegaConf

from train import (
    best,
    console,
    distenv,
    finetune,
    identity,
    lightning_internals,
    models,
    pretrained,
    report,
    resume,
    settings,
)
from train.callbacks import Throughput
from train.classifier import ImageClassifier
from train.data import ImageData
from train.evaluation import Findings
from train.norms import Norm
from train.plugins import AtomicFiles
from train.stop import StopsTests

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
            console.say(loaded.line(path))
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
    # a fused optimizer divides by the scale of float16 itself, after Lightning would have clipped
    cannot_be_fused = str(config.trainer.precision) == "16-mixed" and config.trainer.gradient_clip_val
    options = ({"rates": rates} if rates else {}) | ({"fused": False} if cannot_be_fused else {})
    model = ImageClassifier(
        network,
        partial(instantiate(config.optimizer, global_batch_size=images_per_update), **options),
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
    console.quiet()
    settings.check(config)
    settings.check_keys(config)
    seed_everything(config.seed, workers=True, verbose=False)
    norm: Norm = instantiate(config.norm)
    norm.check(config.trainer.accelerator)
    path = resume.find(config)
    trainer, model, data = build(config, needs_weights=path is None)
    checkpoint = None if path is None else _continued(path, config, norm, trainer, model, data)
    bn_batch = norm.batch(data.global_batch_size / trainer.world_size, model.network)
    if trainer.is_global_zero:
        directory = Path(config.run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, directory / "config.yaml", resolve=True)
        console.say(report.headline(config.run_dir, trainer, data.global_batch_size))
        console.say(bn_batch.line)
        if checkpoint is not None:
            console.say(f"resumed from {path}, after step {checkpoint['global_step']}")
    start = time.perf_counter()
    trainer.fit(model, datamodule=data, ckpt_path=path, weights_only=True if path else None)
    seconds = time.perf_counter() - start
    metrics = report.last_epoch(trainer)
    if checkpoint is not None and trainer.global_step == checkpoint["global_step"] and trainer.is_global_zero:
        console.say("the run has ended before and is only tested again: to continue it, raise the limit that ended it")
    if config.test_checkpoint != "last":
        model.load_state_dict(resume.load(best.path_of(trainer))["state_dict"])
    findings = Findings(data.num_classes)
    trainer.callbacks += [findings, StopsTests()]  # type: ignore[attr-defined]
    trainer.test(model, datamodule=data, verbose=False)
    metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        figures = report.figures(config, trainer, metrics, seconds, bn_batch.images)
        report.publish(config, trainer, figures, findings, data)
    return metrics


def _continued(
    path: Path, config: DictConfig, norm: Norm, trainer: Trainer, model: ImageClassifier, data: ImageData
) -> dict[str, Any]:
    """Return the checkpoint to resume from, after the checks, and set the loggers to its position."""
    checkpoint = resume.load(path)
    resume.check(path, checkpoint, config, norm, model.network, data.global_batch_size)
    if not data.download:  # then only Lightning knows when the files are there
        data.setup("fit")
        identity.check_unchanged(path, checkpoint, data)
    for logger in trainer.loggers:
        state = checkpoint["snapshot"]["loggers"].get(type(logger).__name__)
        if state is not None and hasattr(logger, "resume"):
            logger.resume(state)
    return checkpoint
