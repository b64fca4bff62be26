"""Class names, their order and the size of the training set belong to a run: its labels keep their meaning."""

import json
import os
from pathlib import Path

import pytest
import torch
from cli import call
from PIL import Image
from ranks import run_ranks
from torch.utils.data import TensorDataset

from train import commands, distenv, identity, run
from train.datasets import Splits, image_name
from train.distenv import Refusal
from train.evaluation import Findings

COLOURS = {"cat": (250, 0, 0), "dog": (0, 250, 0), "owl": (0, 0, 250)}
OTHERS = {"apple": (250, 0, 0), "bird": (250, 0, 0), "pear": (0, 250, 0), "wolf": (0, 0, 250), "Cat": (250, 0, 0)}
RUN = [
    *("data=imagefolder", "data.num_classes=3", "data.image_size=8", "data.train_transforms=[]"),
    *("data.eval_transforms=[]", "data.num_workers=0", "data.val_fraction=0", "data.global_batch_size=6"),
    *("model=mlp", "model.widths=[16]", "optimizer.lr_per_256=4", "trainer=cpu", "trainer.max_epochs=20"),
    *("logger=none", "callbacks.progress=null", "trainer.log_every_n_steps=1"),
]
PER_CLASS = 4


def write_images(folder, names):
    """Write images of one colour for each class: what the name says, with a little variation."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            colour = tuple(min(255, part + 3 * number) for part in (COLOURS | OTHERS)[name])
            Image.new("RGB", (8, 8), colour).save(folder / name / f"{number}.png")


def image_folder(root, names):
    for part in ("train", "val"):
        write_images(root / part, names)
    return root


def fit(root, directory, *overrides):
    return run.fit(run.compose([*RUN, f"data.root={root}", f"run_dir={directory}", *overrides]))


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Drawing would take most of the time of a run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("callbacks.draw_curves", "pictures.draw_confusion", "pictures.draw_mistakes"):
            patch.setattr(f"train.{name}", lambda *arguments: None)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The last checkpoint of a run that tells three classes apart."""
    directory = tmp_path_factory.mktemp("trained")
    metrics = fit(image_folder(directory / "images", COLOURS), directory / "run")
    assert metrics["test_correct"] == metrics["test_total"] == 3 * PER_CLASS
    return directory / "run" / "checkpoints" / "last.ckpt"


def evaluated(checkpoint, output, *overrides):
    try:
        call("evaluate", [f"checkpoint={checkpoint}", f"output={output}", *overrides])
    except SystemExit as end:
        raise Refusal(str(end)) from end
    return json.loads((output / "evaluation.json").read_text())


def test_a_checkpoint_stores_the_class_names_and_the_number_of_training_images(trained):
    checkpoint = torch.load(trained, weights_only=True)
    assert checkpoint["classes"] == ["cat", "dog", "owl"]
    assert checkpoint["num_train_images"] == 3 * PER_CLASS


def test_the_number_of_training_images_is_without_those_held_out(tmp_path):
    fit(image_folder(tmp_path / "images", COLOURS), tmp_path / "run", "data.val_fraction=0.25", "trainer.max_epochs=1")
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["num_train_images"] == 9


@pytest.mark.parametrize("names", [["dog", "owl"], ["cat", "owl"], ["owl"], ["cat", "dog", "owl"]])
def test_some_of_the_classes_in_a_val_folder_are_evaluated_by_name(names, trained, tmp_path):
    write_images(tmp_path / "other" / "val", names)
    figures = evaluated(trained, tmp_path / "out", f"data.root={tmp_path}/other")
    assert figures["correct"] == figures["total"] == PER_CLASS * len(names)
    totals = {row["class"]: row["total"] for row in figures["per_class"]}
    assert totals == {name: PER_CLASS * (name in names) for name in COLOURS}


