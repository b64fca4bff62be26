"""Decoders give PIL's pixels or raise as PIL does; files that a device decodes, and batches that are copied ahead."""

import io
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import normalize, to_dtype

from train import images, loader, run, settings
from train.augment import Normalize
from train.distenv import Refusal
from train.samplers import Collate, GlobalBatchSampler, PreparedImages


def smooth(height, width, seed=0):
    """Return a smooth colour image (H, W, 3): noise at an eighth of the size, enlarged."""
    small = np.random.default_rng(seed).integers(256, size=(height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


JPEGS = {
    "4:4:4": lambda image, to: image.save(to, "JPEG", subsampling=0),
    "4:2:2": lambda image, to: image.save(to, "JPEG", subsampling=1),
    "4:2:0": lambda image, to: image.save(to, "JPEG", subsampling=2, quality=30),
    "progressive": lambda image, to: image.save(to, "JPEG", progressive=True),
    "restart markers": lambda image, to: image.save(to, "JPEG", restart_marker_blocks=2),
    "RGB inside": lambda image, to: image.save(to, "JPEG", keep_rgb=True),
    "gray": lambda image, to: image.convert("L").save(to, "JPEG"),
    "CMYK": lambda image, to: image.convert("CMYK").save(to, "JPEG"),
    "upright": lambda image, to: image.save(to, "JPEG", exif=exif(1)),
    "turned": lambda image, to: image.save(to, "JPEG", exif=exif(6)),
    "no such orientation": lambda image, to: image.save(to, "JPEG", exif=exif(99)),
    "a comment": lambda image, to: image.save(to, "JPEG", comment=b"\xff\xd9"),
    "a thumbnail's end": lambda image, to: to.write(jpeg(image) + b"\xff\xd9"),
    "junk behind": lambda image, to: to.write(jpeg(image) + b"junk"),
    "PNG": lambda image, to: image.save(to, "PNG"),
}


def jpeg(image, **options):
    content = io.BytesIO()
    image.save(content, "JPEG", **options)
    return content.getvalue()


def undecodable(image):
    """Return a JPEG file with a whole header, whose Huffman tables are none."""
    content = jpeg(image)
    table = content.index(b"\xff\xc4") + 5
    return content[:table] + b"\xff" * 16 + content[table + 16 :]


def both(path, channels):
    """Return what torchvision's and PIL's decoders make of a file: pixels, or the sentence that refuses it."""
    found = []
    for decoder in (None, "pil"):
        try:
            found.append(images.reader(channels, decoder)(str(path)).as_subclass(torch.Tensor))
        except Refusal as refusal:
            found.append(str(refusal))
    return found


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (48, 33)])
@pytest.mark.parametrize("kind", JPEGS)
def test_decoders_give_equal_pixels(kind, size, channels, tmp_path):
    with (tmp_path / "x.jpg").open("wb") as file:
        JPEGS[kind](smooth(*size), file)
    fast, slow = both(tmp_path / "x.jpg", channels)
    assert torch.equal(fast, slow)
    assert (fast.dtype, fast.shape[0]) == (torch.uint8, channels)


def test_torchvision_decodes_what_it_decodes_like_pil_and_pil_the_rest(tmp_path):
    is_packed = {}
    for kind, save in JPEGS.items():
        with (tmp_path / "x.jpg").open("wb") as file:
            save(smooth(20, 30), file)
        is_packed[kind] = images.encoded(str(tmp_path / "x.jpg"), 3).ndim == 1
    left = {"CMYK", "turned", "no such orientation", "junk behind", "PNG"}
    assert is_packed == {kind: kind not in left for kind in JPEGS}


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_damaged_files_are_refused_by_both_decoders_or_have_equal_pixels(options, tmp_path):
    content, rng, outcomes = jpeg(smooth(40, 56), **options), np.random.default_rng(0), Counter()
    for trial in range(150):
        damaged = bytearray(content)
        first, last = sorted(rng.integers(2, len(content), 2))
        if trial % 3 == 0:
            damaged = damaged[:last] + (b"\xff\xd9" if trial % 2 else b"")
        elif trial % 3 == 1:
            damaged[last] ^= 1 << int(rng.integers(8))
        else:
            damaged[first : first + 4] = rng.bytes(4)
        (tmp_path / "x.jpg").write_bytes(damaged)
        fast, slow = both(tmp_path / "x.jpg", 3)
        assert type(fast) is type(slow), (trial, fast, slow)
        assert fast == slow if isinstance(fast, str) else torch.equal(fast, slow), trial
        outcomes[type(fast)] += 1
    assert min(outcomes.values()) >= 20
    assert len(outcomes) == 2


