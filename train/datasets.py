"""Data sources: `source(root=, download=)` returns a train and a test data set of (image, label) pairs."""

import os
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision import datasets

from train.distenv import Refusal
from train.images import RULE, is_image, note_left_out, reader, search, visible

DIGITS_TEST = 360  # of 1,797
DIGITS_SPLIT_SEED = 0


class Splits(NamedTuple):
    """A train and a test data set.

    Attributes:
        train_labels: labels of the train set, if known without reading the images.
        classes: class names, if any.
    """

    train: Dataset
    test: Dataset
    train_labels: list[int] | None = None
    classes: list[str] | None = None


def image_name(dataset: Dataset, index: int) -> str:
    """Return the path of an image, or its index if it has no path."""
    source: Any = dataset
    while isinstance(source, Subset):
        source, index = source.dataset, source.indices[index]
    samples = getattr(source, "samples", None)
    return str(samples[index][0]) if samples else f"image {index}"


def digits(root: str | None = None, download: bool = False) -> Splits:
    """Return scikit-learn's 1,797 real 8x8 digits: 1,437 to train, 360 to test, in a fixed stratified split.

    The images come with the package, so `root` and `download` are ignored.
    """
    bunch = load_digits()
    images = torch.from_numpy(bunch.images / bunch.images.max()).float().unsqueeze(1)  # (1797, 1, 8, 8)
    labels = torch.from_numpy(bunch.target)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST, stratify=bunch.target, random_state=DIGITS_SPLIT_SEED
    )
    return Splits(
        TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test]), labels[train].tolist()
    )


def torchvision_dataset(root: str, download: bool = False, *, factory: Callable[..., Dataset]) -> Splits:
    """Return a torchvision data set that has a train and a test split.

    Args:
        root: directory of the files, in torchvision's layout.
        factory: `torchvision.datasets.CIFAR10` and the like, called with (root, train=, download=).

    Raises:
        Refusal: the files are missing or damaged, or cannot be downloaded.
    """
    name = getattr(factory, "__name__", str(factory))
    where = Path(root).resolve()
    try:
        train, test = (factory(root, train=train, download=download) for train in (True, False))
    except OSError as error:
        raise Refusal(
            f"{name} could not be downloaded into {where} ({error}): put its files there, or name their directory with "
            "data.root=DIR"
        ) from error
    except (RuntimeError, ValueError, AssertionError, EOFError, KeyError, UnpicklingError) as error:
        raise Refusal(
            f"{name} is missing or damaged in {where}: add data.download=true to download it there, or data.root=DIR "
            "to use the directory that contains it"
        ) from error
    labels = [int(label) for label in train.targets]  # type: ignore[attr-defined]
    return Splits(in_memory(train), in_memory(test), labels, getattr(train, "classes", None))


def in_memory(dataset: Any) -> Dataset:
    """Return a TensorDataset (N, C, H, W) of a data set whose `data` holds all images, (N, H, W) or (N, H, W, 3).

    Tensors are indexed and augmented faster than PIL images, and a whole batch is indexed at once.
    """
    images = torch.as_tensor(dataset.data)
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return TensorDataset(images, torch.as_tensor(dataset.targets))