def test_what_a_run_left_out_of_its_train_set_is_not_asked_of_a_val_folder(trained, tmp_path):
    write_images(tmp_path / "other" / "val", ["cat"])
    other = [f"data.root={tmp_path}/other", "data.num_train=9", "data.val_fraction=0.5"]
    assert evaluated(trained, tmp_path / "out", *other)["total"] == PER_CLASS


def test_a_mistake_among_some_of_the_classes_has_the_labels_of_the_run_and_the_name_of_its_file(trained, tmp_path):
    write_images(tmp_path / "val", ["dog", "owl"])
    Image.new("RGB", (8, 8), COLOURS["cat"]).save(tmp_path / "val" / "owl" / "0.png")
    loaded = commands.from_checkpoint(trained, [f"data.root={tmp_path}"])
    identity.match(loaded.data, loaded.classes)
    findings = Findings(3)
    commands.trainer_for(loaded.config, [findings]).test(loaded.model, datamodule=loaded.data, verbose=False)
    assert findings.confusion.tolist() == [[0, 0, 0], [0, 4, 0], [1, 0, 3]]
    assert [(mistake.label, mistake.predicted) for mistake in findings.mistakes] == [(2, 0)]
    assert image_name(loaded.data.test_set, PER_CLASS) == str(tmp_path / "val" / "owl" / "0.png")


def test_class_names_reach_a_terminal_as_they_are(trained, tmp_path, capsys):
    names = ["[red]cat", "do\ng\x1b[31m", ":owl:"]
    checkpoint = torch.load(trained, weights_only=True)
    torch.save({**checkpoint, "classes": names}, tmp_path / "named.ckpt")
    for name, colour in zip(names, COLOURS.values(), strict=True):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / "val" / name / "0.png")
    evaluated(tmp_path / "named.ckpt", tmp_path / "out", f"data.root={tmp_path}")
    call("predict", [f"checkpoint={tmp_path}/named.ckpt", tmp_path / "val"])
    printed = capsys.readouterr().out
    for name in ("[red]cat", r"do\ng\x1b[31m", ":owl:"):
        assert printed.count(name) >= 2
    assert "\x1b" not in printed


def test_evaluation_on_more_devices_is_refused_with_the_command(trained, tmp_path):
    for override in ("trainer.devices=2", "trainer.num_nodes=2"):
        with pytest.raises(
            Refusal, match=rf"{override[:-2]} must be the number of .*, 1, got 2: .*torchrun .*-m train.evaluate"
        ):
            evaluated(trained, tmp_path / "out", override)


