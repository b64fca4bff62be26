"""The DataLoader of a rank: it checks batches on the host, and has the next one on the GPU before it is needed."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from train import images
from train.datasets import image_name
from train.samplers import Collate, PreparedImages

Batch = tuple[Tensor, Tensor]
Key = tuple[int, int]


class ImageLoader(DataLoader):
    """Yields images (N, C, H, W), bytes as they come from the data set, and labels (N,), both on a device.

    On a GPU the next batch is copied, on a stream of its own, while the network computes with this one.

    Args:
        dataset: images with their transforms.
        collate: stacks them.
        check: called with the images and labels of every batch, the labels on the host; may raise.
        device: of the batches.
        decode_channels: if given, image files are decoded and transformed on the device, to this number of channels,
            and the workers only read them.
        options: those of `DataLoader`.
    """

    def __init__(
        self,
        dataset: PreparedImages,
        collate: Collate,
        *,
        check: Callable[[Tensor, Tensor], None],
        device: torch.device,
        decode_channels: int | None = None,
        **options: Any,
    ) -> None:
        self.prepared, self.stack, self.check, self.device = dataset, collate, check, device
        self.decode_channels = decode_channels
        source: Dataset = dataset if decode_channels is None else _Files(dataset)
        is_pinned = device.type == "cuda" and decode_channels is None  # otherwise the host waits for the copy
        function = collate if decode_channels is None else _collate_files
        super().__init__(source, collate_fn=function, pin_memory=is_pinned, **options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield every batch of this rank."""
        batches = super().__iter__()
        if self.device.type == "cuda":
            return ahead(batches, self.on_device, self.device)
        return map(self.on_device, batches)

    def on_device(self, batch: Any) -> Batch:
        """Return a batch on the device, after its check."""
        if isinstance(batch, FilesBatch):
            images, labels = self.stack(list(zip(self._decoded(batch), batch.labels.tolist(), strict=True)))
        else:
            images, labels = batch
        self.check(images, labels)
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _decoded(self, batch: "FilesBatch") -> Iterator[Tensor]:
        """Yield the transformed images of a batch, on the device; its JPEGs are decoded at once."""
        assert self.decode_channels is not None
        packed = {number: content for number, content in enumerate(batch.contents) if content.ndim == 1}
        names = [image_name(self.prepared.dataset, batch.keys[number][0]) for number in packed]
        pixels = images.decoded(list(packed.values()), self.decode_channels, self.device, names)
        unpacked = dict(zip(packed, pixels, strict=True))
        for number, (content, key) in enumerate(zip(batch.contents, batch.keys, strict=True)):
            image = unpacked[number] if number in unpacked else content.to(self.device, non_blocking=True)
            yield self.prepared.transformed(image, key)


class FilesBatch(NamedTuple):
    """Files that the device decodes: contents or pixels (see `images.encoded`), labels (N,), and their keys."""

    contents: list[Tensor]
    labels: Tensor
    keys: list[Key]


class _Files(Dataset):
    """The images of a data set before their transforms, with their keys."""

    def __init__(self, prepared: PreparedImages) -> None:
        self.prepared = prepared

    def __getitem__(self, key: Key) -> tuple[Tensor, int, Key]:
        return *self.prepared.read(key[0]), key

    def __len__(self) -> int:
        return len(self.prepared)


def _collate_files(samples: list[tuple[Tensor, int, Key]]) -> FilesBatch:
    return FilesBatch(
        [content.as_subclass(Tensor) for content, _, _ in samples],
        torch.tensor([label for _, label, _ in samples], dtype=torch.long),
        [key for _, _, key in samples],
    )


def ahead(batches: Iterable[Any], on_device: Callable[[Any], Batch], device: torch.device) -> Iterator[Batch]:
    """Yield every batch on a GPU; the next one is copied before, on a stream of its own.

    Args:
        on_device: starts the copy of a batch, or the work that makes one, on the current stream.
    """
    stream = torch.cuda.Stream(device)
    ready: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            next_one = on_device(batch), stream.record_event()
        if ready is not None:
            yield _taken(*ready, device)
        ready = next_one
    if ready is not None:
        yield _taken(*ready, device)


def _taken(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """Let the current stream wait for a batch, whose memory then belongs to both streams."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(current)
    return batch
