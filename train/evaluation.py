"""Test results beyond the accuracy: the confusion matrix, counts per class, and the most confident mistakes."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

MISTAKES = 25


class Mistake(NamedTuple):
    """A misclassified image (C, H, W), as given to the network, with its label and prediction."""

    probability: float
    label: int
    predicted: int
    image: Tensor


class Findings(Callback):
    """Collects test results over all ranks; every count is a sum, so it does not depend on the split over ranks.

    Attributes:
        confusion: counts by label (rows) and prediction (columns), int64 (num_classes, num_classes).
        mistakes: the wrong predictions with the highest probability, highest first.
    """

    def __init__(self, num_classes: int) -> None:
        self._matrix = MulticlassConfusionMatrix(num_classes)
        self.confusion: Tensor = torch.zeros(num_classes, num_classes, dtype=torch.long)
        self.mistakes: list[Mistake] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counts and the mistakes."""
        self._matrix = self._matrix.to(pl_module.device)
        self._matrix.reset()
        self.mistakes = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Add one batch, from the logits that `test_step` returns."""
        images, labels = batch
        if not len(labels):
            return
        probability, predicted = outputs.softmax(dim=1).max(dim=1)
        self._matrix.update(predicted, labels)
        wrong = (predicted != labels).nonzero().flatten()
        for i in wrong[probability[wrong].argsort(descending=True)][:MISTAKES].tolist():
            self.mistakes.append(Mistake(float(probability[i]), int(labels[i]), int(predicted[i]), images[i].cpu()))
        self.mistakes = sorted(self.mistakes, key=_order)[:MISTAKES]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the counts and mistakes of all ranks."""
        self.confusion = self._matrix.compute().cpu()
        gathered: list[Any] = [self.mistakes] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(gathered, self.mistakes)
            self.mistakes = [mistake for mistakes in gathered for mistake in mistakes]
        self.mistakes = sorted(self.mistakes, key=_order)[:MISTAKES]

    def per_class(self) -> list[tuple[int, int]]:
        """Return (correct, total) of each class."""
        return list(zip(self.confusion.diagonal().tolist(), self.confusion.sum(dim=1).tolist(), strict=True))


def _order(mistake: Mistake) -> tuple[float, int, int]:
    return -mistake.probability, mistake.label, mistake.predicted
