"""The order of the images: split into global batches first, then each global batch over the ranks.

The global batches are the same for every number of ranks. Every rank sees the same number of batches, and nothing is
padded, dropped or repeated: if a global batch has fewer images than there are ranks, some ranks get an empty batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, TensorDataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_image

from train.datasets import image_name
from train.distenv import Refusal
from train.images import cropped, decoded, unreadable
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
        dataset: yields (image, label); the image is a PIL image, a tensor (C, H, W), or a JPEG file (bytes,).
        transforms: torchvision transforms, applied in this order.
        seed: seed of the augmentation.
        channels: of the images, to decode JPEGs.
        reduce: whether JPEGs are decoded at a fraction of their size if the first transform takes a small random crop.
    """

    def __init__(
        self,
        dataset: Dataset,
        transforms: Sequence[nn.Module] = (),
        seed: int = 0,
        channels: int = 3,
        reduce: bool = False,
    ) -> None:
        self.dataset = dataset
        self.transforms = list(transforms)
        self.seed = seed
        self.channels = channels
        self.reduces = reduce and bool(transforms) and type(self.transforms[0]) is v2.RandomResizedCrop

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        image, label = self.read(key[0])
        return self.transformed(image, key), label

    def read(self, index: int) -> tuple[Any, int]:
        """Return an image as the data set has it, and its label.

        Raises:
            Refusal: the image cannot be read.
        """
        try:
            image, label = self.dataset[index]
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for a damaged file
            raise unreadable(image_name(self.dataset, index), error) from None
        return image, int(label)

    def transformed(self, image: Any, key: tuple[int, int]) -> Tensor:
        """Return an image (C, H, W) after its transforms, on the device of a decoded tensor.

        Raises:
            Refusal: the image is a JPEG file that cannot be decoded.
        """
        index, epoch = key
        is_file = isinstance(image, Tensor) and image.ndim == 1
        if is_file and not self.reduces:
            image = decoded([image], self.channels, torch.device("cpu"), [image_name(self.dataset, index)])[0]
        if not self.transforms:
            return to_image(image)
        with seeded(self.seed, epoch, index):
            first, *others = self.transforms
            if is_file and self.reduces:
                image = cropped(image, first, self.channels, image_name(self.dataset, index))
            else:
                image = first(to_image(image))
            for transform in others:
                image = transform(image)
        return image

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
    """Stacks samples to images (N, C, H, W) and labels (N,); N may be 0.

    Args:
        image_shape: (C, H, W), the shape of an empty batch's images.
    """

    def __init__(self, image_shape: Sequence[int]) -> None:
        self.image_shape = tuple(image_shape)

    def __call__(self, samples: list[tuple[Tensor, int]] | Stacked) -> tuple[Tensor, Tensor]:
        """Return images in the dtype they have, bytes if there are none, and labels as int64."""
        if isinstance(samples, Stacked):
            return samples.images, samples.labels.long()
        labels = torch.tensor([label for _, label in samples], dtype=torch.long)
        if not samples:
            return torch.empty(0, *self.image_shape, dtype=torch.uint8), labels
        return torch.stack(_of_one_shape([image.as_subclass(Tensor) for image, _ in samples])), labels


def _of_one_shape(images: list[Tensor]) -> list[Tensor]:
    """Return the images; raise Refusal if they cannot be stacked."""
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise Refusal(
            f"the images of a batch must have one size, got {' x '.join(map(str, shapes[0]))} and "
            f"{' x '.join(map(str, shapes[-1]))}: resize or crop them in data.train_transforms and data.eval_transforms"
        )
    return images
