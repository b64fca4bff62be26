"""`python -m train.predict checkpoint=FILE IMAGE ...`: print the label and its probability for each image file.

python -m train.predict checkpoint=outputs/RUN/checkpoints/best.ckpt images/*.png
python -m train.predict checkpoint=outputs/RUN/checkpoints/best.ckpt DIRECTORY
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_image

from train import commands, images
from train.data import ImageData
from train.distenv import Refusal

Result = TypeVar("Result")


def predict(arguments: list[str]) -> None:
    """Print one line for each file: its name, the label and the probability.

    Raises:
        Refusal: a file could not be read; after the lines of all others.
    """
    own, names = commands.options(arguments, {"checkpoint": None})
    if not names:
        raise Refusal("name the image files to predict, as in images/*.png, or their directory")
    _, model, data, classes = commands.from_checkpoint(Path(own["checkpoint"]))
    model.float()
    read = images.reader(data.collate.image_shape[0])
    failures = 0
    for name in names:
        files = _or_complain(image_files, name)
        failures += files is None
        for file in files or []:
            picture = _or_complain(read, file)
            failures += picture is None
            if picture is not None:
                with torch.inference_mode():
                    probabilities = model(prepare(picture, data)).softmax(dim=1)[0]
                probability, label = probabilities.max(dim=0)
                print(f"{images.printable(file)}\t{images.printable(classes[int(label)])}\t{float(probability):.4f}")
    if failures:
        raise Refusal(f"not every image could be read, {failures} failed: see the lines above")


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


def prepare(picture: Image.Image, data: ImageData) -> Tensor:
    """Return a batch of one (1, C, H, W), prepared like a test image and resized to the network's input."""
    image = to_image(picture)
    for transform in data.eval_transforms:
        image = transform(image)
    size = list(data.collate.image_shape[1:])
    if list(image.shape[1:]) != size:
        image = resize(image, size, antialias=True)
    batch, _ = data.collate([(image, 0)])
    return batch


def _or_complain(step: Callable[[str], Result], name: str) -> Result | None:
    """Return the result of a step, or None after printing why it was refused."""
    try:
        return step(name)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return None


if __name__ == "__main__":
    commands.main(predict, __doc__)
