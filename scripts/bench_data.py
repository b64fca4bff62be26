"""How many images per second do input pipelines make of the same JPEG files, with the same number of workers?

    python scripts/bench_data.py                          # 20 minutes, on an idle machine
    python scripts/bench_data.py --image 640x480 --workers 4

Compared are the trainer's `data=imagefolder` with its decoders, torchvision's reference recipe for classification with
each of its backends, and timm's loader with and without its prefetcher, all of them with RandomResizedCrop(224,
bilinear) and a mirror image in half of the cases. What is timed is the CPU's part of a training run on a GPU: batches
in the form in which they are copied to it. The trainer's and timm's prefetcher normalize there and copy bytes; the
others copy normalized float32. The candidates alternate; a ratio is the median, over the rounds, of a candidate's
images per second divided by those of the fastest candidate that is not ours in the same round.

The files are made here: noise with the spectrum of photographs, as JPEG of quality 90 with 4:2:0 chroma. Before timing
it is checked that the decoders give equal pixels, and that every pipeline delivers every image once, labelled alike,
with normalized values of the same mean and standard deviation.

Rows are appended to benchmarks/data_cpu.csv; docs/training.md has the table.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from train import images, run
from train.augment import Normalize
from train.rng import mix

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZE = 224  # pixels of a crop
CLASSES = 4
DECAY = 1.1  # the amplitude of a photograph falls with the frequency to this power: Torralba & Oliva 2003
THEIRS = ("torchvision", "timm")
DISTINCT = 128  # files; further ones are links to them
SKIPPED_BATCHES = 4  # of each round: the workers start

Batches = Iterable[Any]


class Pipeline(NamedTuple):
    """A pipeline: `epoch(number)` starts one and returns its batches; `normalize` is the device's part, if any."""

    epoch: Callable[[int], Batches]
    normalize: Callable[[Tensor], Tensor]


def photograph(width: int, height: int, seed: int) -> Image.Image:
    """Return noise with the spectrum of a photograph, and channels that correlate like those of one."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    noise = rng.normal(size=(4, height, width)) + 1j * rng.normal(size=(4, height, width))
    planes = np.fft.ifft2(noise / frequency**DECAY).real
    common_plane, *own = (planes - planes.mean((1, 2), keepdims=True)) / planes.std((1, 2), keepdims=True)
    pixels = np.stack([128 + 45 * common_plane + 15 * plane for plane in own], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_files(root: Path, count: int, width: int, height: int) -> int:
    """Write `root/train` and `root/val` with `count` images in class folders each; return the bytes of one set."""
    (root / "val").mkdir(parents=True)
    for label in range(CLASSES):
        folder = root / "train" / f"class{label}"
        folder.mkdir(parents=True)
        (root / "val" / folder.name).symlink_to(folder, target_is_directory=True)
    for number in range(count):
        path = root / "train" / f"class{number % CLASSES}" / f"{number}.jpg"
        if number < DISTINCT:
            photograph(width, height, number).save(path, quality=90)
        else:
            path.hardlink_to(path.with_name(f"{number % DISTINCT}.jpg"))
    return sum(path.stat().st_size for path in root.glob("train/*/*.jpg"))


def ours(root: Path, batch: int, workers: int, decoder: str, reduce: bool = False) -> Pipeline:
    """Return the trainer's own pipeline for training."""
    config = run.compose(
        [
            *("trainer=cpu", "data=imagefolder", f"data.root={root}", f"data.num_classes={CLASSES}"),
            *(f"data.global_batch_size={batch}", f"data.num_workers={workers}", f"data.decode={decoder}"),
            *("data.val_fraction=0", f"data.image_size={SIZE}", f"data.reduce={reduce}"),
        ]
    )
    data = run.instantiate(config.data)
    data.setup("fit")

    def epoch(number: int) -> Batches:
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(number)
        return loader

    return Pipeline(epoch, data.normalize)


def of_torchvision(root: Path, batch: int, workers: int, backend: str) -> Pipeline:
    """Return torchvision's references/classification with --use-v2 and --backend PIL or tensor."""
    crop = v2.RandomResizedCrop(SIZE, antialias=True)
    steps: list[nn.Module] = [crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]
    if backend == "tensor":
        steps = [v2.PILToTensor(), crop, v2.RandomHorizontalFlip()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()]
    dataset = ImageFolder(str(root / "train"), v2.Compose(steps))

    def epoch(number: int) -> Batches:
        generator = torch.Generator().manual_seed(mix(number))
        return DataLoader(dataset, batch, shuffle=True, num_workers=workers, generator=generator)

    return Pipeline(epoch, _same)


