"""The order of the images: split into global batches first, then each global batch over the ranks.

The global batches are the same for every number of ranks. Every rank sees the same number of batches, and nothing is
padded, dropped or repeated: if a global batch has fewer images than there are ranks, some ranks get an empty batch.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, TensorDataset
from torchvision.transforms.v2.functional import normalize, to_dtype, to_image

from train.datasets import image_name
from train.distenv import Refusal
from train.images import unreadable
from train.rng import mix, seeded


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields this rank's part of every global batch, a list of (index, epoch) pairs that may be empty.

    The index comes with the epoch so that a data set can seed its augmentation with both, in any worker process.

    Args:
        num_samples: size of the data set.
        global_batch_size: samples per step over all ranks.
        shuffle: whether each epoch has a new order, the same on every rank; otherwise it is that of the data set.
        seed: seed of the order.
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
        self._resume_at = (0, 0)

    @property
    def sampler(self) -> "GlobalBatchSampler":
        """The object itself: Lightning looks for `set_epoch` on the sampler of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def resume_at(self, epoch: int, batch_idx: int) -> None:
        """Start at a batch within an epoch; later epochs start at their first batch."""
        self.epoch = epoch
        self._resume_at = (epoch, batch_idx)

    def order(self) -> Tensor:
        """Return the permutation of this epoch (num_samples,), equal on every rank."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        return torch.randperm(self.num_samples, generator=generator)

    def global_size(self, batch_idx: int) -> int:
        """Return the number of samples in a global batch."""
        return min(self.global_batch_size, self.num_samples - batch_idx * self.global_batch_size)

    def local_samples(self) -> int:
        """Return the number of samples of this rank in a whole epoch."""
        sizes = (self.global_size(batch_idx) for batch_idx in range(len(self)))
        return sum(len(range(self.rank, size, self.world_size)) for size in sizes)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        first = self._resume_at[1] if epoch == self._resume_at[0] else 0
        for batch in self.order().split(self.global_batch_size)[first:]:
            yield [(index, epoch) for index in batch[self.rank :: self.world_size].tolist()]

    def __len__(self) -> int:
        return -(-self.num_samples // self.global_batch_size)


class PreparedImages(Dataset):
    """A data set of image tensors whose augmentation depends on (seed, epoch, index) alone.

    The augmentation of an image is therefore the same for every number of ranks and workers, and after a resume. The
    data set is indexed with the (index, epoch) pairs of `GlobalBatchSampler`. Transforms must draw from torch's
    generator, as torchvision's do.

    Args:
        dataset: yields (image, label); the image is a PIL image or a tensor (C, H, W).
        transforms: torchvision transforms, applied in this order.
        seed: seed of the augmentation.
    """

    def __init__(self, dataset: Dataset, transforms: Sequence[nn.Module] = (), seed: int = 0) -> None:
        self.dataset = dataset
        self.transforms = transforms
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, epoch = key
        try:
            image, label = self.dataset[index]
            image = to_image(image)
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for a damaged file
            raise unreadable(image_name(self.dataset, index), error) from None
        if self.transforms:
            with seeded(self.seed, epoch, index):
                for transform in self.transforms:
                    image = transform(image)
        return image, int(label)

    def __getitems__(self, keys: list[tuple[int, int]]) -> "list[tuple[Tensor, int]] | Stacked":
        """Return several samples; those of a TensorDataset without transforms are indexed at once."""
        if isinstance(self.dataset, TensorDataset) and not self.transforms:
            images, labels = self.dataset[[index for index, _ in keys]]
            return Stacked(images, labels)
        return [self[key] for key in keys]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


class Stacked(NamedTuple):
    """Samples that are already a batch: images (N, C, H, W) and labels (N,)."""

    images: Tensor
    labels: Tensor


class Collate:
    """Stacks and normalizes samples to images (N, C, H, W) and labels (N,); N may be 0.

    Args:
        image_shape: (C, H, W), the shape of an empty batch's images.
        mean, std: per channel, for values from 0 to 1.
    """

    def __init__(self, image_shape: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> None:
        self.image_shape = tuple(image_shape)
        self.mean, self.std = list(mean), list(std)

    def __call__(self, samples: list[tuple[Tensor, int]] | Stacked) -> tuple[Tensor, Tensor]:
        """Return images as float32 and labels as int64."""
        if isinstance(samples, Stacked):
            images, labels = samples.images, samples.labels.long()
        else:
            labels = torch.tensor([label for _, label in samples], dtype=torch.long)
            if not samples:
                return torch.empty(0, *self.image_shape), labels
            images = torch.stack(_of_one_shape([image.as_subclass(Tensor) for image, _ in samples]))
        return normalize(to_dtype(images, torch.float32, scale=True), self.mean, self.std), labels


def _of_one_shape(images: list[Tensor]) -> list[Tensor]:
    """Return the images; raise Refusal if they cannot be stacked."""
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise Refusal(
            f"the images of a batch must have one size, got {' x '.join(map(str, shapes[0]))} and "
            f"{' x '.join(map(str, shapes[-1]))}: resize or crop them in data.train_transforms and data.eval_transforms"
        )
    return images
