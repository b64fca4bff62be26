"""MixUp and CutMix: blend pairs of images and their labels, with draws that depend on seed, step and rank alone."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

from train.rng import seeded


class Mixing:
    """Applies one of torchvision's MixUp and CutMix to every training batch, chosen at random.

    Images are mixed within the batch of a rank, so the result of a run depends on the number of ranks.

    Args:
        num_classes: number of classes.
        mixup_alpha, cutmix_alpha: parameter of the Beta distribution of the mixing weight; 0 disables the method.

    Source: Zhang et al. 2018 (mixup), Yun et al. 2019 (CutMix).
    """

    def __init__(self, num_classes: int, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> None:
        choices: list[Any] = []
        if mixup_alpha:
            choices.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
        if cutmix_alpha:
            choices.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
        if not choices:
            raise ValueError("expected mixup_alpha or cutmix_alpha above 0, got neither: use mixing=none")
        self.num_classes = num_classes
        self.choice = v2.RandomChoice(choices)

    def __call__(self, images: Tensor, labels: Tensor, *key: int) -> tuple[Tensor, Tensor]:
        """Return images (N, C, H, W) and class probabilities (N, num_classes); N may be 0.

        Args:
            key: the integers that seed the draw.
        """
        if not len(images):
            return images, F.one_hot(labels, self.num_classes).to(images.dtype)
        with seeded(*key):
            return self.choice(images, labels)
