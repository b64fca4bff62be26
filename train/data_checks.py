"""Images and labels that contradict the configuration are refused: before the first step, and with every batch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from train.distenv import Refusal


def check_labels(data: Any) -> None:
    """Raise Refusal if the labels or class names of a data set, where they are known, are not those of `num_classes`.

    Args:
        data: an `ImageData` that is set up.
    """
    if data.classes and len(data.classes) != data.num_classes:
        raise Refusal(
            f"data.num_classes is {data.num_classes} and the data set has {len(data.classes)} classes: set "
            f"data.num_classes={len(data.classes)}"
        )
    for dataset in (data.train_set, data.val_set, data.test_set):
        labels = _labels(dataset)
        if labels is not None and len(labels):
            _check_range(labels, data.num_classes)


def check_batch(images: Tensor, labels: Tensor, data: Any, has_fixed_size: bool) -> None:
    """Raise Refusal, on the rank that has the batch, if its images or labels are not those of the configuration.

    Args:
        images: (N, C, H, W), on any device.
        labels: (N,), on the host.
        data: the `ImageData` they come from.
        has_fixed_size: whether H and W must be `data.image_size`.
    """
    channels, height, width = images.shape[1:]
    if channels != data.collate.image_shape[0]:
        raise Refusal(
            f"data.in_channels is {data.collate.image_shape[0]} and the images have {channels} channel(s): set "
            f"data.in_channels={channels}, and data.mean and data.std for as many"
        )
    if has_fixed_size and (height, width) != tuple(data.collate.image_shape[1:]):
        remedy = f"set data.image_size={height}, or " if height == width else ""
        raise Refusal(
            f"data.image_size is {data.collate.image_shape[1]} and the images are {height} x {width} after their "
            f"transforms: {remedy}resize or crop them in data.train_transforms and data.eval_transforms"
        )
    if len(labels):
        _check_range(labels, data.num_classes)


def _check_range(labels: Tensor, num_classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise Refusal(
            f"data.num_classes is {num_classes}, so labels must be 0 to {num_classes - 1}, and the data set has {low} "
            f"to {high}: " + (f"set data.num_classes={high + 1}" if low >= 0 else "number them from 0")
        )


def _labels(dataset: Any) -> Tensor | None:
    """Return the labels of a data set that has them all at hand; otherwise None."""
    if isinstance(dataset, Subset):
        labels = _labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices, dtype=torch.long)]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1]
    targets = getattr(dataset, "targets", None)
    return None if targets is None else torch.as_tensor(targets)