@pytest.mark.parametrize("size", [(100, 80), (500, 700), (1800, 2400)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_a_small_crop_of_a_large_file_is_nearly_that_of_all_its_pixels(size, interpolation, tmp_path):
    path = str(tmp_path / "x.jpg")
    smooth(*size).save(path, quality=95)
    content, whole = images.encoded(path, 3), images.decode(path, 3)
    crop = v2.RandomResizedCrop((32, 40), scale=(0.5, 1.0), interpolation=interpolation, antialias=True)
    for seed in range(3):
        torch.manual_seed(seed)
        expected, next_draw = crop(whole), torch.rand(1)
        torch.manual_seed(seed)
        found = images.cropped(content, crop, 3, path)
        assert torch.equal(next_draw, torch.rand(1))
        difference = (found.int() - expected.int()).abs()
        is_reduced = min(size) > 100 and interpolation != "nearest"
        assert bool(difference.any()) == is_reduced
        assert difference.float().mean() < 1


def test_a_reduced_file_in_gray_and_a_damaged_one(tmp_path):
    crop = v2.RandomResizedCrop(16, scale=(0.9, 1.0), antialias=True)
    smooth(400, 300).convert("L").save(tmp_path / "x.jpg")
    content = images.encoded(str(tmp_path / "x.jpg"), 1)
    assert images.cropped(content, crop, 1, "x.jpg").shape == (1, 16, 16)
    assert images.cropped(content, crop, 3, "x.jpg").shape == (3, 16, 16)
    (tmp_path / "x.jpg").write_bytes(undecodable(smooth(400, 300)))
    content = images.encoded(str(tmp_path / "x.jpg"), 3)
    assert content.ndim == 1
    with pytest.raises(Refusal, match=r"x.jpg cannot be read \(.*\): replace or remove the file"):
        images.cropped(content, crop, 3, "x.jpg")


def folder(path, count=6, size=(300, 260)):
    """Write two class folders of JPEGs, one of them turned, and a PNG."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            (path / part / name).mkdir(parents=True)
            for number in range(count):
                image = smooth(*size, seed=number)
                image.save(path / part / name / f"{number}.jpg", exif=exif(6 if number == 1 else 1))
            image.save(path / part / name / "z.png")
    return "data=imagefolder", f"data.root={path}", "data.num_classes=2", "data.val_fraction=0", "data.num_workers=0"


def batches(overrides, *more):
    data = run.instantiate(run.compose([*overrides, "data.image_size=16", "data.global_batch_size=4", *more]).data)
    data.setup("fit")
    return [*data.train_dataloader(), *data.test_dataloader()]


def test_files_decoded_on_the_device_give_the_batches_of_the_workers(tmp_path):
    own = folder(tmp_path)
    expected = batches(own, "data.reduce=false")
    assert len(expected) == 5
    assert {images.dtype for images, _ in expected} == {torch.uint8}
    for more in (["data.decode=gpu"], ["data.decode=gpu", "data.num_workers=2"], ["data.decode=pil"]):
        decoded = batches(own, "data.reduce=false", *more)
        for (pixels, labels), (found, found_labels) in zip(expected, decoded, strict=True):
            assert torch.equal(pixels, found)
            assert torch.equal(labels, found_labels)
    reduced = batches(own)
    assert not torch.equal(reduced[0][0], expected[0][0])
    for (pixels, _), (found, _) in zip(expected, reduced, strict=True):
        assert (pixels.int() - found.int()).abs().float().mean() < 3
    for pixels, found in zip(expected[4], reduced[4], strict=True):  # the reduction is for training alone
        assert torch.equal(pixels, found)


def test_a_damaged_file_is_named_wherever_it_is_decoded(tmp_path):
    own = folder(tmp_path)
    path = tmp_path / "train" / "a" / "2.jpg"
    path.write_bytes(undecodable(smooth(300, 260)))
    assert images.encoded(str(path), 3).ndim == 1
    for more in (["data.decode=gpu"], ["data.decode=pil"], ["data.reduce=false"], []):
        with pytest.raises(Refusal, match=r"a/2.jpg cannot be read"):
            batches(own, *more)


def test_a_decoder_that_is_none_and_a_gpu_that_is_none_are_refused(tmp_path):
    own = folder(tmp_path, count=1)
    with pytest.raises(Refusal, match=r"data.decode must be one of torchvision, pil, gpu, got cv2"):
        batches(own, "data.decode=cv2")
    with pytest.raises(Refusal, match=r"data.decode=gpu needs a GPU, and trainer.accelerator is cpu: use torchvision"):
        settings.check_launch(run.compose(["trainer=cpu", *own, "data.decode=gpu"]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.int16])
def test_normalization_is_torchvision_s(dtype):
    pixels = torch.randint(256, (3, 3, 5, 4), dtype=torch.uint8)
    values = to_dtype(pixels, dtype, scale=True)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    own = Normalize(mean, std)
    expected = normalize(to_dtype(values, torch.float32, scale=True), mean, std)
    for given in (values, values.to(memory_format=torch.channels_last), values[:0]):
        found = own(given)
        assert (found.dtype, found.is_contiguous()) == (torch.float32, True)
        torch.testing.assert_close(found, expected[: len(given)], rtol=1e-5, atol=1e-6)
    assert torch.equal(own(values), own(values))
    assert values.equal(to_dtype(pixels, dtype, scale=True))
    assert Normalize([0.5], [0.25])(values).shape == values.shape


class Cuda:
    """Stands for torch.cuda, and records what is done on which stream."""

    def __init__(self):
        self.events = []
        self.current = "main"

    def Stream(self, device):
        return self

    @contextmanager
    def stream(self, stream):
        self.current = "copies"
        yield
        self.current = "main"

    def record_event(self):
        self.events.append(f"recorded on {self.current}")
        return "copied"

    def current_stream(self, device):
        return self

    def wait_event(self, event):
        self.events.append(f"{self.current} waits")


class Copied:
    """Stands for a tensor on a GPU."""

    def __init__(self, cuda, number):
        self.cuda, self.number = cuda, number

    def record_stream(self, stream):
        self.cuda.events.append(f"{self.cuda.current} owns {self.number}")


def test_the_next_batch_is_copied_before_this_one_is_used(monkeypatch):
    cuda = Cuda()
    for name in ("Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))

    def copy(number):
        cuda.events.append(f"copy of {number} on {cuda.current}")
        return Copied(cuda, number), Copied(cuda, number)

    for batch, _ in loader.ahead(range(2), copy, torch.device("cuda")):
        cuda.events.append(f"step {batch.number}")
    taken = [[f"main owns {number}"] * 2 for number in range(2)]
    assert cuda.events == [
        *("copy of 0 on copies", "recorded on copies", "copy of 1 on copies", "recorded on copies"),
        *("main waits", *taken[0], "step 0", "main waits", *taken[1], "step 1"),
    ]
    assert list(loader.ahead([], copy, torch.device("cuda"))) == []


def test_every_batch_is_checked_on_the_host_before_it_is_copied():
    seen = []
    data = PreparedImages(TensorDataset(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.arange(3)))
    sampler = GlobalBatchSampler(3, 2, rank=0, world_size=1, shuffle=False)

    def check(pixels, labels):
        seen.append((pixels.shape, labels.tolist()))
        if 2 in labels:
            raise Refusal("a wrong label")

    options = {"check": check, "device": torch.device("meta"), "batch_sampler": sampler}
    own = iter(loader.ImageLoader(data, Collate((1, 2, 2)), **options))
    pixels, labels = next(own)
    assert pixels.device.type == labels.device.type == "meta"
    with pytest.raises(Refusal, match="a wrong label"):
        next(own)
    assert seen == [((2, 1, 2, 2), [0, 1]), ((1, 1, 2, 2), [2])]
