"""The LightningDataModule: train, validation and test sets, their preparation, and their split over ranks."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from train import data_checks, datasets, distenv
from train.augment import BatchTransform, Normalize
from train.datasets import Splits, fewer, hold_out
from train.distenv import Refusal
from train.loader import Batch, ImageLoader
from train.rng import mix
from train.samplers import Collate, GlobalBatchSampler, PreparedImages
from train.stop import ignore_signals

RECALIBRATION_EPOCH = 2**31  # no training epoch has this order and augmentation
VALIDATION_SEED = 0  # every run has the same validation set, regardless of its seed


class ImageData(LightningDataModule):
    """Labelled images in global batches that do not depend on the number of ranks.

    Args:
        source: `source(root=, download=)` returns the train and test sets, see `train.datasets`.
        num_classes: labels are 0 to num_classes - 1.
        in_channels: channels of an image.
        image_size: height and width in pixels after the transforms.
        mean, std: per channel of the train set, for pixel values from 0 to 1.
        global_batch_size: images per step over all ranks.
        batch_size_per_rank: if given, the global batch is this number times the number of ranks instead.
        eval_batch_size: images per validation or test step over all ranks.
        train_transforms: augmentation of single images, in the DataLoader workers.
        batch_transforms: augmentation of a batch on the device, see `train.augment`.
        eval_transforms: transforms for validation and test, such as a resize.
        val_fraction: share of the train set held out to choose the best checkpoint. If 0, the test set is also the
            validation set, and only the last checkpoint has an unbiased test accuracy.
        num_train: number of train images to use, the same images for every seed; all of them by default.
        seed: determines the order and the augmentation, but not the split into train and validation set.
        root: directory of the files, for sources that read files.
        download: whether to download missing files, once per node.
        num_workers: DataLoader workers per rank.
        decode: decoder of image files: "torchvision" for JPEGs and PIL for all others; "pil" for all, with the same
            pixels; or "gpu", which decodes and augments JPEGs on the GPU, with other roundings.
        reduce: whether "torchvision" decodes a JPEG at 1/2, 1/4 or 1/8 of its size if the first transform for training
            takes a much smaller random crop, see `train.images.cropped`.
        shuffle: whether every epoch has a new order.
    """

    def __init__(
        self,
        source: Callable[..., Splits],
        *,
        num_classes: int,
        in_channels: int,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        global_batch_size: int,
        batch_size_per_rank: int | None = None,
        eval_batch_size: int = 512,
        train_transforms: Sequence[nn.Module] = (),
        batch_transforms: Sequence[BatchTransform] = (),
        eval_transforms: Sequence[nn.Module] = (),
        val_fraction: float = 0.1,
        num_train: int | None = None,
        seed: int = 0,
        root: str | None = None,
        download: bool = False,
        num_workers: int = 0,
        decode: str = "torchvision",
        reduce: bool = False,
        shuffle: bool = True,
    ) -> None:
        super().__init__()
        world_size = distenv.world_size()
        self.source = source
        self.num_classes = num_classes
        self.global_batch_size = batch_size_per_rank * world_size if batch_size_per_rank else global_batch_size
        self.eval_batch_size = eval_batch_size
        self.train_transforms = train_transforms
        self.batch_transforms = batch_transforms
        self.eval_transforms = eval_transforms
        self.collate = Collate((in_channels, image_size, image_size))
        self.normalize = Normalize(mean, std)
        self.val_fraction = val_fraction
        self.num_train = num_train
        self.seed = seed
        self.root = root
        self.download = download
        self.num_workers = num_workers
        self.decode = decode
        self.reduce = reduce
        self.shuffle = shuffle
        self.classes: list[str] | None = None
        self._is_set_up = False
        self.resume_at = (0, 0)  # epoch and batch at which training starts

    def check_batch_size(self) -> None:
        """Raise Refusal, on every rank, if the global batch is too small to train on these ranks."""
        if self.global_batch_size < distenv.world_size():
            raise Refusal(
                f"every rank must get an image: the global batch has {self.global_batch_size} and there are "
                f"{distenv.world_size()} ranks, set data.batch_size_per_rank=1 or more"
            )

    def prepare_data(self) -> None:
        """Download once per node, if `download` is set."""
        if self.download:
            self.source(root=self.root, download=True)

    def setup(self, stage: str) -> None:
        """Open the data sets on this rank, at the first call.

        Raises:
            Refusal: files are missing; on every rank that cannot find them.
        """
        if self._is_set_up:
            return
        splits = self.source(root=self.root, download=False)
        self.decodes_on_device = datasets.set_decoder(splits, self.decode) and self.decode == "gpu"
        if self.num_train:
            splits = fewer(splits, self.num_train, VALIDATION_SEED)
        self.test_set = splits.test
        self.classes = splits.classes
        if self.val_fraction:
            self.train_set, self.val_set = hold_out(splits, self.val_fraction, VALIDATION_SEED)
        else:
            self.train_set, self.val_set = splits.train, splits.test
        self._is_set_up = True

    def class_names(self) -> list[str]:
        """Return the class names, or the class numbers if the data set has no names."""
        return self.classes or [str(label) for label in range(self.num_classes)]

    def train_dataloader(self) -> ImageLoader:
        """Return the augmented train set in this epoch's order."""
        loader = self._loader(self.train_set, self.train_transforms, self.global_batch_size, self.shuffle)
        # Lightning starts the first epoch's workers before it calls `set_epoch`
        loader.batch_sampler.resume_at(*self.resume_at)  # type: ignore[union-attr]
        return loader

    def recalibration_batches(self, num_batches: int) -> Iterator[Tensor]:
        """Yield this rank's augmented images of `num_batches` global batches of the train set, always the same ones."""
        loader = self._loader(self.train_set, self.train_transforms, self.global_batch_size, True, workers=0)
        loader.batch_sampler.set_epoch(RECALIBRATION_EPOCH)  # type: ignore[union-attr]
        for batch_idx, (images, _) in enumerate(islice(loader, num_batches)):
            yield self.transform_batch(self.normalize(images), RECALIBRATION_EPOCH, batch_idx)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalize the images, on the device."""
        images, labels = batch
        images = self.normalize(images)
        if self.trainer is not None:  # Lightning has converted what came from the loader, and bytes stay bytes
            images = self.trainer.precision_plugin.convert_input(images)
        return images, labels

    def transform_batch(self, images: Tensor, epoch: int, batch_idx: int) -> Tensor:
        """Apply `batch_transforms` to this rank's images of a global batch of the train set."""
        for transform in self.batch_transforms:
            images = transform(images, seed=mix(self.seed, epoch, batch_idx), global_batch_size=self.global_batch_size)
        return images

    def val_dataloader(self) -> ImageLoader:
        """Return the validation set, every image once over all ranks."""
        return self._loader(self.val_set, self.eval_transforms, self.eval_batch_size, shuffle=False)

    def test_dataloader(self) -> ImageLoader:
        """Return the test set, every image once over all ranks."""
        return self._loader(self.test_set, self.eval_transforms, self.eval_batch_size, shuffle=False)

    def _loader(
        self,
        dataset: Dataset,
        transforms: Sequence[nn.Module],
        global_batch_size: int,
        shuffle: bool,
        workers: int | None = None,
    ) -> ImageLoader:
        channels = self.collate.image_shape[0]
        images = PreparedImages(dataset, transforms, self.seed, channels, self.reduce)
        sampler = GlobalBatchSampler(
            len(images),
            global_batch_size,
            rank=distenv.rank(),
            world_size=distenv.world_size(),
            shuffle=shuffle,
            seed=self.seed,
        )
        num_workers = self.num_workers if workers is None else workers
        return ImageLoader(
            images,
            self.collate,
            check=self._check,
            device=torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device,
            decode_channels=channels if self.decodes_on_device else None,
            batch_sampler=sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # otherwise every epoch draws from the generator that dropout uses
        )

    def _check(self, images: Tensor, labels: Tensor) -> None:
        """Refuse images and labels that the network lacks, where this costs no wait."""
        if self.trainer is not None:
            network = getattr(self.trainer.lightning_module, "network", None)
            has_fixed_size = self.trainer.training or getattr(network, "has_fixed_size", False)
            data_checks.check_batch(images, labels, self, has_fixed_size)
