"""The identity of a run's data: the class names, their order, and the number of training images.

A label is the position of its class in the run, so labels of other data mean the same only where the names match.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from train import datasets
from train.data import ImageData
from train.datasets import Splits
from train.distenv import Refusal

SHOWN = 10  # class names in a message


class Relabelled(Subset):
    """A data set whose labels are replaced.

    Args:
        labels: the new label of each label of `dataset`.
    """

    def __init__(self, dataset: Dataset, labels: Sequence[int]) -> None:
        super().__init__(dataset, range(len(dataset)))  # type: ignore[arg-type]
        self.labels = labels

    def __getitem__(self, index: Any) -> Any:
        image, label = self.dataset[index]
        return image, self.labels[int(label)]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Return several samples."""
        return [self[index] for index in indices]


def of(data: ImageData) -> dict[str, Any]:
    """Return what a checkpoint stores of the data that a run is trained on."""
    return {"classes": data.class_names(), "num_train_images": len(data.train_set)}  # type: ignore[arg-type]


def check_unchanged(path: Any, checkpoint: dict[str, Any], data: ImageData) -> None:
    """Raise Refusal if the run of a checkpoint had other training data, on every rank that finds it so.

    A checkpoint of an earlier version has no number of training images, which is then not compared.
    """
    before, now = checkpoint, of(data)
    reason = None
    for label, (old, new) in enumerate(zip_longest(before.get("classes", now["classes"]), now["classes"])):
        if old != new:
            reason = f"class {label} was {old or 'none'} and is {new or 'none'}"
            break
    else:
        if before.get("num_train_images", now["num_train_images"]) != now["num_train_images"]:
            reason = f"there were {before['num_train_images']} training images and are {now['num_train_images']}"
    if reason is not None:
        raise Refusal(
            f"{path} cannot be continued exactly: {reason}; restore the files of the data set, or start a new run"
        )


def check_number(classes: Sequence[str], num_classes: int) -> None:
    """Raise Refusal if the configuration of a run now has another number of classes than its network."""
    if len(classes) != num_classes:
        raise Refusal(
            f"data.num_classes must be that of the network, {len(classes)}, got {num_classes}: leave it out, as "
            "train.evaluate matches the classes of other data by name"
        )


def match(data: ImageData, classes: Sequence[str]) -> None:
    """Prepare data for testing a run: the test set gets the labels that the run has for its class names.

    The train part of an image folder is not opened. `setup` raises Refusal where the names do not match.

    Args:
        classes: class names of the run, in the order of its labels.
    """
    num_classes = getattr(data.source, "keywords", {}).get("num_classes", data.num_classes)
    data.source = _Matched(data.source, list(classes), num_classes)
    data.val_fraction, data.num_train = 0, None


def labels_in_run(classes: Sequence[str], names: Sequence[str] | None, num_classes: int) -> list[int]:
    """Return the run's label for each label of a data set.

    Args:
        classes: class names of the run, or its class numbers as strings.
        names: class names of the data set, which may be some of the run's; None if it has no names.
        num_classes: number of classes of a data set without names.

    Raises:
        Refusal: a class is unknown; class numbers are in another order; without names, the number of classes differs.
    """
    has_numbers = list(classes) == [str(label) for label in range(len(classes))]
    if names is None:
        if not has_numbers or num_classes != len(classes):
            raise Refusal(
                f"a data set without class names must have the classes of the run, {_shown(classes)}, and this one has "
                f"{num_classes} classes: test on the data set of the run"
            )
        return list(range(num_classes))
    known = {name: label for label, name in enumerate(classes)}
    for name in names:
        if name not in known:
            raise Refusal(
                f"the run has no class {name}, its classes are {_shown(classes)}: rename the class, or name another "
                "directory with data.root=DIR"
            )
    labels = [known[name] for name in names]
    if all(name.isdecimal() for name in names) and labels != sorted(labels):
        raise Refusal(
            f"class numbers must be in the order of the run, {_shown(classes)}, got {_shown(names)}: a number that "
            "depends on the order names no class"
        )
    return labels


class _Matched:
    """A source whose test set has the labels of a run; the train set is the test set, for lack of use."""

    def __init__(self, source: Callable[..., Splits], classes: list[str], num_classes: int) -> None:
        self.source = source
        self.classes = classes
        self.num_classes = num_classes

    def __call__(self, root: str | None, download: bool = False) -> Splits:
        if download:  # on one rank of a node, so that a refusal must wait for the call without it
            return self.source(root=root, download=True)
        splits = _test_splits(self.source, root)
        labels = labels_in_run(self.classes, splits.classes, self.num_classes)
        is_same = labels == list(range(len(labels)))
        test = splits.test if is_same else Relabelled(splits.test, labels)
        return Splits(test, test, classes=self.classes)


def _test_splits(source: Callable[..., Splits], root: str | None) -> Splits:
    """Return the splits of a source; of an image folder only the test set, which needs no train folder beside it."""
    if getattr(source, "func", source) is not datasets.imagefolder:
        return source(root=root, download=False)
    folder = Path(str(root)).resolve() / "val"
    if not folder.is_dir():
        raise Refusal(
            f"there is no {folder}: images are expected as {folder}/CLASS/*.jpg, name another directory with "
            "data.root=DIR"
        )
    in_channels = getattr(source, "keywords", {}).get("in_channels", 3)
    test = datasets.ClassFolders(str(folder), in_channels)
    return Splits(test, test, classes=test.classes)


def _shown(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