def counts_on_rank(checkpoint, root):
    os.environ.update(LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"], TORCHELASTIC_RUN_ID="test")
    loaded = commands.from_checkpoint(checkpoint, [f"data.root={root}"])
    identity.match(loaded.data, loaded.classes)
    findings = Findings(3)
    trainer = commands.trainer_for(loaded.config, [findings])
    try:
        trainer.test(loaded.model, datamodule=loaded.data, verbose=False)
    except Refusal as refusal:
        return str(refusal)
    return findings.confusion.tolist()


def test_two_ranks_count_and_refuse_together(trained, tmp_path):
    write_images(tmp_path / "some" / "val", ["dog", "owl"])
    write_images(tmp_path / "others" / "val", ["bird", "cat"])
    assert run_ranks(2, counts_on_rank, trained, tmp_path / "some") == [[[0, 0, 0], [0, 4, 0], [0, 0, 4]]] * 2
    for rank in run_ranks(2, counts_on_rank, trained, tmp_path / "others"):
        assert "the run has no class bird" in rank


@pytest.mark.parametrize(
    "names, unknown",
    [
        (["apple", "pear"], "apple"),
        (["bird", "cat"], "bird"),
        (["cat", "dog", "owl", "wolf"], "wolf"),
        (["Cat", "dog", "owl"], "Cat"),
        (["apple", "cat", "dog", "owl"], "apple"),
    ],
)
def test_a_class_that_the_run_does_not_have_is_refused_by_name(names, unknown, trained, tmp_path):
    image_folder(tmp_path / "other", names)
    message = rf"the run has no class {unknown}, its classes are cat, dog, owl: rename the class, or .*data.root=DIR"
    with pytest.raises(Refusal, match=message):
        evaluated(trained, tmp_path / "out", f"data.root={tmp_path}/other")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_val_folder_is_refused(trained, tmp_path):
    write_images(tmp_path / "train", COLOURS)
    with pytest.raises(Refusal, match=rf"there is no {tmp_path}/val: images are expected as .*/val/CLASS/\*.jpg"):
        evaluated(trained, tmp_path / "out", f"data.root={tmp_path}")


@pytest.mark.parametrize("number", [2, 4, 1])
def test_the_number_of_classes_of_a_network_cannot_be_overridden(number, trained, tmp_path):
    with pytest.raises(Refusal, match=rf"data.num_classes must be that of the network, 3, got {number}: leave it out"):
        evaluated(trained, tmp_path / "out", f"data.num_classes={number}")


NUMBERS = [str(label) for label in range(4)]


@pytest.mark.parametrize(
    "classes, names, labels",
    [
        (["cat", "dog", "owl"], ["owl", "cat"], [2, 0]),
        (["cat", "dog"], ["cat", "dog"], [0, 1]),
        (["b", "a", "c"], ["a", "b", "c"], [1, 0, 2]),
        (NUMBERS, None, [0, 1, 2, 3]),
        (NUMBERS, ["1", "3"], [1, 3]),
        (["1", "10", "2"], ["10", "2"], [1, 2]),
    ],
)
def test_the_label_of_a_class_is_its_position_in_the_run(classes, names, labels):
    assert identity.labels_in_run(classes, names, len(classes)) == labels


@pytest.mark.parametrize(
    "classes, names, num_classes, message",
    [
        (["cat", "dog"], ["apple", "pear"], 2, "no class apple, its classes are cat, dog"),
        (NUMBERS, ["1", "0", "2", "3"], 4, "must be in the order of the run, 0, 1, 2, 3, got 1, 0, 2, 3"),
        (["1", "2", "10"], ["1", "10", "2"], 3, "must be in the order of the run, 1, 2, 10, got 1, 10, 2"),
        (NUMBERS, ["3", "1"], 2, "must be in the order of the run"),
        (NUMBERS, None, 3, "must have the classes of the run, 0, 1, 2, 3, and this one has 3 classes"),
        (NUMBERS, None, 5, "and this one has 5 classes"),
        (NUMBERS, ["4"], 1, "no class 4"),
        (["cat", "dog"], None, 2, "without class names must have the classes of the run, cat, dog"),
        ([f"c{label}" for label in range(1000)], ["x"], 1, "no class x, its classes are c0, .*, c9 and 990 more: "),
    ],
)
def test_what_cannot_be_matched_is_refused(classes, names, num_classes, message):
    with pytest.raises(Refusal, match=message):
        identity.labels_in_run(classes, names, num_classes)


@pytest.mark.parametrize("number", [3, 11])
def test_a_data_set_without_names_needs_the_number_of_classes_of_the_run(number):
    data = run.instantiate(run.compose(["data=fake", f"data.source.num_classes={number}"]).data)
    identity.match(data, [str(label) for label in range(10)])
    with pytest.raises(Refusal, match=f"and this one has {number} classes"):
        data.setup("test")


def test_a_data_set_in_memory_gets_the_labels_of_the_run():
    images = torch.randn(3, 1, 8, 8)

    def source(root, download):
        part = TensorDataset(images, torch.tensor([0, 1, 1]))
        return Splits(part, part, [0, 1, 1], ["owl", "dog"])

    data = run.instantiate(run.compose([]).data)
    data.source = source
    identity.match(data, ["cat", "dog", "owl"])
    data.setup("test")
    ((_, labels),) = data.test_dataloader()
    assert labels.tolist() == [2, 1, 1]
    assert data.class_names() == ["cat", "dog", "owl"]


def test_a_download_on_one_rank_of_a_node_compares_nothing():
    calls = []

    def source(root, download):
        calls.append(download)
        return Splits(range(2), range(2), classes=["apple", "pear"])

    data = run.instantiate(run.compose([]).data)
    data.source, data.download = source, True
    identity.match(data, ["cat", "dog"])
    data.prepare_data()
    assert calls == [True]
    with pytest.raises(Refusal, match="no class apple"):
        data.setup("test")


def rename(root, names):
    """Rename class folders in both parts; through a temporary name, so that two can be exchanged."""
    for part in ("train", "val"):
        for old in names:
            (root / part / old).rename(root / part / f"{old}.old")
        for old, new in names.items():
            (root / part / f"{old}.old").rename(root / part / new)


def add_an_image(root):
    Image.new("RGB", (8, 8)).save(root / "train" / "cat" / "more.png")


def remove_an_image(root):
    (root / "train" / "owl" / "0.png").unlink()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda root: rename(root, {"cat": "apple"}), "class 0 was cat and is apple"),
        (lambda root: rename(root, {"cat": "wolf"}), "class 0 was cat and is dog"),  # the others are renumbered
        (lambda root: rename(root, {"cat": "apple", "dog": "pear"}), "class 0 was cat and is apple"),
        (lambda root: rename(root, {"owl": "pear"}), "class 2 was owl and is pear"),
        (add_an_image, "there were 12 training images and are 13"),
        (remove_an_image, "there were 12 training images and are 11"),
    ],
)
@pytest.mark.parametrize("way", ["auto", "file", "restart"])
def test_a_run_does_not_go_on_with_other_data(way, change, reason, trained, tmp_path, monkeypatch):
    root = image_folder(tmp_path / "images", COLOURS)
    change(root)
    directory = tmp_path / "run"
    if way == "file":
        resumed = [f"resume={trained}"]
    else:
        (directory / "checkpoints").mkdir(parents=True)
        (directory / "checkpoints" / "last.ckpt").write_bytes(trained.read_bytes())
        resumed = ["resume=auto"] if way == "auto" else []
    files = [directory / "config.yaml", directory / "csv" / "metrics.csv"]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("step,loss\n1,2\n")
    if way == "restart":
        monkeypatch.setattr(distenv, "life", lambda: distenv.Life("2", is_restart=True))
    with pytest.raises(Refusal, match=rf"last.ckpt cannot be continued exactly: {reason}; restore the files"):
        fit(root, directory, *resumed, "trainer.max_epochs=21", "logger=default")
    assert {file.read_text() for file in files} == {"step,loss\n1,2\n"}
    assert not list(directory.glob("**/events.*"))


