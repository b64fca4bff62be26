"""The LightningModule: gradients and metrics are those of the global batch, however it is split over ranks."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from train import data_checks, distenv, identity, rng
from train.mixing import Mixing

Batch = tuple[Tensor, Tensor]


class Tally(Metric):
    """Exact sums of losses, correct and total counts; they do not depend on the split over ranks and batches.

    Args:
        over_ranks: whether `compute` sums over ranks; False if `update` receives global sums on every rank.
    """

    full_state_update = False
    names = ("loss_sum", "correct", "correct_top5", "total")
    loss_sum: Tensor
    correct: Tensor
    correct_top5: Tensor
    total: Tensor

    def __init__(self, over_ranks: bool = True) -> None:
        super().__init__(sync_on_compute=over_ranks)
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in self.names[1:]:
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, *sums: Tensor) -> None:
        """Add the sums of a batch, in the order of `names`."""
        for name, value in zip(self.names, sums, strict=True):
            state = getattr(self, name)
            state += value.to(state.dtype)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean loss, the accuracies and the counts."""
        return {
            "loss": self.loss_sum / self.total,
            "accuracy": self.correct.double() / self.total,
            "top5_accuracy": self.correct_top5.double() / self.total,
            "correct": self.correct,
            "total": self.total,
        }


