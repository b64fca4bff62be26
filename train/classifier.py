"""The Lightning module: cross-entropy whose gradient and figures are those of the global batch, however it is split."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

Batch = tuple[Tensor, Tensor]


class Tally(Metric):
    """Sum of losses, correct and total counts: exact sums, so any split over ranks and batches gives the same.

    Args:
        over_ranks: add the ranks' sums up in `compute`; without, every rank has been given the global sums.
    """

    full_state_update = False
    loss_sum: Tensor
    correct: Tensor
    total: Tensor

    def __init__(self, over_ranks: bool = True) -> None:
        super().__init__(sync_on_compute=over_ranks)
        self.add_state("loss_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, correct: Tensor, total: Tensor) -> None:
        """Add the sums of a batch."""
        self.loss_sum += loss_sum.to(self.loss_sum.dtype)
        self.correct += correct.to(self.correct.dtype)
        self.total += total.to(self.total.dtype)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean loss, the accuracy and the two counts."""
        return {
            "loss": self.loss_sum / self.total,
            "accuracy": self.correct.double() / self.total,
            "correct": self.correct,
            "total": self.total,
        }


class ImageClassifier(LightningModule):
    """Trains a network on (images, labels).

    A rank may have fewer images than the others, or none: the gradient is that of the mean loss over the global batch.

    Args:
        network: images (N, C, H, W) to logits (N, num_classes).
        optimizer: `optimizer(network)` returns the optimizer.
        scheduler: `scheduler(optimizer, total_steps=, steps_per_epoch=)` returns a schedule that is stepped after every
            optimizer step.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Callable[[nn.Module], Optimizer] | None = None,
        scheduler: Callable[..., LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.train_tally, self.val_tally, self.test_tally = Tally(over_ranks=False), Tally(), Tally()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this rank's share of the loss, scaled so that DDP's mean over ranks is the mean over images."""
        loss_sum, correct, total = _sums(self(batch[0]), batch[1])
        world = torch.stack([loss_sum.detach().double(), correct.double(), total.double()])
        if self.trainer.world_size > 1:
            dist.all_reduce(world)
        self.train_tally.update(*world)
        for name, figure in (("loss", world[0]), ("accuracy", world[1])):
            self.log(f"train_{name}_step", figure / world[2], on_step=True, prog_bar=True, batch_size=1)
        return loss_sum * (self.trainer.world_size / world[2]).to(loss_sum.dtype)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Log the exact means over the epoch after its last batch, in time for the callbacks at the epoch's end."""
        if self.trainer.is_last_batch:
            self._log_epoch("train", self.train_tally)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count this rank's images."""
        self.val_tally.update(*_sums(self(batch[0]), batch[1]))

    def on_validation_epoch_end(self) -> None:
        """Log the loss and accuracy over all ranks' images."""
        self._log_epoch("val", self.val_tally)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count this rank's images."""
        self.test_tally.update(*_sums(self(batch[0]), batch[1]))

    def on_test_epoch_end(self) -> None:
        """Log the loss, the accuracy and both counts over all ranks' images."""
        self._log_epoch("test", self.test_tally, counts=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its schedule, stepped after every optimizer step."""
        assert self.make_optimizer is not None, "training needs an optimizer"
        optimizer = self.make_optimizer(self.network)
        if self.make_scheduler is None:
            return {"optimizer": optimizer}
        total_steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self.make_scheduler(
            optimizer, total_steps=total_steps, steps_per_epoch=total_steps / (self.trainer.max_epochs or 1)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _log_epoch(self, part: str, tally: Tally, counts: bool = False) -> None:
        figures = tally.compute()
        tally.reset()
        for name in ("loss", "accuracy", "correct", "total") if counts else ("loss", "accuracy"):
            shown = name == "accuracy"
            self.log(
                f"{part}_{name}", figures[name].double(), on_step=False, on_epoch=True, batch_size=1, prog_bar=shown
            )


def _sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of losses, the correct and the total count of one rank's images; there may be none."""
    correct = (logits.argmax(dim=1) == labels).sum()
    return F.cross_entropy(logits, labels, reduction="sum"), correct, labels.new_full((), len(labels))
