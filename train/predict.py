"""`python -m train.predict checkpoint=FILE IMAGE ...`: print the label and its probability for each image file.

python -m train.predict checkpoint=outputs/RUN/checkpoints/best.ckpt images/*.png
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2.functional import resize, to_image

from train import commands
from train.data import ImageData
from train.datasets import unreadable
from train.distenv import Refusal


def predict(arguments: list[str]) -> None:
    """Print one line for each file: its name, the label and the probability."""
    own, files = commands.options(arguments, {"checkpoint": None})
    if not files:
        raise Refusal("name the image files to predict, as in images/*.png")
    _, model, data, classes = commands.from_checkpoint(Path(own["checkpoint"]))
    model.float()
    for file in files:
        with torch.inference_mode():
            probabilities = model(prepare(read(Path(file), data), data)).softmax(dim=1)[0]
        probability, label = probabilities.max(dim=0)
        print(f"{file}\t{classes[int(label)]}\t{float(probability):.4f}")


def read(path: Path, data: ImageData) -> Image.Image:
    """Return an image file as RGB or greyscale, as the network requires.

    Raises:
        Refusal: the file does not exist or is not an image.
    """
    try:
        with Image.open(path) as file:
            image: Image.Image = file
            if file.mode.startswith("I"):  # 16-bit values, which `convert` would clip at 255
                image = Image.fromarray((np.asarray(file, np.float64) / 257).round().clip(0, 255).astype(np.uint8))
            return image.convert("RGB" if data.collate.image_shape[0] == 3 else "L")
    except FileNotFoundError:
        raise Refusal(f"there is no image {path}") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise unreadable(str(path), error) from error


def prepare(picture: Image.Image, data: ImageData) -> Tensor:
    """Return a batch of one (1, C, H, W), prepared like a test image and resized to the network's input."""
    image = to_image(picture)
    for transform in data.eval_transforms:
        image = transform(image)
    size = list(data.collate.image_shape[1:])
    if list(image.shape[1:]) != size:
        image = resize(image, size, antialias=True)
    images, _ = data.collate([(image, 0)])
    return images


if __name__ == "__main__":
    commands.main(predict, __doc__)
