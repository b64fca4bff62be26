"""Callbacks for batch statistics: merging, recalibration, averaged weights, replica checks, histograms."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from train import lightning_internals
from train.distenv import Refusal


class EqualBuffers(Callback):
    """Makes buffers equal on all ranks before a validation and at the end, so that all ranks evaluate the saved model.

    Running statistics that are not over all ranks are pooled, each rank weighted by its share of the images. The pooled
    variance is not the average of the ranks' variances. Synchronized statistics are equal already.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the buffers, in the same order on every rank."""
        equalize(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the buffers, which may have changed since the last validation."""
        equalize(trainer, pl_module)


def equalize(trainer: Trainer, module: nn.Module) -> None:
    """Merge the running statistics of the ranks, and broadcast the other buffers from rank 0."""
    if trainer.world_size == 1:
        return
    if not _is_over_all_ranks(module):
        sampler = getattr(trainer.train_dataloader, "batch_sampler", None)
        syncbn.merge_running_stats(module, count=sampler.local_samples() if sampler is not None else 1)
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)


class Recalibrate(Callback):
    """Sets running statistics to population statistics, measured over training batches, before every validation.

    Args:
        num_batches: global batches of the train set, the same ones each time.

    Source: Ioffe & Szegedy 2015, Algorithm 2; Wu & Johnson 2021, section 3 (PreciseBN).
    """

    def __init__(self, num_batches: int = 50) -> None:
        self.num_batches = num_batches

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure over the images of all ranks."""
        recalibrate(trainer, pl_module, self.num_batches)


def recalibrate(trainer: Trainer, pl_module: LightningModule, num_batches: int) -> None:
    """Measure the population statistics of every BatchNorm over `num_batches` global batches of the train set."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    dtype = next(pl_module.parameters()).dtype
    batches = (images.to(pl_module.device, dtype) for images in data.recalibration_batches(num_batches))
    with torch.compiler.set_stance("force_eager"):  # compiled code does not call the hooks that measure
        syncbn.recalibrate(pl_module, batches)


class AveragedWeights(EMAWeightAveraging):
    """Lightning's exponential moving average of the weights, validated and saved with separate running statistics.

    The running statistics of the trained weights are not those of the averaged weights, which are measured before every
    validation and at the end.

    Args:
        decay: weight of the average so far; at most (1 + n) / (10 + n) after n updates, otherwise the initial weights
            would remain in the average of a short run.
        recalibrate_batches: global batches to measure over; 0 keeps the statistics of the trained weights.
        every_n_steps: optimizer steps between two updates.
    """

    def __init__(self, decay: float = 0.999, recalibrate_batches: int = 50, every_n_steps: int = 1) -> None:
        super().__init__(use_buffers=False, decay=decay, update_every_n_steps=every_n_steps)
        self.decay = decay
        self.recalibrate_batches = recalibrate_batches
        self._measured_at = -1
        self._updates: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Create the average; its updates do not wait for the device, where torch's would read a counter."""
        super().setup(trainer, pl_module, stage)
        averaged = lightning_internals.average_of(self)
        if averaged is not None:
            averaged.update_parameters = self._update

    def _update(self, model: nn.Module) -> None:
        averaged = lightning_internals.average_of(self)
        ours, theirs = ([p.detach() for p in m.parameters()] for m in (averaged.module, model))
        if self._updates is None:  # not 0 in a resumed run
            self._updates = int(averaged.n_averaged)
        if self._updates:
            torch._foreach_lerp_(ours, theirs, 1 - min(self.decay, (1 + self._updates) / (10 + self._updates)))
        else:
            torch._foreach_copy_(ours, theirs)
        self._updates += 1
        averaged.n_averaged += 1

    @property
    def average(self) -> nn.Module:
        """The averaged model, during fit."""
        return lightning_internals.average_of(self).module

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap in the averaged weights, and measure their statistics."""
        super().on_validation_epoch_start(trainer, pl_module)
        if lightning_internals.average_of(self) is not None:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the average to the model, and measure its statistics unless a validation just did."""
        super().on_train_end(trainer, pl_module)
        if self._measured_at != trainer.global_step:
            self._measure(trainer, pl_module)
            for ours, theirs in zip(self.average.buffers(), pl_module.buffers(), strict=True):
                ours.copy_(theirs)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.recalibrate_batches:
            recalibrate(trainer, pl_module, self.recalibrate_batches)
        else:
            equalize(trainer, pl_module)
        self._measured_at = trainer.global_step


class ReplicaCheck(Callback):
    """Ends the run on every rank if parameters or buffers that should be equal on all ranks differ.

    Buffers are compared only if all BatchNorm layers are synchronized over all ranks.

    Args:
        every_n_steps: steps between two checks, each of which reads the whole model.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the replicas, if due."""
        if trainer.world_size == 1 or trainer.global_step % self.every_n_steps:
            return
        try:
            syncbn.assert_replicas_equal(pl_module if _is_over_all_ranks(pl_module) else _ParametersOf(pl_module))
        except AssertionError as error:
            raise Refusal(
                f"the ranks' models differ after step {trainer.global_step} and are no longer replicas: {error}"
            ) from error


class Histograms(Callback):
    """Writes histograms of every normalization layer's output and running statistics to TensorBoard.

    Args:
        every_n_epochs: epochs between two histograms, which show the first batch of the epoch on rank 0.
    """

    def __init__(self, every_n_epochs: int = 1) -> None:
        self.every_n_epochs = every_n_epochs
        self._handles: list[Any] = []
        self._outputs: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Register forward hooks on the normalization layers for one batch."""
        if batch_idx or trainer.current_epoch % self.every_n_epochs:
            return
        torch.compiler.set_stance("force_eager")  # compiled code does not call new hooks; set on all ranks
        if not trainer.is_global_zero:
            return
        network: nn.Module = pl_module.network  # type: ignore[assignment]
        for name, layer in network.named_modules():
            if isinstance(layer, _BatchNorm | nn.GroupNorm):

                def keep(layer: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                    self._outputs[name] = output.detach()

                self._handles.append(layer.register_forward_hook(keep))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove the hooks and write the histograms."""
        if not batch_idx and not trainer.current_epoch % self.every_n_epochs:
            torch.compiler.set_stance("default")
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and self._outputs:
                for name, output in self._outputs.items():
                    layer = pl_module.get_submodule(f"network.{name}")
                    figures = {"output": output, "running_mean": None, "running_var": None} | dict(
                        layer.named_buffers()
                    )
                    for what in ("output", "running_mean", "running_var"):
                        values = figures[what]
                        values = None if values is None else values[values.isfinite()]
                        if values is not None and values.numel():
                            logger.experiment.add_histogram(f"{name}/{what}", values.float(), trainer.current_epoch)
        self._outputs = {}


class _ParametersOf(nn.Module):
    """A model without its buffers, which differ between ranks if statistics are not over all ranks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.named_parameters = model.named_parameters  # type: ignore[method-assign]


def _is_over_all_ranks(model: nn.Module) -> bool:
    """Return whether every BatchNorm of a model shares its statistics over all ranks."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    synchronized = (syncbn.SyncBatchNorm, nn.SyncBatchNorm)
    return all(isinstance(layer, synchronized) and _spans_the_world(layer.process_group) for layer in layers)


def _spans_the_world(process_group: Any) -> bool:
    return process_group is None or dist.get_world_size(process_group) == dist.get_world_size()