def of_timm(root: Path, batch: int, workers: int, use_prefetcher: bool) -> Pipeline:
    """Return timm's create_loader with its transforms for training."""

    def epoch(number: int) -> Batches:
        torch.manual_seed(mix(number))
        loader = timm.data.create_loader(
            timm.data.ImageDataset(str(root / "train")),
            input_size=(3, SIZE, SIZE),
            batch_size=batch,
            is_training=True,
            use_prefetcher=use_prefetcher,
            scale=(0.08, 1.0),
            color_jitter=0.0,
            interpolation="bilinear",
            mean=tuple(MEAN),
            std=tuple(STD),
            num_workers=workers,
            persistent_workers=False,
            pin_memory=False,
            device=torch.device("cpu"),
        )
        return loader.loader if use_prefetcher else loader  # the prefetcher normalizes what its loader copies

    return Pipeline(epoch, Normalize(MEAN, STD) if use_prefetcher else _same)


def candidates(root: Path, batch: int, workers: int) -> dict[str, Pipeline]:
    """Return the compared pipelines by name."""
    return {
        "syncbn": ours(root, batch, workers, "torchvision", reduce=True),
        "syncbn, reduce=false": ours(root, batch, workers, "torchvision"),
        "syncbn, decode=pil": ours(root, batch, workers, "pil"),
        "torchvision, PIL backend": of_torchvision(root, batch, workers, "pil"),
        "torchvision, tensor backend": of_torchvision(root, batch, workers, "tensor"),
        "timm": of_timm(root, batch, workers, use_prefetcher=False),
        "timm, prefetcher": of_timm(root, batch, workers, use_prefetcher=True),
    }


def check(root: Path, pipelines: dict[str, Pipeline]) -> None:
    """Raise AssertionError if the decoders differ, or a pipeline's labels or the distribution of its values."""
    files = sorted(root.glob("train/*/*.jpg"))
    for path in files[:8]:
        assert torch.equal(images.decode(str(path), 3), images.reader(3, "pil")(str(path))), path
    found = {}
    for name, (epoch, normalize) in pipelines.items():
        values, labels = zip(*epoch(0), strict=True)
        counts = torch.cat(labels).bincount(minlength=CLASSES)
        # timm drops the images beyond the last full batch
        assert counts.sum() >= len(files) - len(labels[0]), (name, counts)
        normalized = torch.cat([normalize(batch) for batch in values])
        assert normalized.dtype == torch.float32
        found[name] = torch.stack([normalized.mean(), normalized.std()])
    (first, expected), *others = found.items()
    for name, figures in others:
        assert (figures - expected).abs().max() < 0.05, f"{name}: {figures}, {first}: {expected}"


def images_per_second(batches: Batches) -> float:
    """Return the rate of the batches after the first ones."""
    iterator: Iterator[Any] = iter(batches)
    for _ in range(SKIPPED_BATCHES):
        next(iterator)
    start, count = time.perf_counter(), 0
    for values, _ in iterator:
        count += len(values)
    return count / (time.perf_counter() - start)


def measure(pipelines: dict[str, Pipeline], rounds: int) -> dict[str, list[float]]:
    """Return the images per second of each candidate in every round."""
    found: dict[str, list[float]] = {name: [] for name in pipelines}
    for number in range(rounds):
        turn = list(pipelines.items())
        for name, pipeline in turn[number % len(turn) :] + turn[: number % len(turn)]:
            found[name].append(images_per_second(pipeline.epoch(number + 1)))
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image", type=common.sizes, default=[(500, 375), (1600, 1200)], nargs="+", help="500x375 ...")
    parser.add_argument("--count", type=int, default=1536, help="files, and images of an epoch")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path, default=common.BENCHMARKS / "data_cpu.csv", help="rows are appended there")
    options = parser.parse_args(argv)
    for width, height in options.image:
        with tempfile.TemporaryDirectory() as folder:
            size = write_files(Path(folder), options.count, width, height) / options.count
            pipelines = candidates(Path(folder), options.batch, options.workers)
            check(Path(folder), pipelines)
            found = measure(pipelines, options.rounds)
        others = [rates for name, rates in found.items() if name.startswith(THEIRS)]
        best = [max(turn) for turn in zip(*others, strict=True)]
        rows = []
        for name, rates in found.items():
            ratios = [rate / other for rate, other in zip(rates, best, strict=True)]
            rows.append(
                common.head()
                | {"width": width, "height": height, "kilobytes": size / 1000, "workers": options.workers}
                | {"batch": options.batch, "rounds": options.rounds, "pipeline": name}
                | {"images_per_second": statistics.median(rates), "ratio": statistics.median(ratios)}
                | {"ratio_min": min(ratios), "ratio_max": max(ratios)}
            )
        common.append_rows(options.csv, rows)
        common.print_table(
            f"{options.count} JPEGs of {width} x {height}, {size / 1000:.0f} kB, {options.workers} workers",
            ["pipeline", "images/s", "ratio to the best of the others (range)"],
            [
                [
                    str(row["pipeline"]),
                    f"{row['images_per_second']:.0f}",
                    f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
                ]
                for row in rows
            ],
        )


def _same(images: Tensor) -> Tensor:
    return images


if __name__ == "__main__":
    main()
