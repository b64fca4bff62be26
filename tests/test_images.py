"""The image reader: kinds of files against arrays written by hand, EXIF, refusals, and which files a folder has."""

import logging
import os
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image, PngImagePlugin
from torchvision.datasets import ImageFolder

from train import images, predict, run
from train.distenv import Refusal

RNG = np.random.default_rng(0)
RGB = RNG.integers(256, size=(3, 6, 3), dtype=np.uint8)
GRAY = RNG.integers(256, size=(3, 6), dtype=np.uint8)
GRAY16 = np.array([[0, 1, 128, 129, 257, 65535], [65534, 32768, 40000, 300, 5, 4095]], np.uint16)
ALPHA = np.array([[0, 255, 128, 0, 255, 1]] * 3, np.uint8)
PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]], np.uint8)
INDEX = np.array([[0, 1, 2, 3, 0, 1]] * 3, np.uint8)
LAB = {  # of sRGB's colours for a D50 white, computed with the matrix on Bruce Lindbloom's page
    (200, 100, 50): (54.22, 38.20, 46.25),
    (40, 120, 90): (45.02, -31.11, 9.11),
    (90, 80, 170): (38.66, 22.73, -47.91),
    (255, 255, 255): (100, 0, 0),
    (119, 119, 119): (50.03, 0, 0),
    (0, 0, 0): (0, 0, 0),
}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, color, rows, *before, after=b""):
    """Return a PNG file; `before` and `after` are chunks around the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    lines = np.frombuffer(rows, np.uint8).reshape(height, -1)
    pixels = zlib.compress(b"".join(b"\0" + line.tobytes() for line in lines))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")


def tiff(width, height, bits, photometric, pixels, samples=1, **tags):
    """Return a little-endian TIFF file of one strip."""
    offset = 8 + len(pixels) + len(pixels) % 2
    per_sample = bits if samples == 1 else offset
    entries = {256: width, 257: height, 258: per_sample, 259: 1, 262: photometric, 273: 8, 277: samples, 278: height}
    entries |= {279: len(pixels)} | {int(tag[1:]): value for tag, value in tags.items()}
    counts = {258: samples}
    packed = [struct.pack("<HHII", tag, 3, counts.get(tag, 1), value) for tag, value in sorted(entries.items())]
    bits_of_samples = struct.pack(f"<{samples}H", *[bits] * samples)
    start = offset + len(bits_of_samples)
    body = pixels.ljust(offset - 8, b"\0") + bits_of_samples
    return b"II*\0" + struct.pack("<I", start) + body + struct.pack("<H", len(packed)) + b"".join(packed) + b"\0" * 4


def bmp_of_4_bits():
    """Return a BMP file of INDEX with 16 colours, bottom row first, rows padded to 4 bytes."""
    colors = b"".join(bytes([*color[::-1], 0]) for color in PALETTE.tolist()) + b"\0" * 48
    rows = b"".join(bytes((row[::2] << 4 | row[1::2]).tolist()) + b"\0" for row in INDEX[::-1])
    info = struct.pack("<IiiHHIIiiII", 40, 6, 3, 1, 4, 0, len(rows), 0, 0, 16, 0)
    return b"BM" + struct.pack("<IHHI", 118 + len(rows), 0, 0, 118) + info + colors + rows


def palette_image(**info):
    image = Image.fromarray(INDEX, mode="P")
    image.putpalette(PALETTE.tobytes())
    return image


def on_white(colors, alpha):
    share = alpha[..., None] / 255
    return colors * share + 255 * (1 - share)


def three(gray):
    return np.repeat(np.asarray(gray)[..., None], 3, axis=2)


def saved(image, **options):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return lambda path: image.save(path, **options)


def written(content):
    return lambda path: path.write_bytes(content)


def frames(**options):
    """Return a writer of an animation whose first frame is RGB and whose second is gray."""
    first, second = Image.fromarray(RGB), Image.new("RGB", (6, 3), "gray")
    return lambda path: first.save(path, save_all=True, append_images=[second], **options)


def in_12_bits(values):
    pairs = np.asarray(values).reshape(-1, 2).astype(int)
    return bytes(byte for a, b in pairs for byte in (a >> 4, (a & 15) << 4 | b >> 8, b & 255))


SMOOTH = np.full((16, 16, 3), (200, 40, 90), np.uint8)
CMYK = RNG.integers(256, size=(3, 6, 4), dtype=np.uint8)
CMYK_AS_RGB = (255.0 - CMYK[..., :3]) * (255.0 - CMYK[..., 3:]) / 255
YCBCR = np.array([[[81, 90, 240], [128, 128, 128], [145, 54, 34], [41, 240, 110]]], np.uint8)
Y, CB, CR = YCBCR.astype(float).transpose(2, 0, 1) - np.array([0, 128, 128])[:, None, None]
YCBCR_AS_RGB = np.stack([Y + 1.402 * CR, Y - 0.344136 * CB - 0.714136 * CR, Y + 1.772 * CB], axis=2).clip(0, 255)
LAB_PIXELS = np.array([[round(lum * 2.55), round(a), round(b)] for lum, a, b in LAB.values()]).astype(np.int8)
RGB16 = RNG.integers(65536, size=(3, 6, 3), dtype=np.uint16)
GRAY_ALPHA16 = np.stack([GRAY.astype(int) * 257, ALPHA.astype(int) * 257], axis=2).astype(">u2")
VALUES12 = np.array([[0, 4095, 2048, 16], [1, 4000, 15, 100]])

# file name: how it is written, the RGB pixels expected, how far rounding and compression may be from them
KINDS = {
    "bilevel.png": (saved(GRAY > 127), three((GRAY > 127) * 255), 0),
    "bilevel.tif": (saved(GRAY > 127, compression="group4"), three((GRAY > 127) * 255), 0),
    "gray.png": (saved(GRAY), three(GRAY), 0),
    "gray_of_2_bits.png": (
        written(png(4, 2, 2, 0, bytes([0b00011011, 0b11100100]))),
        three([[0, 85, 170, 255], [255, 170, 85, 0]]),
        0,
    ),
    "gray_of_16_bits.png": (saved(GRAY16), three(GRAY16 / 257), 0.5),
    "gray_of_16_bits.tif": (saved(GRAY16), three(GRAY16 / 257), 0.5),
    "gray_of_16_bits.pgm": (written(b"P5 6 2 65535\n" + GRAY16.astype(">u2").tobytes()), three(GRAY16 / 257), 0.5),
    "gray_of_10_bits.pgm": (written(b"P2 3 1 1023\n0 512 1023\n"), three([[0, 512 / 1023 * 255, 255]]), 0.51),
    "big_endian.tif": (saved(GRAY16.astype(">u2")), three(GRAY16 / 257), 0.5),
    "gray_of_32_bits.tif": (saved(GRAY16.astype(np.int32)), three(GRAY16 / 257), 0.5),
    "gray_of_12_bits.tif": (written(tiff(4, 2, 12, 1, in_12_bits(VALUES12))), three(VALUES12 / 4095 * 255), 0.5),
    "white_is_zero.tif": (written(tiff(6, 2, 16, 0, GRAY16.tobytes())), three(255 - GRAY16 / 257), 0.5),
    "white_is_zero_of_8_bits.tif": (written(tiff(6, 3, 8, 0, GRAY.tobytes())), three(255 - GRAY), 0),
    "transparent_gray_of_16_bits.png": (
        written(png(6, 2, 16, 0, GRAY16.astype(">u2").tobytes(), chunk(b"tRNS", struct.pack(">H", 40000)))),
        three(np.where(GRAY16 == 40000, 255, GRAY16 / 257)),
        0.5,
    ),
    "transparent_gray.png": (
        saved(GRAY, transparency=int(GRAY[1, 2])),
        three(np.where(np.isin(GRAY, GRAY[1, 2]), 255, GRAY)),
        0,
    ),
    "transparent_bilevel.png": (saved(GRAY > 127, transparency=0), three(np.full((3, 6), 255)), 0),
    "gray_and_alpha.png": (saved(np.stack([GRAY, ALPHA], axis=2)), on_white(three(GRAY), ALPHA), 1),
    "gray_and_alpha.tif": (saved(np.stack([GRAY, ALPHA], axis=2)), on_white(three(GRAY), ALPHA), 1),
    "gray_and_alpha_of_16_bits.png": (
        written(png(6, 3, 16, 4, GRAY_ALPHA16.tobytes())),
        on_white(three(GRAY), ALPHA),
        1,
    ),
    "palette.png": (saved(palette_image()), PALETTE[INDEX], 0),
    "palette.gif": (saved(palette_image()), PALETTE[INDEX], 0),
    "palette_of_4_bits.bmp": (written(bmp_of_4_bits()), PALETTE[INDEX], 0),
    "transparent_palette.gif": (
        saved(palette_image(), transparency=1),
        on_white(PALETTE[INDEX], np.where(INDEX == 1, 0, 255)),
        0,
    ),
    "transparent_palette.png": (
        saved(palette_image(), transparency=bytes([0, 255, 128, 255])),
        on_white(PALETTE[INDEX], np.array([0, 255, 128, 255])[INDEX]),
        1,
    ),
    "color.png": (saved(RGB), RGB, 0),
    "color.ppm": (saved(RGB), RGB, 0),
    "color.bmp": (saved(RGB), RGB, 0),
    "color.webp": (saved(RGB, lossless=True), RGB, 0),
    "color_with_gamma.png": (
        written(png(6, 3, 8, 2, RGB.tobytes(), chunk(b"gAMA", struct.pack(">I", 100000)))),
        RGB,
        0,
    ),
    "color_of_16_bits.png": (written(png(6, 3, 16, 2, RGB16.astype(">u2").tobytes())), RGB16 / 257, 1),
    "color_of_16_bits.tif": (written(tiff(6, 3, 16, 2, RGB16.tobytes(), samples=3)), RGB16 / 257, 1),
    "transparent_color.png": (
        saved(RGB, transparency=tuple(RGB[2, 1].tolist())),
        np.where(np.equal(RGB, RGB[2, 1]).all(axis=2, keepdims=True), 255, RGB),
        0,
    ),
    "alpha.png": (saved(np.dstack([RGB, ALPHA])), on_white(RGB, ALPHA), 1),
    "alpha.tif": (saved(np.dstack([RGB, ALPHA])), on_white(RGB, ALPHA), 1),
    "alpha.webp": (saved(np.dstack([RGB, ALPHA]), lossless=True, exact=True), on_white(RGB, ALPHA), 1),
    "cmyk.tif": (saved(Image.fromarray(CMYK, mode="CMYK")), CMYK_AS_RGB, 1),
    "adobe_cmyk.jpg": (saved(Image.new("CMYK", (16, 16), (0, 200, 100, 50))), np.full((16, 16, 3), (205, 44, 125)), 3),
    "ycbcr.tif": (saved(Image.fromarray(YCBCR, mode="YCbCr")), YCBCR_AS_RGB, 2),
    "lab.tif": (written(tiff(6, 1, 8, 8, LAB_PIXELS.tobytes(), samples=3)), np.array([list(LAB)]), 4),
    "color.jpg": (saved(SMOOTH, quality=95), SMOOTH, 3),
    "progressive.jpg": (saved(SMOOTH, quality=95, progressive=True), SMOOTH, 3),
    "gray.jpg": (saved(SMOOTH[..., 0], quality=95), three(SMOOTH[..., 0]), 3),
    "a_png.jpg": (saved(RGB, format="PNG"), RGB, 0),
    "animated.png": (frames(), RGB, 0),
    "animated.webp": (frames(lossless=True), RGB, 0),
    "animated.gif": (saved(palette_image(), save_all=True, append_images=[Image.new("P", (6, 3))]), PALETTE[INDEX], 0),
    "pages.tif": (frames(), RGB, 0),
    "two_pictures.jpg": (
        saved(SMOOTH, format="MPO", quality=95, save_all=True, append_images=[Image.new("RGB", (16, 16))]),
        SMOOTH,
        3,
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_has_the_pixels_that_were_written(name, tmp_path):
    write, expected, tolerance = KINDS[name]
    write(tmp_path / name)
    color = np.asarray(images.read(tmp_path / name, 3))
    assert (color.dtype, color.shape) == (np.uint8, expected.shape)
    np.testing.assert_allclose(color, expected, rtol=0, atol=tolerance)
    gray = np.asarray(images.read(tmp_path / name, 1))
    assert gray.shape == expected.shape[:2]
    np.testing.assert_allclose(gray, expected @ [0.299, 0.587, 0.114], rtol=0, atol=tolerance + 1)  # ITU-R 601


@pytest.mark.parametrize("channels", [1, 3])
def test_training_evaluation_and_prediction_see_the_same_tensor_of_every_kind(channels, tmp_path):
    for folder in (tmp_path / "train" / "all", tmp_path / "val" / "all"):
        folder.mkdir(parents=True)
        for name, (write, _, _) in KINDS.items():
            write(folder / name)
    of_channels = [f"data.in_channels={channels}", f"data.mean={[0.4] * channels}", f"data.std={[0.2] * channels}"]
    folders = ["data=imagefolder", f"data.root={tmp_path}", "data.num_classes=1", "data.val_fraction=0"]
    same = ["data.train_transforms=${data.eval_transforms}", "data.shuffle=false", "data.num_workers=0"]
    data = instantiate(run.compose([*folders, *of_channels, *same, "data.image_size=16"]).data)
    data.setup("fit")
    trained, tested = (
        torch.cat([data.normalize(batch) for batch, _ in loader])
        for loader in (data.train_dataloader(), data.test_dataloader())
    )
    read = images.reader(channels)
    names = sorted(KINDS)
    predicted = torch.cat([predict.prepare(read(tmp_path / "val" / "all" / name), data) for name in names])
    assert predicted.shape == (len(KINDS), channels, 16, 16)
    assert torch.equal(trained, predicted)
    assert torch.equal(tested, predicted)


UPRIGHT = {  # what EXIF 2.3, 4.6.4 says of row 0 and column 0
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


@pytest.mark.parametrize("suffix, options", [("png", {}), ("tif", {}), ("webp", {"lossless": True})])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_turned_as_their_exif_orientation_says(orientation, suffix, options, tmp_path):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(RGB).save(path, exif=exif(orientation), **options)
    assert np.array_equal(np.asarray(images.read(path, 3)), UPRIGHT[orientation](RGB))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_gray_values_of_16_bits_are_turned_too(orientation, tmp_path):
    Image.fromarray(GRAY16 // 257 * 257).save(tmp_path / "image.png", exif=exif(orientation))
    assert np.array_equal(np.asarray(images.read(tmp_path / "image.png", 1)), UPRIGHT[orientation](GRAY16 // 257))


def test_a_jpeg_is_turned_once_although_its_thumbnail_has_an_orientation_too(tmp_path):
    quarters = np.kron(np.array([[0, 80, 160], [240, 40, 120]]), np.ones((16, 16))).astype(np.uint8)
    with_thumbnail = struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, 6, 0, 26)  # its next directory, at 26, is the thumbnail's
    directories = b"Exif\0\0II*\0" + struct.pack("<I", 8) + with_thumbnail
    directories += struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, 3, 0, 0)
    Image.fromarray(quarters).save(tmp_path / "image.jpg", exif=directories, quality=95)
    found = np.asarray(images.read(tmp_path / "image.jpg", 1)).astype(int)
    np.testing.assert_allclose(found, UPRIGHT[6](quarters), rtol=0, atol=6)


def test_damaged_exif_data_and_metadata_do_not_keep_an_image_from_being_read(tmp_path, recwarn):
    Image.fromarray(SMOOTH).save(tmp_path / "image.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xffrubbish", quality=95)
    np.testing.assert_allclose(np.asarray(images.read(tmp_path / "image.jpg", 3)), SMOOTH, rtol=0, atol=3)
    comment = PngImagePlugin.PngInfo()
    comment.add_text("comment", "x" * 1000)
    Image.fromarray(RGB).save(tmp_path / "image.png", pnginfo=comment)
    assert np.array_equal(np.asarray(images.read(tmp_path / "image.png", 3)), RGB)
    assert not recwarn.list


def cut(path):
    Image.fromarray(RNG.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


REFUSED = {
    "missing.png": (lambda path: None, r"there is no image .*: check the name"),
    "dangling.png": (lambda path: path.symlink_to("nowhere.png"), r"there is no image .* target if it is a link"),
    "loop.png": (lambda path: path.symlink_to(path), r"cannot be read \(Too many levels .*\): replace or remove"),
    "empty.png": (lambda path: path.touch(), r"cannot be read \(it is empty\): replace or remove"),
    "folder.png": (lambda path: path.mkdir(), r"cannot be read \(it is a directory\): replace or remove"),
    "pipe.png": (os.mkfifo, r"cannot be read \(it is not a regular file\): replace or remove"),
    "text.jpg": (lambda path: path.write_text("not an image"), r"cannot be read \(it is none of JPEG, .*\): replace"),
    "postscript.png": (
        lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "none of JPEG",
    ),
    "zeros.bmp": (lambda path: path.write_bytes(bytes(1000)), "cannot be read .*: replace or remove"),
    "signature.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "cannot be read .*: replace or remove"),
    **{
        f"cut.{kind}": (cut, r"cannot be read \(.+\): replace")
        for kind in ("png", "jpg", "gif", "bmp", "ppm", "webp", "tif")
    },
    "float.tif": (
        saved(np.float32([[0, 0.5]])),
        r"whole gray values from 0 to 65535, and has float32 from 0.0 to 0.5: save",
    ),
    "float.ppm": (written(b"Pf 2 1 -1.0\n" + bytes(8)), r"whole gray values from 0 to 65535, and has float32"),
    "large.tif": (
        saved(np.int32([[0, 70000]])),
        r"whole gray values from 0 to 65535, and has int32 from 0 to 70000: save",
    ),
    "negative.tif": (
        saved(np.int32([[-3, 5]])),
        r"whole gray values from 0 to 65535, and has int32 from -3 to 5: save",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_is_refused_in_one_line_with_its_name(name, tmp_path):
    make, sentence = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(Refusal, match=sentence) as caught:
        images.read(tmp_path / name, 3)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused_and_nothing_else(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a damaged header may ask for any size
    write, _, _ = KINDS[name]
    write(tmp_path / name)
    content = np.frombuffer((tmp_path / name).read_bytes(), np.uint8)
    rng = np.random.default_rng(len(content))
    for _ in range(10):
        damaged = content.copy()
        damaged[rng.integers(len(content), size=3)] = rng.integers(256, size=3)
        (tmp_path / name).write_bytes(damaged[: rng.integers(1, 2 * len(content))].tobytes())
        with suppress(Refusal):
            assert images.read(tmp_path / name, 3).mode == "RGB"


@pytest.mark.parametrize("limit", [10, 5])  # PIL warns above its limit and raises above twice the limit
def test_an_image_above_the_pixel_limit_is_refused(limit, tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "image.png")
    images.read(tmp_path / "image.png", 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(Refusal, match=rf"image.png has more than {limit} pixels, PIL's limit: scale it down"):
        images.read(tmp_path / "image.png", 3)


@pytest.fixture
def unprivileged(tmp_path):
    """Root may read everything: become nobody, to whom the folder of the tests is closed."""
    user = os.geteuid()
    Image.fromarray(RGB).save(tmp_path / "image.png")
    (tmp_path / "image.png").chmod(0)
    tmp_path.chmod(0o100 if user else 0)
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)
    tmp_path.chmod(0o700)


def test_what_the_user_may_not_read_is_refused(unprivileged, tmp_path):
    for read in (lambda: images.read(tmp_path / "image.png", 3), lambda: images.search(tmp_path)):
        with pytest.raises(Refusal, match=r"cannot be read \(Permission denied\): give this user the permission"):
            read()


def test_a_number_of_channels_that_files_do_not_have_is_refused():
    with pytest.raises(Refusal, match=r"data.in_channels must be 1 \(gray\) or 3 \(RGB\) for image files, got 4"):
        images.reader(4)


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def relative(paths, root):
    return [os.path.relpath(path, root) for path in paths]


def test_a_folder_is_searched_in_torchvisions_order_without_hidden_files(tmp_path):
    shown = ["b.png", "a.JPG", "z/c.Tiff", "z-1/d.png", "z/y/e.webp", "m.jpg/f.bmp", "ü =1.png", "-x.png"]
    hidden = [".git/a.png", ".ipynb_checkpoints/a.png", "._b.png", ".DS_Store", "Thumbs.db", "__MACOSX/b.png"]
    root = tree(tmp_path / "part", *(f"ant/{name}" for name in [*shown, *hidden, "n.txt", "z/HEIC.heic", "README"]))
    found = images.search(root / "ant")
    assert sorted(relative(found.images, root / "ant")) == sorted(shown)
    assert relative(found.left_out, root / "ant") == ["README", "n.txt", "z/HEIC.heic"]
    for name in hidden:
        (root / "ant" / name).unlink()
    assert found.images == [path for path, _ in ImageFolder(str(root)).samples]


def test_links_are_followed_but_never_around_in_a_circle(tmp_path):
    root = tree(tmp_path, "part/ant/a.png", "part/bee/b.png", "elsewhere/c.png", "elsewhere/deep/d.png")
    (root / "part/ant/more").symlink_to(root / "elsewhere")
    (root / "part/ant/up").symlink_to(root / "part")
    (root / "part/ant/itself").symlink_to(root / "part/ant/itself")
    (root / "elsewhere/back").symlink_to(root / "part/ant")
    (root / "elsewhere/deep/again").symlink_to(root / "elsewhere")
    found = images.search(root / "part/ant")
    assert relative(found.images, root / "part/ant") == ["a.png", "more/c.png", "more/deep/d.png"]
    assert relative(found.left_out, root / "part/ant") == ["itself"]


def test_files_left_out_are_counted_once_and_on_rank_0_alone(tmp_path, caplog, monkeypatch):
    paths = [f"{tmp_path}/{name}" for name in ("a.txt", "b.txt", "c.HEIC", "README", "d.e", "f.g", "h.i", "j.k")]
    monkeypatch.setenv("RANK", "1")
    images.note_left_out(tmp_path, paths, images.RULE)
    assert not caplog.records
    monkeypatch.setenv("RANK", "0")
    for _ in range(2):
        images.note_left_out(tmp_path, paths, images.RULE)
        images.note_left_out(tmp_path, [], images.RULE)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        f"{tmp_path}: 8 left out (2 .txt, 1 .heic, 1 without an extension, 1 .e, 1 .g, ...), the first is "
        f"{tmp_path}/a.txt: images end in .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp, .gif"
    )


def test_a_name_is_printed_in_one_line():
    assert images.printable("a b=ü😀.png") == "a b=ü😀.png"
    assert images.printable("a\nb\t\udcff.png") == r"a\nb\t\udcff.png"
