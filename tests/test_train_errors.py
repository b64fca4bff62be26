"""What a user gets wrong, or what happens to a machine, is one clear sentence and a non-zero exit code."""

import re

import numpy as np
import torch
from cli import TORCHRUN, TRAIN, start
from PIL import Image

SMALL = ["model=mlp", "model.widths=[8]", "logger=csv", "trainer=cpu", "callbacks.progress=null"]
FOLDERS = ["data=imagefolder", "data.image_size=16", "data.num_classes=2", "data.num_workers=1", "data.val_fraction=0"]


def image_folder(root):
    for part in ("train", "val"):
        for number, name in enumerate(("ant", "bee")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng(i).integers(256, size=(40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels // (number + 1)).save(folder / f"{i}.png")
    return root


def prepare(path):
    """Return arguments and the sentence for each mistake."""
    (path / "file").write_text("")
    whole, truncated, empty = (image_folder(path / name) for name in ("whole", "truncated", "empty"))
    for image in (truncated / "train").rglob("*.png"):
        image.write_bytes(image.read_bytes()[:300])
    (empty / "train" / "cat").mkdir()
    (path / "cut.ckpt").write_bytes(b"PK\x03\x04 cut off")
    torch.save({"weights": 1}, path / "foreign.ckpt")
    (path / "full" / "checkpoints").mkdir(parents=True)
    (path / "full" / "checkpoints" / "last.part").symlink_to("/dev/full")
    (path / "no_report").mkdir()
    (path / "no_report" / "report.md").symlink_to("/dev/full")
    (path / "outputs").mkdir()
    return [
        (
            ["data=cifar10", f"data.root={path}/nowhere"],
            r"CIFAR10 is missing or damaged in .*nowhere: add data",
        ),
        (
            [*FOLDERS, f"data.root={path}/nowhere"],
            r"there is no .*/nowhere/train: images are expected as ",
        ),
        (
            [*FOLDERS, f"data.root={truncated}"],
            r"truncated/train/(ant|bee)/\d.png cannot be read \(.*\): replace",
        ),
        ([*FOLDERS, f"data.root={empty}", "data.num_classes=3"], r"every class folder must hold an image: .*cat"),
        ([f"resume={path}/cut.ckpt"], r"cut.ckpt is damaged or not a checkpoint \(.*\): use another one"),
        ([f"resume={path}/foreign.ckpt"], r"foreign.ckpt is not a checkpoint of this trainer"),
        ([f"resume={path}/none.ckpt"], r"finds no checkpoint .*none.ckpt"),
        (["nonsense=1"], r"Could not override 'nonsense'"),
        (["data.num_train=2000"], r"data.num_train must be between 1 and the 1437 images there are, got 2000"),
        (["norm=torch_sync"], r"norm=torch_sync needs a GPU for every rank"),
        ([f"run_dir={path}/full"], r"checkpoint .*last.ckpt cannot be written \(No space left on device\): make space"),
        (
            [f"run_dir={path}/no_report", "trainer.max_epochs=1"],
            r"a file of the run cannot be written \(No space left on device\): make space",
        ),
        (["scheduler=steps", "scheduler.milestones=[30,60]"], r"scheduler.milestones must be a rising list of shares"),
        (["trainer.max_epochs=abc"], r"trainer.max_epochs must be a whole number, -1 for no limit, got abc"),
        (["test_checkpoint=frist"], r"test_checkpoint must be last or best, got frist"),
        (
            [f"run_dir={path}/file/run"],
            r"the run directory .*file/run cannot be written \(Not a directory\)",
        ),
        (
            ["optimizer.lr_per_256=1e30", "callbacks.snapshots.every_n_steps=1"],
            r"(the loss \(nan\)|a parameter) is not finite at step \d+: .* last good checkpoint is .*last.ckpt",
        ),
        (["model.order=relu_bn", "norm.activation=relu"], r"set norm.activation=identity"),
        ([*FOLDERS, f"data.root={whole}", "data.global_batch_size=0"], r"every rank must get an image: .* has 0"),
    ]


def test_every_mistake_is_one_sentence_that_says_what_to_do_and_no_traceback(tmp_path):
    for arguments, expected in prepare(tmp_path):
        done = start([*TRAIN, *SMALL, *arguments], tmp_path)
        assert done.returncode == 1, (arguments, done.stderr)
        assert re.search(expected, done.stderr), (arguments, done.stderr)
        assert "Traceback" not in done.stderr, (arguments, done.stderr)
        assert len(done.stderr.splitlines()) <= 8, (arguments, done.stderr)


def test_a_batch_smaller_than_the_number_of_ranks_ends_all_of_them(tmp_path):
    done = start([*TORCHRUN, *TRAIN, *SMALL, "data.global_batch_size=1"], tmp_path, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("error: every rank must get an image: the global batch has 1 and there are 2 ranks") == 1


def test_an_error_of_one_rank_ends_the_others_without_a_traceback(tmp_path):
    root = image_folder(tmp_path / "images")
    broken = root / "train" / "ant" / "0.png"
    broken.write_bytes(broken.read_bytes()[:300])
    images = [*FOLDERS, f"data.root={root}", "data.num_workers=0", "data.global_batch_size=2"]
    done = start([*TORCHRUN, *TRAIN, *SMALL, *images], tmp_path, timeout=120)
    assert done.returncode == 1
    assert f"error: {broken} cannot be read" in done.stderr
    assert "train/__main__" not in done.stderr, done.stderr  # torchrun has lines of its own


def test_a_loss_that_is_not_finite_ends_all_ranks_after_the_same_step(tmp_path):
    diverge = ["optimizer.lr_per_256=1e30", "callbacks.snapshots.every_n_steps=1", "run_name=run"]
    done = start([*TORCHRUN, *TRAIN, *SMALL, *diverge], tmp_path, timeout=60)
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    step = int(re.search(r"after step (\d+)$", error)[1])
    checkpoint = torch.load(tmp_path / "outputs" / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == step
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
