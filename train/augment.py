"""Augmentation of a batch on its device, the same for every number of ranks: what `data.batch_transforms` holds."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from train import distenv

BatchTransform = Callable[..., Tensor]  # (images, seed=, global_batch_size=) -> images


class CropAndFlip:
    """Shift every image by up to `padding` pixels, and mirror every other one.

    As `RandomCrop(size, padding)` and `RandomHorizontalFlip` do, in one gather on the device for the whole batch. What
    moves in is the batch's own edge value (reflected), as normalized images have no zero of their own.

    Args:
        padding: pixels a side.
        flip: mirror half of the images, or none.
    """

    def __init__(self, padding: int, flip: bool = True) -> None:
        self.padding = padding
        self.flip = flip

    def __call__(self, images: Tensor, *, seed: int, global_batch_size: int) -> Tensor:
        """Return the images (N, C, H, W) of this rank's part of a global batch."""
        if not len(images):
            return images
        generator = torch.Generator().manual_seed(seed)
        shifts = torch.randint(2 * self.padding + 1, (global_batch_size, 2), generator=generator)
        mirrored = torch.randint(2, (global_batch_size, 1), generator=generator) * int(self.flip)
        # the images of this rank in the global batch, as `GlobalBatchSampler` deals them out
        drawn = torch.cat([shifts, mirrored], dim=1)[distenv.rank() :: distenv.world_size()][: len(images)]
        drawn = drawn.to(images.device, non_blocking=True)
        height, width = images.shape[2:]
        padded = F.pad(images, [self.padding] * 4, mode="reflect")
        rows = torch.arange(height, device=images.device) + drawn[:, :1]  # (N, H)
        columns = torch.arange(width, device=images.device) + drawn[:, 1:2]  # (N, W)
        columns = torch.where(drawn[:, 2:] > 0, columns.flip(1), columns)
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        # advanced indices around a slice put the channels last
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
