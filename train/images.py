"""The image files that training, evaluation and prediction use: which ones a folder has, and how they are read.

`read` returns what the file's author saw, as 8-bit RGB or gray pixels: upright, on white where it is transparent, the
first frame of an animation. Colour profiles and gamma are ignored.
"""

import logging
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from train import distenv
from train.distenv import Refusal

EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
RULE = f"images end in {', '.join(EXTENSIONS)}"
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")  # no EPS, for which PIL starts Ghostscript
MODES = {1: "L", 3: "RGB"}  # PIL's names by number of channels
JUNK = ("__macosx", "thumbs.db", "desktop.ini")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8
KINDS = 5  # extensions that a note names
BITS_PER_SAMPLE, PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO = 258, 262, 0  # TIFF 6.0, section 8

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """The files of a folder and of the folders in it, without hidden ones.

    Attributes:
        images: paths of the files whose extension is an image's.
        left_out: paths of the others.
    """

    images: list[str]
    left_out: list[str]


def reader(channels: int) -> Callable[[str], Image.Image]:
    """Return `read` for a number of channels.

    Raises:
        Refusal: image files cannot have this number.
    """
    if channels not in MODES:
        raise Refusal(f"data.in_channels must be 1 (gray) or 3 (RGB) for image files, got {channels}")
    return partial(read, channels=channels)


def read(path: str | Path, channels: int) -> Image.Image:
    """Return an image file as 8-bit gray (1 channel) or RGB (3 channels), whatever its own mode is.

    The format is that of the content, not of the name. Gray of 12 and 16 bits is scaled to 8.

    Raises:
        Refusal: the file does not exist, is damaged or is not an image; or its range of values is unknown.
    """
    try:
        _check_is_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, which are not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                _turn_upright(file)
                return _opaque(_eight_bits(file, printable(str(path)))).convert(MODES[channels])
    except Refusal:
        raise
    except Exception as error:  # PIL raises any exception for a damaged file
        raise unreadable(str(path), error) from error


def unreadable(name: str, error: Exception) -> Refusal:
    """Return a Refusal that says why an image file cannot be read, and what to do."""
    name = printable(name)
    if isinstance(error, FileNotFoundError):
        return Refusal(f"there is no image {name}: check the name, and its target if it is a link")
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return Refusal(f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels, PIL's limit: scale it down")
    if isinstance(error, PermissionError):
        return Refusal(f"{name} cannot be read ({error.strerror}): give this user the permission to read it")
    if isinstance(error, UnidentifiedImageError):
        reason = f"it is none of {', '.join(FORMATS)}, or of a kind that PIL does not read"
    else:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return Refusal(f"{name} cannot be read ({reason}): replace or remove the file")


def search(folder: str | Path) -> Found:
    """Return the files of a folder and of the folders in it, in the order of torchvision's `ImageFolder`.

    Links are followed, except to a folder that contains the link; no folder is listed twice.

    Raises:
        Refusal: a folder cannot be read.
    """
    files: list[tuple[str, str]] = []
    pending = [str(folder)]
    seen = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    while pending:
        root = pending.pop()
        if os.path.realpath(root) not in seen:
            seen.add(os.path.realpath(root))
            folders, names = visible(root)
            files += [(root, name) for name in names]
            pending += [os.path.join(root, name) for name in reversed(folders)]
    paths = [os.path.join(root, name) for root, name in sorted(files)]
    return Found([path for path in paths if is_image(path)], [path for path in paths if not is_image(path)])


def visible(folder: str | Path) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the files in a folder, sorted, without hidden ones.

    Raises:
        Refusal: the folder cannot be read.
    """
    _, folders, names = next(os.walk(folder, onerror=_refuse_folder))
    shown = [sorted(name for name in kind if not is_hidden(name)) for kind in (folders, names)]
    return shown[0], shown[1]


def printable(name: str) -> str:
    r"""Return a file name in one line: a line break becomes `\n`, and a byte that is not UTF-8 becomes its code."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), name)


def is_image(name: str) -> bool:
    """Return whether a file is taken for an image, by the extension of its name."""
    return name.lower().endswith(EXTENSIONS)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is ignored: it is hidden, or the system's own."""
    return name.startswith(".") or name.lower() in JUNK


def note_left_out(folder: str | Path, paths: Sequence[str], rule: str) -> None:
    """Log the files of a folder that are not used, on rank 0 and once per process."""
    if paths and distenv.rank() == 0:
        kinds = Counter(Path(path).suffix.lower() or "without an extension" for path in paths)
        named = [f"{count} {kind}" for kind, count in kinds.most_common(KINDS)] + ["..."] * (len(kinds) > KINDS)
        _log_once(printable(f"{folder}: {len(paths)} left out ({', '.join(named)}), the first is {paths[0]}: {rule}"))


@cache
def _log_once(sentence: str) -> None:
    log.warning(sentence)


def _refuse_folder(error: OSError) -> NoReturn:
    raise unreadable(str(error.filename), error) from error


def _check_is_file(path: str | Path) -> None:
    """Raise OSError for what is no file with content; opening a pipe would wait for its writer."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is a directory" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")
    if status.st_size == 0:
        raise OSError("it is empty")


def _turn_upright(file: Image.Image) -> None:
    """Turn an image as its EXIF orientation says."""
    file.load()
    with suppress(Exception):  # damaged EXIF data, which do not damage the pixels
        ImageOps.exif_transpose(file, in_place=True)


def _eight_bits(file: Image.Image, name: str) -> Image.Image:
    """Return an image with its gray values of more than 8 bits scaled to 8.

    Raises:
        Refusal: the values are not whole numbers from 0 to 65535, so that white is unknown.
    """
    if not file.mode.startswith(("I", "F")):
        return file
    tags = getattr(file, "tag_v2", {})
    white = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
    values = np.asarray(file)
    if file.mode == "F" or values.min() < 0 or values.max() > white:
        raise Refusal(
            f"{name} must have whole gray values from 0 to {white}, and has {values.dtype} from {values.min()} to "
            f"{values.max()}: save it with 8 or 16 bits"
        )
    scaled = (values * (255 / white)).round().astype(np.uint8)
    if tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        scaled = 255 - scaled
    gray = Image.fromarray(scaled)
    if "transparency" not in file.info:
        return gray
    alpha = np.where(values == file.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (gray, Image.fromarray(alpha)))


def _opaque(image: Image.Image) -> Image.Image:
    """Return an image without transparency, in a mode that PIL converts to RGB.

    Transparent pixels are put on white: their own colour is arbitrary, and no viewer shows it.
    """
    if image.mode == "LAB":
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
        assert converted is not None  # it is None if the conversion is in place
        return converted
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
