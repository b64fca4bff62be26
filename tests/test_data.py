"""Data modules: disjoint splits, clear errors for missing files, and real files read by torchvision."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from train import datasets, run
from train.distenv import Refusal


def data_module(*overrides):
    data = instantiate(run.compose(list(overrides)).data)
    data.setup("fit")
    return data


def pairs_of(loader, prepare=lambda images: images):
    batches = ((prepare(images), labels) for images, labels in loader)
    return [(image, int(label)) for images, labels in batches for image, label in zip(images, labels, strict=True)]


def test_digits_have_disjoint_stratified_parts_that_no_seed_changes():
    parts = []
    for seed in (0, 1):
        data = data_module(f"seed={seed}", "data.shuffle=false", "data.train_transforms=[]")
        loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        parts.append([pairs_of(loader) for loader in loaders])
        assert [len(part) for part in parts[-1]] == [1293, 144, 360]
    train, val, test = parts[0]
    for part in (train, val, test):
        shares = np.bincount([label for _, label in part], minlength=10) / len(part)
        assert shares == pytest.approx(np.full(10, 0.1), abs=0.015)
    keys = [{image.numpy().tobytes() for image, _ in part} for part in (train, val, test)]
    assert not keys[0] & keys[1]
    assert not (keys[0] | keys[1]) & keys[2]
    for one, other in zip(*parts, strict=True):
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True))


def test_digits_are_normalized_with_the_figures_of_the_file():
    data = data_module("data.train_transforms=[]")
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    images = torch.stack([image for loader in loaders for image, _ in pairs_of(loader, data.normalize)])
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)


def test_without_a_validation_part_all_images_train_and_the_test_set_validates():
    data = data_module("data.val_fraction=0")
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (1437, 360, 360)


def test_the_global_batch_can_be_given_for_each_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert data_module("data.batch_size_per_rank=5").global_batch_size == 15
    assert data_module("data.global_batch_size=16").global_batch_size == 16


def test_a_batch_smaller_than_the_number_of_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    data = data_module("data.global_batch_size=3")
    assert len(data.test_dataloader()) == 1  # any number of ranks may evaluate
    with pytest.raises(
        Refusal, match="every rank must get an image: the global batch has 3 and there are 4 ranks, set"
    ):
        data.check_batch_size()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_missing_files_are_named_with_the_override_that_downloads_them(name, tmp_path):
    with pytest.raises(Refusal, match=rf"is missing or damaged in {tmp_path}: add data.download=true .* data.root=DIR"):
        data_module(f"data={name}", f"data.root={tmp_path}")


def test_a_download_that_fails_says_where_the_files_belong(tmp_path):
    def unreachable(root, train, download):
        raise OSError("no route to host")

    with pytest.raises(Refusal, match=rf"could not be downloaded into {tmp_path} \(no route to host\): put its files"):
        datasets.torchvision_dataset(str(tmp_path), download=True, factory=unreachable)


def image_folder(root, classes=("ant", "bee")):
    for part in ("train", "val"):
        for number, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40 + i, 30), (60 * number, 10, 10)).save(folder / f"{i}.png")
    return f"data.root={root}"


IMAGES = ("data=imagefolder", "data.image_size=16", "data.num_workers=0", "data.val_fraction=0.25")


def test_an_image_folder_is_read_and_brought_to_one_size(tmp_path):
    data = data_module(*IMAGES, image_folder(tmp_path), "data.num_classes=2", "data.global_batch_size=6")
    assert [len(labels) for _, labels in data.train_dataloader()] == [6]
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (8, 3, 16, 16)
    assert labels.tolist() == [0] * 4 + [1] * 4


def test_an_image_folder_says_what_is_not_there(tmp_path):
    with pytest.raises(Refusal, match=rf"no {tmp_path}/train: images are expected as .*/train/CLASS/\*.jpg.*data.root"):
        data_module(*IMAGES, f"data.root={tmp_path}")


def test_a_wrong_number_of_classes_is_refused_with_the_right_one(tmp_path):
    with pytest.raises(Refusal, match=r"num_classes is 1000 .* has 2 class folders: set data.num_classes=2"):
        data_module(*IMAGES, image_folder(tmp_path))


def test_class_folders_that_differ_between_the_parts_are_named(tmp_path):
    root = image_folder(tmp_path)
    (tmp_path / "val" / "bee").rename(tmp_path / "val" / "cat")
    with pytest.raises(Refusal, match=r"val has no class folder bee, but .*train has: give both"):
        data_module(*IMAGES, root, "data.num_classes=2")


def test_parts_too_small_for_every_class_are_refused():
    for override in ("data.num_train=5", "data.val_fraction=0.001"):
        with pytest.raises(Refusal, match=rf"{override.split('=')[0]}=.* every class"):
            data_module(override)


def test_an_empty_class_folder_is_named(tmp_path):
    root = image_folder(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(Refusal, match=r"every class folder must hold an image: .*cat"):
        data_module(*IMAGES, root, "data.num_classes=3")


def test_hidden_files_are_ignored_and_others_that_are_no_images_are_named_once(tmp_path, caplog):
    root = image_folder(tmp_path)
    for name in (".git/config.png", ".ipynb_checkpoints/0.png", "__MACOSX/ant/._0.png", "ant/.DS_Store", "ant/._0.png"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"junk")
    (tmp_path / "train" / "ant" / "wings").mkdir()
    (tmp_path / "train" / "ant" / "0.png").rename(tmp_path / "train" / "ant" / "wings" / "0.PNG")
    for name in ("beside.png", "ant/notes.txt", "bee/wings.heic", "bee/license"):
        (tmp_path / "train" / name).touch()
    for _ in range(2):
        data = data_module(*IMAGES, root, "data.num_classes=2", "data.val_fraction=0", "data.shuffle=false")
    train = tmp_path / "train"
    assert [record.message.split(": images")[0] for record in caplog.records] == [
        f"{train}: 1 left out (1 .png), the first is {train}/beside.png",
        f"{train}: 3 left out (1 .txt, 1 without an extension, 1 .heic), the first is {train}/ant/notes.txt",
    ]
    assert data.classes == ["ant", "bee"]
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 16, 16)
    assert labels.tolist() == [0] * 4 + [1] * 4


def test_a_folder_without_class_folders_is_refused(tmp_path):
    for name in ("train/0.png", "train/.cache/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(Refusal, match=r"there is no class folder in .*train: images are expected as .*/CLASS/\*.jpg"):
        data_module(*IMAGES, f"data.root={tmp_path}")


def test_an_image_folder_has_the_channels_of_the_network(tmp_path):
    root = image_folder(tmp_path)
    gray = data_module(*IMAGES, root, "data.num_classes=2", "data.in_channels=1", "data.mean=[0]", "data.std=[1]")
    images, labels = next(iter(gray.test_dataloader()))
    assert images.shape == (8, 1, 16, 16)
    for label, red in enumerate((0, 60)):
        luma = (0.299 * red + 0.701 * 10) / 255  # ITU-R 601
        assert gray.normalize(images[labels == label]).numpy() == pytest.approx(luma, abs=1 / 255)
    with pytest.raises(Refusal, match=r"data.in_channels must be 1 \(gray\) or 3 \(RGB\) for image files, got 4"):
        data_module(*IMAGES, root, "data.num_classes=2", "data.in_channels=4")


def test_a_configuration_from_before_in_channels_reads_rgb(tmp_path):
    image_folder(tmp_path)
    image, label = datasets.imagefolder(str(tmp_path), num_classes=2).train[0]
    assert (image.shape, label) == ((3, 30, 40), 0)


def test_fake_images_have_the_size_that_was_asked_for():
    data = data_module("data=fake", "data.image_size=24", "data.num_classes=7", "data.source.num_train=40")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (36, 3, 24, 24)  # 40 without the validation part
    assert int(labels.max()) < 7


def cifar10_root():
    candidates = [os.environ.get("CIFAR10_ROOT"), Path(__file__).parents[1] / "data"]
    for root in candidates:
        if root and (Path(root) / "cifar-10-batches-py" / "test_batch").exists():
            return root
    pytest.skip("no CIFAR-10: put cifar-10-batches-py into data/ or name its directory in CIFAR10_ROOT")


def test_cifar10_as_torchvision_reads_it_has_the_figures_of_the_file():
    data = data_module("data=cifar10", f"data.root={cifar10_root()}", "data.train_transforms=[]", "data.val_fraction=0")
    assert (len(data.train_set), len(data.test_set)) == (50_000, 10_000)
    images, _ = next(iter(data.test_dataloader()))
    assert images.shape == (512, 3, 32, 32)
    assert images.mean().item() == pytest.approx(0, abs=0.1)
    assert images.std().item() == pytest.approx(1, abs=0.1)


def test_damaged_cifar10_files_are_refused(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps({}))
    with pytest.raises(Refusal, match="CIFAR10 is missing or damaged"):
        data_module("data=cifar10", f"data.root={tmp_path}")