class ImageClassifier(LightningModule):
    """Trains a network on (images, labels).

    The gradient is that of the mean loss over the global batch, even if a rank has fewer images than others, or none.
    Validation and test run in float32 regardless of the training precision, so that their counts do not depend on the
    batch size.

    Args:
        network: maps images (N, C, H, W) to logits (N, num_classes).
        optimizer: `optimizer(network)` returns the optimizer.
        scheduler: `scheduler(optimizer, total_steps=, steps_per_epoch=)` returns an LR scheduler that is stepped after
            every optimizer step.
        label_smoothing: share of a training target that is spread evenly over all classes.
        mixing: blends pairs of training images and their labels.
        channels_last: keep images and kernels in NHWC order.
        frozen: modules of the network that stay in evaluation mode while it trains, see `train.finetune.freeze`.
        config: configuration of the run; every checkpoint stores it, so that the run can be rebuilt from the file.

    Attributes:
        step_sums: (5,) sums over all ranks in the last training step, after its backward: those of `Tally.names`, and
            the number of ranks that were asked to stop.
        stop_requested: whether this rank has been asked to stop.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[nn.Module], Optimizer] | None = None,
        scheduler: Callable[..., LRScheduler] | None = None,
        *,
        label_smoothing: float = 0.0,
        mixing: Mixing | None = None,
        channels_last: bool = False,
        frozen: Sequence[nn.Module] = (),
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.label_smoothing = label_smoothing
        self.mixing = mixing
        self.frozen = tuple(frozen)
        self.config = config
        self.train_tally, self.val_tally, self.test_tally = Tally(over_ranks=False), Tally(), Tally()
        self.step_sums: Tensor | None = None
        self._summed: dist.Work | None = None  # the all-reduce of `step_sums`
        self.stop_requested = False

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(images.to(memory_format=self.memory_format))

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules but the frozen ones, which stay in evaluation mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def setup(self, stage: str) -> None:
        """Refuse a data set with other classes than the network, before the first step."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is not None and stage == "fit":
            data_checks.check_labels(data)

    def on_train_start(self) -> None:
        """Seed every rank differently, for dropout; the initial weights were drawn with the same seed on all ranks."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        rng.seed_all(rng.mix(data.seed, distenv.rank()))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this rank's share of the loss, scaled to give the gradient of the mean over all images of the step."""
        images, labels = batch
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        images = data.transform_batch(images, self.current_epoch, batch_idx)
        targets = labels
        if self.mixing is not None:
            images, targets = self.mixing(images, labels, data.seed, self.current_epoch, batch_idx, distenv.rank())
        logits = self(images)
        # unlike a mean, the sum does not divide by the number of images of this rank, which may be 0
        loss_sum = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.label_smoothing)
        stop = labels.new_full((), self.stop_requested, dtype=torch.float64)
        world = torch.stack([loss_sum.detach().double(), *_counts(logits, labels), stop])
        self._summed = dist.all_reduce(world, async_op=True) if self.trainer.world_size > 1 else None
        self.step_sums = world
        return loss_sum * (self.trainer.world_size / self._images_of_share(batch_idx))

    def on_after_backward(self) -> None:
        """Log the step over all ranks; the sums are on their way during backward."""
        if self._summed is not None:
            self._summed.wait()
        world = self.step_sums
        assert world is not None
        self.train_tally.update(*world[:4])
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return  # no logger reads these figures; Lightning takes a millisecond to note each
        # with `prog_bar` Lightning would read them after every step, and wait for it
        for name, figure in (("loss", world[0]), ("accuracy", world[1])):
            self.log(f"train_{name}_step", figure / world[3], on_step=True, batch_size=1)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        # Lightning would copy a Python number to the device, and wait for the copy
        self.log("lr", torch.full((), rate, device=self.device), on_step=True, batch_size=1)

    def _images_of_share(self, batch_idx: int) -> float:
        """Return the number of images in one step, divided by `accumulate_grad_batches` as Lightning does."""
        every = self.trainer.accumulate_grad_batches
        first = batch_idx - batch_idx % every
        sampler: Any = self.trainer.train_dataloader.batch_sampler  # type: ignore[union-attr]
        batches = range(first, min(first + every, int(self.trainer.num_training_batches)))
        return sum(map(sampler.global_size, batches)) / every

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the exact means over the epoch after its last batch, before the callbacks' `on_train_epoch_end`."""
        if self.trainer.is_last_batch:
            self._log_epoch("train", self.train_tally)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add this rank's images to the tally."""
        self.val_tally.update(*self._evaluated(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the loss and accuracies over all ranks' images; with 5 classes or fewer, that of the top 5 is 1."""
        self._log_epoch("val", self.val_tally, ("top5_accuracy",))

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add this rank's images to the tally and return their logits."""
        with exact_float32(batch[0].device):
            logits = self(batch[0])
        self.test_tally.update(*_sums(logits, batch[1]))
        return logits

    def on_test_epoch_end(self) -> None:
        """Log the loss, the accuracy and both counts over all ranks' images."""
        self._log_epoch("test", self.test_tally, ("top5_accuracy", "correct", "total"))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its LR scheduler, stepped after every optimizer step."""
        assert self.make_optimizer is not None, "training needs an optimizer"
        optimizer = self.make_optimizer(self.network)
        if self.make_scheduler is None:
            return {"optimizer": optimizer}
        self.trainer.fit_loop.setup_data()  # Lightning does this later if max_steps limits the run
        # without a limit only schedules that do not depend on it have passed `settings.check_launch`
        total_steps = int(min(self.trainer.estimated_stepping_batches, sys.maxsize))
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        scheduler = self.make_scheduler(optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the configuration, the identity of the data, and the sums of the epoch so far."""
        checkpoint["config"] = self.config
        checkpoint |= identity.of(self.trainer.datamodule)  # type: ignore[attr-defined]
        checkpoint["train_tally"] = [getattr(self.train_tally, name).cpu() for name in Tally.names]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the sums of the epoch so far.

        Raises:
            Refusal: the run had other training data.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        identity.check_unchanged(self.trainer.ckpt_path, checkpoint, data)
        self.train_tally.reset()
        self.train_tally.update(*checkpoint["train_tally"])

    def _evaluated(self, batch: Batch) -> list[Tensor]:
        with exact_float32(batch[0].device):
            return _sums(self(batch[0]), batch[1])

    def _log_epoch(self, part: str, tally: Tally, more: tuple[str, ...] = ()) -> None:
        figures = tally.compute()
        tally.reset()
        for name in ("loss", "accuracy", *more):
            self.log(f"{part}_{name}", figures[name].double(), on_step=False, on_epoch=True, batch_size=1)


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute in float32 without TF32 or autocast, under which counts would depend on the batch size."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


def _sums(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the sum of losses and the counts over this rank's images, of which there may be none."""
    return [F.cross_entropy(logits, labels, reduction="sum"), *_counts(logits, labels)]


def _counts(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the number of correct, top-5 correct and all images, each () float64."""
    best = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    right, right_top5 = best[:, 0].sum().double(), best.sum().double()
    return [right, right_top5, torch.full_like(right, len(labels))]
