"""The image files that training, evaluation and prediction use: which ones a folder has, and how they are read.

`read` returns what the file's author saw, as 8-bit RGB or gray pixels: upright, on white where it is transparent, the
first frame of an animation. Colour profiles and gamma are ignored. `decode` returns the same pixels sooner.
"""

import io
import logging
import os
import re
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, ImageOps, JpegImagePlugin, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_image

from train import distenv
from train.distenv import Refusal

EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
RULE = f"images end in {', '.join(EXTENSIONS)}"
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")  # no EPS, for which PIL starts Ghostscript
MODES = {1: "L", 3: "RGB"}  # PIL's names by number of channels
READ_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}  # torchvision's
ORIENTATION, UPRIGHT = 0x0112, 1  # EXIF 2.3, 4.6.4
END_OF_JPEG = b"\xff\xd9"
REDUCTIONS = (8, 4, 2)  # factors at which libjpeg decodes
GAP = 2  # no difference is seen above this `reducing_gap`, says PIL's documentation of `Image.resize`
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
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


def reader(channels: int, decoder: str | None = None) -> Callable[[str], Tensor]:
    """Return the function that reads a file of a number of channels: to pixels, or for a decoder.

    Args:
        decoder: None for `decode`; "pil" for the pixels as PIL decodes them; "torchvision" or "gpu" for `encoded`.

    Raises:
        Refusal: image files cannot have this number, or there is no such decoder.
    """
    if channels not in MODES:
        raise Refusal(f"data.in_channels must be 1 (gray) or 3 (RGB) for image files, got {channels}")
    readers: dict[str, Callable[..., Tensor]] = {"torchvision": encoded, "pil": _with_pil, "gpu": encoded}
    if decoder is not None and decoder not in readers:
        raise Refusal(f"data.decode must be one of {', '.join(readers)}, got {decoder}")
    return partial(decode if decoder is None else readers[decoder], channels=channels)


def read(path: str | Path, channels: int, content: bytes | None = None) -> Image.Image:
    """Return an image file as 8-bit gray (1 channel) or RGB (3 channels), whatever its own mode is.

    The format is that of the content, not of the name. Gray of 12 and 16 bits is scaled to 8.

    Args:
        content: that of the file, if it has been read.

    Raises:
        Refusal: the file does not exist, is damaged or is not an image; or its range of values is unknown.
    """
    try:
        content = _content(path) if content is None else content
        with _opened(content, FORMATS) as file:
            _turn_upright(file)
            return _opaque(_eight_bits(file, printable(str(path)))).convert(MODES[channels])
    except Refusal:
        raise
    except Exception as error:  # PIL raises any exception for a damaged file
        raise unreadable(str(path), error) from error


def decode(path: str, channels: int) -> Tensor:
    """Return the pixels of `read`, (C, H, W) uint8; torchvision decodes plain JPEGs, in less time than PIL.

    Raises:
        Refusal: as `read`.
    """
    image = encoded(path, channels)
    return image if image.ndim > 1 else decoded([image], channels, torch.device("cpu"), [path])[0]


def encoded(path: str, channels: int) -> Tensor:
    """Return the content of a plain JPEG, (bytes,) uint8, for `decoded`; of other files the pixels, (C, H, W) uint8.

    A JPEG is plain if it is complete and upright, and is gray or has the number of channels.

    Raises:
        Refusal: as `read`.
    """
    try:
        content = _content(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if _is_plain_jpeg(content, channels):
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return to_image(read(path, channels, content))


def cropped(content: Tensor, crop: v2.RandomResizedCrop, channels: int, name: str) -> Tensor:
    """Return a random crop of a plain JPEG, resized, (C, H, W) uint8.

    If the crop is much larger than its result, the file is decoded at 1/2, 1/4 or 1/8 of its size, of which a JPEG's
    blocks of 8 x 8 frequencies need fewer: the result is at most 1/GAP of the decoded size.

    Args:
        content: (bytes,) uint8, see `encoded`.
        crop: draws from torch's generator as it would from a decoded image.
        name: of the file, for errors.

    Raises:
        Refusal: the file is damaged.
    """
    with _opened(content.numpy().data, ("JPEG",)) as file:
        width, height = file.size
        box = crop.make_params([file])
        top, left, rows, columns = (box[key] for key in ("top", "left", "height", "width"))
        least = min(rows / crop.size[0], columns / crop.size[1]) / GAP
        factor = next((factor for factor in REDUCTIONS if factor <= least), 1)
        resample = RESAMPLING.get(getattr(crop.interpolation, "value", crop.interpolation))  # a string since 0.29
        if factor == 1 or resample is None or not crop.antialias:
            return crop.transform(decoded([content], channels, torch.device("cpu"), [name])[0], box)
        try:
            file.draft(MODES[channels], (width // factor, height // factor))
            edges = tuple(edge / factor for edge in (left, top, left + columns, top + rows))
            small = file.resize((crop.size[1], crop.size[0]), resample, box=edges)
            return to_image(small.convert(MODES[channels]))
        except Exception as error:  # PIL raises any exception for a damaged file
            raise unreadable(name, error) from error


def decoded(contents: Sequence[Tensor], channels: int, device: torch.device, names: Sequence[str]) -> list[Tensor]:
    """Return JPEGs decoded on a device, each (C, H, W) uint8; a GPU decodes all at once, with nvJPEG.

    A file that torchvision refuses is read by PIL.

    Args:
        contents: each (bytes,) uint8, on the host.
        names: of the files, for errors.

    Raises:
        Refusal: as `read`.
    """
    if not contents:
        return []
    try:
        return decode_jpeg(list(contents), READ_MODES[channels], device=str(device))
    except RuntimeError:
        if len(contents) == 1:
            return [to_image(read(names[0], channels, contents[0].numpy().tobytes())).to(device)]
        return [decoded([content], channels, device, [name])[0] for content, name in zip(contents, names, strict=True)]


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


def _with_pil(path: str, channels: int) -> Tensor:
    return to_image(read(path, channels))


def _content(path: str | Path) -> bytes:
    """Return the bytes of a file; raise OSError for what has none, as opening a pipe would wait for its writer."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is a directory" if stat.S_ISDIR(status.st_mode) else "it is not a regular file")
    if status.st_size == 0:
        raise OSError("it is empty")
    return Path(path).read_bytes()


@contextmanager
def _opened(content: bytes | memoryview, formats: tuple[str, ...]) -> Iterator[ImageFile.ImageFile]:
    """Open an image of which PIL reads the header first, within its limit of pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, which are not used
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=formats) as file:
            yield file


def _is_plain_jpeg(content: bytes, channels: int) -> bool:
    """Return whether torchvision decodes a file to the pixels of PIL; it fills a file that is cut off with gray."""
    if not content.endswith(END_OF_JPEG):
        return False
    try:
        with _opened(content, ("JPEG",)) as file:
            is_upright = file.getexif().get(ORIENTATION, UPRIGHT) == UPRIGHT
            has_mode = file.mode in (
                "L",
                MODES[channels],
            )  # gray in colour is repeated, colour in gray is rounded otherwise
            return type(file) is JpegImagePlugin.JpegImageFile and has_mode and is_upright
    except Exception:  # what PIL raises for a damaged header, or damaged EXIF data
        return False


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
