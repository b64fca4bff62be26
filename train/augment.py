"""Operations on a batch of images, on its device: normalization, and the augmentation of `data.batch_transforms`.

The augmentation does not depend on the number of ranks.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from train import distenv

BatchTransform = Callable[..., Tensor]  # (images, seed=, global_batch_size=) -> images


class Normalize:
    """(image - mean) / std per channel, for values from 0 to 1; a GPU gets the bytes of an image, a quarter of it.

    Unlike torchvision's, it does not make the host wait for a GPU.

    Args:
        mean, std: for each channel, or one for all.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = list(mean), list(std)
        self._constants: dict[tuple[torch.device, float], tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the images (N, C, H, W) as float32; whole numbers are divided by the largest of their dtype first."""
        highest = 1.0 if images.is_floating_point() else float(torch.iinfo(images.dtype).max)
        mean, std = self._on(images.device, highest)
        own = torch.empty_like(images, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(images)
        return own.sub_(mean).div_(std)

    def _on(self, device: torch.device, highest: float) -> tuple[Tensor, Tensor]:
        """Return mean and std, each (C, 1, 1) float32 on a device, for values from 0 to `highest`."""
        key = device, highest
        if key not in self._constants:
            self._constants[key] = tuple(  # type: ignore[assignment]
                (torch.tensor(values, dtype=torch.float64) * highest).float().to(device)[:, None, None]
                for values in (self.mean, self.std)
            )
        return self._constants[key]


class CropAndFlip:
    """Shift every image by up to `padding` pixels, and mirror it with probability 1/2.

    Like `RandomCrop(size, padding)` and `RandomHorizontalFlip`, but in one gather on the device for the whole batch.
    The padding reflects the image instead of filling with 0, because 0 is not black in a normalized image.

    Args:
        padding: pixels on each side.
        flip: whether to mirror images.
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
        # this rank's images of the global batch, as `GlobalBatchSampler` assigns them
        drawn = torch.cat([shifts, mirrored], dim=1)[distenv.rank() :: distenv.world_size()][: len(images)]
        drawn = drawn.to(images.device, non_blocking=True)
        height, width = images.shape[2:]
        padded = F.pad(images, [self.padding] * 4, mode="reflect")
        rows = torch.arange(height, device=images.device) + drawn[:, :1]  # (N, H)
        columns = torch.arange(width, device=images.device) + drawn[:, 1:2]  # (N, W)
        columns = torch.where(drawn[:, 2:] > 0, columns.flip(1), columns)
        batch = torch.arange(len(images), device=images.device)[:, None, None]
        # advanced indices around a slice move the channels to the last dimension
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