def test_a_run_goes_on_with_the_same_data_in_another_directory(trained, tmp_path):
    root = image_folder(tmp_path / "images", COLOURS)
    metrics = fit(root, tmp_path / "run", f"resume={trained}", "trainer.max_epochs=21")
    assert metrics["test_total"] == 3 * PER_CLASS
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 42


class Data:
    """What `identity` reads of an ImageData."""

    train_set = range(12)

    def class_names(self):
        return ["cat", "dog"]


@pytest.mark.parametrize("classes", [["cat"], ["cat", "dog", "owl"], ["dog", "cat"], []])
def test_the_first_class_that_differs_is_named(classes):
    label = next(label for label, old in enumerate([*classes, None]) if old != ["cat", "dog", None][label])
    with pytest.raises(Refusal, match=f"class {label} was {[*classes, 'none'][label]} and is "):
        identity.check_unchanged(Path("x.ckpt"), {"classes": classes, "num_train_images": 12}, Data())


def test_a_checkpoint_of_an_earlier_version_is_compared_in_what_it_has():
    identity.check_unchanged(Path("x.ckpt"), {}, Data())
    identity.check_unchanged(Path("x.ckpt"), {"classes": ["cat", "dog"]}, Data())
    with pytest.raises(Refusal, match="class 1 was owl and is dog"):
        identity.check_unchanged(Path("x.ckpt"), {"classes": ["cat", "owl"]}, Data())