class ClassFolders(datasets.ImageFolder):
    """The images under `root/CLASS/` and the folders in it, found and read by `train.images`.

    Args:
        root: directory of the class folders.
        in_channels: 1 for gray images, 3 for RGB.

    Raises:
        Refusal: there is no class folder, or one has no image.
    """

    def __init__(self, root: str, in_channels: int) -> None:
        super().__init__(root, loader=reader(in_channels), is_valid_file=is_image)
        self.in_channels = in_channels

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the class names, sorted, and their labels."""
        classes, beside = visible(directory)
        if not classes:
            raise Refusal(f"there is no class folder in {directory}: images are expected as {directory}/CLASS/*.jpg")
        note_left_out(directory, [os.path.join(directory, name) for name in beside], "images belong in a class folder")
        return classes, {name: label for label, name in enumerate(classes)}

    @staticmethod
    def make_dataset(
        directory: str | Path,
        class_to_idx: dict[str, int],
        extensions: tuple[str, ...] | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
        allow_empty: bool = False,
    ) -> list[tuple[str, int]]:
        """Return (path, label) of every image; only the first two arguments are used."""
        found = {name: search(os.path.join(directory, name)) for name in class_to_idx}
        note_left_out(directory, [path for files in found.values() for path in files.left_out], RULE)
        for name, files in found.items():
            if not files.images:
                raise Refusal(
                    f"every class folder must hold an image: {os.path.join(directory, name)} has none, add one or "
                    f"remove the folder ({RULE})"
                )
        return [(path, class_to_idx[name]) for name, files in found.items() for path in files.images]


def set_decoder(splits: Splits, decoder: str) -> bool:
    """Let `train.images.reader(decoder=)` read the files of both sets; return whether they are class folders.

    Raises:
        Refusal: there is no such decoder.
    """
    folders = [dataset for dataset in (splits.train, splits.test) if isinstance(dataset, ClassFolders)]
    for dataset in folders:
        dataset.loader = reader(dataset.in_channels, decoder)
    return bool(folders)


def imagefolder(root: str, download: bool = False, *, num_classes: int, in_channels: int = 3) -> Splits:
    """Return the images under `root/train/CLASS/` and `root/val/CLASS/`; the latter are the test set, as for ImageNet.

    Raises:
        Refusal: a directory is missing, or does not have `num_classes` class folders; a class folder has no image.
    """
    parts = []
    for part in ("train", "val"):
        folder = Path(os.path.realpath(root), part)
        if not os.path.isdir(folder):
            raise Refusal(
                f"there is no {folder}: images are expected as {folder}/CLASS/*.jpg, name another directory with "
                "data.root=DIR"
            )
        parts.append(ClassFolders(str(folder), in_channels))
    for one, other in (parts, parts[::-1]):
        for name in sorted(set(one.classes) - set(other.classes)):
            raise Refusal(
                f"{other.root} has no class folder {name}, but {one.root} has: give both the same class folders"
            )
    train, val = parts
    if len(train.classes) != num_classes:
        raise Refusal(
            f"data.num_classes is {num_classes} and {root} has {len(train.classes)} class folders: "
            f"set data.num_classes={len(train.classes)}"
        )
    return Splits(train, val, train.targets, train.classes)


def fake(
    root: str | None = None,
    download: bool = False,
    *,
    num_train: int,
    num_test: int,
    image_size: int,
    num_classes: int,
) -> Splits:
    """Return images of noise, which need no files: for trying a recipe and for timing, not for learning."""
    shape = (3, image_size, image_size)
    return Splits(
        datasets.FakeData(num_train, shape, num_classes),
        datasets.FakeData(num_test, shape, num_classes, random_offset=num_train),
    )


def hold_out(splits: Splits, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split the train set into a train and a validation part, stratified by label and determined by the seed alone."""
    size = len(splits.train)  # type: ignore[arg-type]
    try:
        train, val = train_test_split(
            np.arange(size), test_size=fraction, stratify=splits.train_labels, random_state=seed
        )
    except ValueError as error:
        raise Refusal(
            f"data.val_fraction={fraction} cannot split {size} images with every class in both parts: {error}"
        ) from None
    return _select(splits.train, train), _select(splits.train, val)


def fewer(splits: Splits, num_train: int, seed: int) -> Splits:
    """Return splits with `num_train` train images, stratified by label and determined by the seed alone.

    Raises:
        Refusal: the train set has fewer images, or the classes cannot be stratified.
    """
    size = len(splits.train)  # type: ignore[arg-type]
    if not 0 < num_train <= size:
        raise Refusal(f"data.num_train must be between 1 and the {size} images there are, got {num_train}")
    if num_train == size:
        return splits
    labels = splits.train_labels
    try:
        index, _ = train_test_split(np.arange(size), train_size=num_train, stratify=labels, random_state=seed)
    except ValueError as error:
        raise Refusal(f"data.num_train={num_train} is too small or too large to include every class: {error}") from None
    kept = None if labels is None else [labels[i] for i in index]
    return splits._replace(train=_select(splits.train, index), train_labels=kept)


def _select(dataset: Dataset, index: np.ndarray) -> Dataset:
    if isinstance(dataset, TensorDataset):
        return TensorDataset(*dataset[index])
    return Subset(dataset, index.tolist())
