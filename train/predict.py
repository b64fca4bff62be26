"""`python -m train.predict checkpoint=FILE IMAGE ... [output=FILE.csv] [top_k=5]`: labels and probabilities of images.

Images are files, and directories that are searched. Without an output the lines have the file, the label and its
probability, with tabs between them; with top_k=5 the next labels and probabilities follow.

    python -m train.predict checkpoint=outputs/RUN/checkpoints/best.ckpt images/*.png
    python -m train.predict checkpoint=outputs/RUN/checkpoints/best.ckpt DIRECTORY output=predictions.csv top_k=5
"""

import csv
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_image

from train import commands, images
from train.classifier import exact_float32
from train.commands import Run
from train.data import ImageData
from train.distenv import Refusal


class Prediction(NamedTuple):
    """The most probable labels of an image file with their probabilities, or why it could not be read."""

    file: str
    labels: Sequence[tuple[str, float]] = ()
    error: str = ""


def predict(options: DictConfig, run: Run) -> None:
    """Print one line for each file, or write a CSV file: its name, the labels and their probabilities.

    Raises:
        Refusal: an option is invalid, or a file could not be read; that after the predictions of all others.
    """
    if not options.images:
        raise Refusal("name the image files to predict, as in images/*.png, or their directory")
    for name, limit in (("top_k", len(run.classes)), ("batch_size", None)):
        value = options[name]
        if type(value) is not int or value < 1 or (limit and value > limit):
            raise Refusal(
                f"{name} must be a whole number from 1" + (f" to {limit}" if limit else "") + f", got {value}"
            )
    failures = 0
    with _written(options.output, options.top_k) as write:
        for prediction in predictions(run, list(options.images), options.top_k, options.batch_size):
            failures += bool(prediction.error)
            write(prediction)
    if failures:
        raise Refusal(f"not every image could be read, {failures} failed: see the lines above")


def predictions(run: Run, names: Sequence[str], top_k: int, batch_size: int) -> Iterator[Prediction]:
    """Yield the prediction of every image file, in order.

    Args:
        names: files and directories.
        top_k: number of labels.
        batch_size: images that are read and predicted at once.
    """
    _, model, data, classes = run
    read = images.reader(data.collate.image_shape[0])
    device = torch.device("cuda" if run.config.trainer.accelerator == "gpu" and torch.cuda.is_available() else "cpu")
    model.float().to(device)
    files = (file for name in names for file in _files(name))
    while batch := list(islice(files, batch_size)):
        pictures = [_prepared(file, read, data) for file in batch]
        good = [picture for picture in pictures if isinstance(picture, Tensor)]
        labels: Iterator[list[tuple[str, float]]] = iter(())
        if good:
            with torch.inference_mode(), exact_float32(device):
                values, indices = model(torch.cat(good).to(device)).softmax(dim=1).topk(top_k)
            labels = (
                [(classes[label], value) for label, value in zip(*rows, strict=True)]
                for rows in zip(indices.tolist(), values.tolist(), strict=True)
            )
        for file, picture in zip(batch, pictures, strict=True):
            is_read = isinstance(picture, Tensor)
            yield Prediction(str(file), next(labels)) if is_read else Prediction(str(file), error=str(picture))


def image_files(name: str) -> list[str]:
    """Return the images in a directory and the directories in it; a file is returned as it is.

    Raises:
        Refusal: the directory has no image, or cannot be read.
    """
    if not os.path.isdir(name):
        return [name]
    found = images.search(name)
    images.note_left_out(name, found.left_out, images.RULE)
    if not found.images:
        raise Refusal(f"there is no image in {name}: {images.RULE}")
    return found.images


def prepare(picture: Image.Image | Tensor, data: ImageData) -> Tensor:
    """Return a batch of one (1, C, H, W), prepared like a test image and resized to the network's input."""
    image = to_image(picture)
    for transform in data.eval_transforms:
        image = transform(image)
    size = list(data.collate.image_shape[1:])
    if list(image.shape[1:]) != size:
        image = resize(image, size, antialias=True)
    return data.normalize(image.as_subclass(Tensor)[None])


class _Unreadable(str):
    """The name of a directory that cannot be searched, with the reason."""

    reason: str


def _files(name: str) -> list[str]:
    """Return the images of a file or directory name; of a directory without any, its name with the reason."""
    try:
        return list(image_files(name))
    except Refusal as refusal:
        unreadable = _Unreadable(name)
        unreadable.reason = str(refusal)
        return [unreadable]


def _prepared(file: str, read: Callable[[str], Tensor], data: ImageData) -> Tensor | str:
    """Return an image as a batch of one, or the reason why it cannot be read."""
    if isinstance(file, _Unreadable):
        return file.reason
    try:
        return prepare(read(file), data)
    except Refusal as refusal:
        return str(refusal)


@contextmanager
def _written(output: str | None, top_k: int) -> Iterator[Callable[[Prediction], None]]:
    """Yield the function that writes a prediction: to a CSV file, complete or not at all, or to the terminal."""
    if output is None:
        yield _print
        return
    path = Path(output)
    if path.is_dir():
        raise Refusal(f"output must be a file, but {path} is a directory")
    part = path.with_name(f"{path.name}.part")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            ranks = [f"_{rank}" if rank > 1 else "" for rank in range(1, top_k + 1)]
            writer.writerow(
                ["file", *(f"{name}{rank}" for rank in ranks for name in ("label", "probability")), "error"]
            )

            def write(prediction: Prediction) -> None:
                nonlocal count
                count += 1
                if prediction.error:
                    print(f"error: {prediction.error}", file=sys.stderr)
                cells = [cell for label, value in prediction.labels for cell in (label, f"{value:.6f}")]
                writer.writerow([prediction.file, *(cells or [""] * (2 * top_k)), prediction.error])

            yield write
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(f"{count} images: {path}")


def _print(prediction: Prediction) -> None:
    if prediction.error:
        print(f"error: {prediction.error}", file=sys.stderr)
        return
    cells = [cell for label, value in prediction.labels for cell in (images.printable(label), f"{value:.4f}")]
    print("\t".join([images.printable(prediction.file), *cells]))


if __name__ == "__main__":
    commands.main("predict", predict, __doc__)
