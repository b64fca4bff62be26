"""The order of the images: cut into global batches first, and every global batch dealt out to the ranks.

The global batches are the same for every number of ranks. Every rank sees the same number of batches, and nothing is
padded, dropped or repeated: where a global batch has fewer images than there are ranks, some get an empty batch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.v2.functional import normalize, to_dtype, to_image


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields this rank's part of every global batch, as (index, epoch) pairs; their number may be 0.

    The epoch travels with the index so that a data set can draw its augmentation from it in any worker process.

    Args:
        num_samples: size of the data set.
        global_batch_size: samples that all ranks together take in one step.
        shuffle: a new order for each epoch, the same on every rank; otherwise the data set's own.
        seed: of the order.
    """

    def __init__(
        self, num_samples: int, global_batch_size: int, *, rank: int, world_size: int, shuffle: bool, seed: int = 0
    ) -> None:
        if global_batch_size < 1:
            raise ValueError(f"the global batch size must be at least 1, got {global_batch_size}")
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    @property
    def sampler(self) -> "GlobalBatchSampler":
        """Itself: Lightning looks for `set_epoch` on the sampler of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the next iteration has it."""
        self.epoch = epoch

    def order(self) -> Tensor:
        """Return the permutation of this epoch (num_samples,), equal on every rank."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        return torch.randperm(self.num_samples, generator=generator)

    def global_size(self, batch_idx: int) -> int:
        """Return how many samples all ranks together have in a batch."""
        return min(self.global_batch_size, self.num_samples - batch_idx * self.global_batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self.order().split(self.global_batch_size):
            yield [(index, epoch) for index in batch[self.rank :: self.world_size].tolist()]

    def __len__(self) -> int:
        return -(-self.num_samples // self.global_batch_size)


class PreparedImages(Dataset):
    """A data set as image tensors, with an augmentation drawn from (seed, epoch, index) alone.

    So an image is augmented alike for every number of ranks and workers, and after a resume. It is indexed by
    `GlobalBatchSampler`'s (index, epoch) pairs.

    Args:
        dataset: yields (image, label), the image as PIL's or a tensor (C, H, W).
        transforms: of torchvision, applied in turn.
        seed: of the augmentation.
    """

    def __init__(self, dataset: Dataset, transforms: Sequence[nn.Module] = (), seed: int = 0) -> None:
        self.dataset = dataset
        self.transforms = transforms
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, epoch = key
        image, label = self.dataset[index]
        image = to_image(image)
        if self.transforms:
            with torch.random.fork_rng(devices=()):
                # `torch.manual_seed` seeds every accelerator too, which takes longer than the augmentation
                torch.default_generator.manual_seed(_mix(self.seed, epoch, index))
                for transform in self.transforms:
                    image = transform(image)
        return image, int(label)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


class Collate:
    """Stacks and normalizes samples to images (N, C, H, W) and labels (N,), also when there are none.

    Args:
        image_shape: (C, H, W), which an empty batch has too.
        mean, std: of each channel, for values from 0 to 1.
    """

    def __init__(self, image_shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
        self.image_shape = tuple(image_shape)
        self.mean, self.std = list(mean), list(std)

    def __call__(self, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Return images as float32 and labels as int64."""
        labels = torch.tensor([label for _, label in samples], dtype=torch.long)
        if not samples:
            return torch.empty(0, *self.image_shape), labels
        images = torch.stack([image.as_subclass(Tensor) for image, _ in samples])
        return normalize(to_dtype(images, torch.float32, scale=True), self.mean, self.std), labels


def _mix(*numbers: int) -> int:
    """Return one seed for several numbers, without the collisions of their sum."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 25)
    return seed
