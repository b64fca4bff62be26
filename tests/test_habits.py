"""What users are used to: the same command again, more limits, names of any kind, sweeps, and words for mistakes."""

import json
import re
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from cli import TORCHRUN, TRAIN, start
from lightning.pytorch import Callback
from torch.utils.data import Subset, TensorDataset

from train import data_checks, distenv, errors, pictures, report, run, settings
from train.data import ImageData
from train.distenv import Refusal
from train.evaluation import Mistake
from train.mlp import MLP

SMALL = [
    *("model=mlp", "model.widths=[16]", "scheduler=constant", "logger=csv", "trainer=cpu", "callbacks.progress=null"),
    *("trainer.max_epochs=3", "+trainer.limit_train_batches=8", "data.global_batch_size=30"),
]


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    if "pictures" not in request.node.name:
        monkeypatch.setattr("train.pictures.attempt", lambda *arguments: None)


def fit(directory, *overrides):
    metrics = run.fit(run.compose([*SMALL, f"run_dir={directory}", *overrides]))
    checkpoint = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    return metrics, checkpoint, json.loads((directory / "result.json").read_text())


class Budget(Callback):
    """Ends a run after a number of batches."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, *args):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 >= self.batches:
            trainer.should_stop = True


EARLY = "lightning.pytorch.callbacks.EarlyStopping, monitor: val_accuracy, mode: max, min_delta: 1"
LIMITS = {  # each with a higher limit, and with the steps at both
    "epochs": ("trainer.max_epochs=1", "trainer.max_epochs=2", 8, 16),
    "steps": ("+trainer.max_steps=11", "+trainer.max_steps=21", 11, 21),
    "steps in the first epoch": ("+trainer.max_steps=2", "+trainer.max_steps=3", 2, 3),
    "early stopping": (
        f"+callbacks.early={{_target_: {EARLY}, patience: 1}}",
        f"+callbacks.early={{_target_: {EARLY}, patience: 2}}",
        *(16, 24),
    ),
    "a budget": (
        "+callbacks.budget={_target_: test_habits.Budget, batches: 5}",
        "+callbacks.budget={_target_: test_habits.Budget, batches: 13}",
        *(5, 13),
    ),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_run_that_has_ended_stays_ended_until_its_limit_is_raised(limit, tmp_path):
    low, high, steps, more_steps = LIMITS[limit]
    before = fit(tmp_path / "run", low)
    assert before[1]["global_step"] == steps
    again = fit(tmp_path / "run", low, "resume=auto")
    assert again[1]["global_step"] == steps
    assert again[0]["test_loss"] == before[0]["test_loss"]
    assert again[2]["epochs"] == before[2]["epochs"] == -(-steps // 8)
    raised = fit(tmp_path / "run", high, "resume=auto")
    assert raised[1]["global_step"] == more_steps
    whole = fit(tmp_path / "whole", high)
    assert whole[1]["global_step"] == more_steps
    for name, weights in whole[1]["state_dict"].items():
        assert torch.equal(raised[1]["state_dict"][name], weights), name
    assert raised[2]["epochs"] == whole[2]["epochs"]


def test_a_run_that_is_out_of_time_stays_ended_until_it_gets_more(tmp_path):
    time = "+trainer.max_time={seconds: 1}"
    steps = fit(tmp_path, time, "trainer.max_epochs=-1")[1]["global_step"]
    assert fit(tmp_path, time, "trainer.max_epochs=-1", "resume=auto")[1]["global_step"] == steps
    assert (
        fit(tmp_path, "+trainer.max_time={seconds: 2}", "trainer.max_epochs=-1", "resume=auto")[1]["global_step"]
        > steps
    )


def test_a_limit_within_accumulated_batches_ends_the_run_after_the_optimizer_step(tmp_path):
    accumulate = "trainer.accumulate_grad_batches=3"
    budget = "+callbacks.budget={_target_: test_habits.Budget, batches: %d}"
    ended = fit(tmp_path / "run", accumulate, budget % 4)[1]
    assert (ended["global_step"], ended["snapshot"]["batch_idx"]) == (2, 6)
    raised = fit(tmp_path / "run", accumulate, budget % 16, "resume=auto")[1]
    whole = fit(tmp_path / "whole", accumulate, budget % 16)[1]
    assert raised["global_step"] == whole["global_step"] == 6
    for name, weights in whole["state_dict"].items():
        assert torch.equal(raised["state_dict"][name], weights), name


def test_averaged_weights_of_a_run_that_ended_within_an_epoch_are_not_trained_on(tmp_path):
    fit(tmp_path, "callbacks=ema", "+trainer.max_steps=3")
    before = fit(tmp_path, "callbacks=ema", "+trainer.max_steps=3", "resume=auto")
    assert before[1]["global_step"] == 3
    with pytest.raises(Refusal, match="finished run whose weights have become their average: it cannot train on"):
        fit(tmp_path, "callbacks=ema", "+trainer.max_steps=5", "resume=auto")


def test_a_run_without_a_last_epoch_needs_a_schedule_without_one():
    with pytest.raises(Refusal, match=r"train.optim.warmup_cosine needs the number of steps .* scheduler=constant"):
        settings.check_launch(run.compose(["trainer=cpu", "trainer.max_epochs=-1", "+trainer.max_time=00:01:00:00"]))
    for overrides in (["scheduler=constant"], ["+trainer.max_steps=10"]):
        settings.check_launch(run.compose(["trainer=cpu", "trainer.max_epochs=-1", *overrides]))
    with pytest.raises(Refusal, match=r"trainer.max_epochs must be a whole number, -1 for no limit, got null"):
        settings.check(run.compose(["trainer.max_epochs=null"]))


@pytest.mark.parametrize(
    "override, sentence",
    [
        (
            "trainer.devices=2",
            r"trainer.devices must be .* got 2: .* `torchrun --standalone --nproc-per-node=2 -m train",
        ),
        ("trainer.devices='3'", r"trainer.devices must be .* got 3: .*nproc-per-node=3"),
        ("trainer.devices=[0,1]", r"trainer.devices must be .* got \[0, 1\]: .*nproc-per-node=2"),
        ("trainer.devices=auto", "trainer.devices must be .* got auto: leave it out"),
        ("trainer.devices=-1", "trainer.devices must be .* got -1: leave it out"),
        ("trainer.num_nodes=2", r"trainer.num_nodes must be .* got 2: .*torchrun --nnodes=2 .* --nproc-per-node=1"),
        ("trainer.strategy=ddp", r"trainer.strategy must be DDP over the launcher's ranks, got ddp"),
        ("trainer.strategy._target_=lightning.pytorch.strategies.FSDPStrategy", r"trainer.strategy must be DDP over"),
        ("trainer.strategy.accelerator=gpu", "trainer.strategy.accelerator must be that of trainer.accelerator"),
        ("trainer.accelerator=auto", "trainer.accelerator must be gpu or cpu, got auto: use trainer=auto"),
        ("trainer.use_distributed_sampler=true", "must be false, as train.samplers distributes the images"),
        ("trainer.precision=16-mixed", "trainer.precision=16-mixed needs a GPU, .* use trainer.precision=bf16-mixed"),
        ("trainer.precision=16", "trainer.precision=16 needs a GPU"),
        ("model.num_classes=20", "model.num_classes must be that of data.num_classes, which is 10, got 20"),
        ("model.in_channels=3", "model.in_channels must be that of data.in_channels"),
        ("model.image_size=224", "model.image_size must be that of data.image_size"),
        ("data.in_channels=3", None),
        ("data.mean=[0.1,0.2]", r"data.mean must have a value for each of the data.in_channels=1 channels, got \[0.1"),
        ("data.std=[1,2,3]", "data.std must have a value for each"),
    ],
)
def test_what_contradicts_the_launcher_or_the_data_is_refused_with_what_to_do(override, sentence):
    config = run.compose(["trainer=cpu", override])
    if sentence is None:
        settings.check_launch(config)  # the first batch decides
        return
    with pytest.raises(Refusal, match=sentence):
        settings.check_launch(config)


@pytest.mark.parametrize("key", ["seed", "data.seed"])
def test_seeds_are_those_of_numpy(key):
    settings.check(run.compose([f"{key}={2**32 - 1}"]))
    for seed in (2**32, 2**63, 2**64, -1):
        with pytest.raises(
            Refusal, match=rf"^{key} must be (at most 4294967295|a whole number of at least 0), got {seed}"
        ):
            settings.check(run.compose([f"{key}={seed}"]))


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (
            ["data.num_classes=5"],
            "data.num_classes is 5, so labels must be 0 to 4, .* has 0 to 9: set data.num_classes=10",
        ),
        (["data.num_classes=9"], "set data.num_classes=10"),
        (["data.in_channels=3"], r"data.in_channels is 3 and the images have 1 channel\(s\): set data.in_channels=1"),
        (["data.image_size=9"], "data.image_size is 9 and the images are 8 x 8 .*: set data.image_size=8, or resize"),
        (["data.image_size=16"], "data.image_size is 16 .* set data.image_size=8"),
        (
            ["data.eval_transforms=[{_target_: torchvision.transforms.v2.Resize, size: [8, 9]}]"],
            "data.image_size is 8 and the images are 8 x 9 after their transforms: resize or crop",
        ),
    ],
)
def test_images_and_labels_that_the_network_lacks_name_the_key_to_change(overrides, sentence, tmp_path):
    with pytest.raises(Refusal, match=sentence):
        fit(tmp_path, *overrides)


def labelled(*labels):
    return TensorDataset(torch.zeros(len(labels), 1, 2, 2), torch.tensor(labels))


@pytest.mark.parametrize(
    "part, dataset, remedy",
    [
        ("test_set", labelled(0, 3), "set data.num_classes=4"),
        ("val_set", Subset(labelled(0, 7, 5), [0, 2]), "set data.num_classes=6"),
        ("train_set", SimpleNamespace(targets=[1, 2, 3]), "set data.num_classes=4"),
        ("train_set", labelled(-1, 1), "number them from 0"),
    ],
)
def test_the_labels_of_every_part_are_checked_before_training(part, dataset, remedy):
    parts = {name: labelled(0, 1, 2) for name in ("train_set", "val_set", "test_set")}
    data = SimpleNamespace(num_classes=3, classes=None, **parts)
    data_checks.check_labels(data)
    with pytest.raises(Refusal, match=f"data.num_classes is 3, so labels must be 0 to 2, .*{remedy}"):
        data_checks.check_labels(SimpleNamespace(**vars(data) | {part: dataset}))
    with pytest.raises(Refusal, match=r"the data set has 2 classes: set data.num_classes=2"):
        data_checks.check_labels(SimpleNamespace(**vars(data) | {"classes": ["a", "b"]}))


def test_constructors_get_lists_and_dicts(monkeypatch):
    seen = {}
    monkeypatch.setattr(ImageData, "__init__", lambda self, source, **options: seen.update(options))
    run.instantiate(run.compose([]).data)
    assert [type(seen[name]) for name in ("mean", "std", "train_transforms", "eval_transforms")] == [list] * 4
    config = run.compose(["optimizer=adamw", "+optimizer.factory.betas=[0.8,0.9]", "model=mlp"])
    optimizer = run.instantiate(config.optimizer, global_batch_size=1)(torch.nn.Linear(2, 2))
    assert type(optimizer.param_groups[0]["betas"]) in (list, tuple)
    monkeypatch.setattr(MLP, "__init__", lambda self, **options: seen.update(options))
    run.instantiate(config.model, norm_layer=torch.nn.BatchNorm2d)
    assert type(seen["widths"]) is list


@pytest.mark.parametrize(
    "override, nearest",
    [
        ("lr=0.1", r"use optimizer.lr_per_256=0.1"),
        ("learning_rate=0.1", r"use optimizer.lr_per_256=0.1"),
        ("weight_decay=0", r"use optimizer.weight_decay=0"),
        ("trainer.max_epoch=3", r"use trainer.max_epochs=3"),
        ("epochs=3", r"use trainer.max_epochs=3"),
        ("data.batchsize=4", r"use data.global_batch_size=4"),
        ("batch_size=4", r"data.global_batch_size"),
        ("optimiser.lr_per_256=1", r"use optimizer.lr_per_256=1"),
        ("modle=mlp", r"use model=mlp"),
        ("experment=digits", r"use experiment=digits"),
        ("testcheckpoint=best", r"use test_checkpoint=best"),
        ("model.depht=20", r"use model.depth=20"),
        ("callbacks.best.topk=2", r"callbacks.best.save_top_k"),
        ("trainer.max_steps=5", r"it has no value yet, add it with \+trainer.max_steps=5"),
        ("trainer.max_tiem=1", r"use \+trainer.max_time=1"),
        ("xqzw=1", r"there is no such key, `python -m train --cfg job` lists them all"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest_one(override, nearest):
    message = f"Could not override '{override.partition('=')[0]}'.\nTo append to your config use +{override}\n"
    assert re.search(nearest, errors.explain(message, ["scheduler=constant", override]))


@pytest.mark.parametrize(
    "override, nearest",
    [("norm=snyc", "norm=sync"), ("data=cifar", "data=cifar10"), ("model=resnet18", "model=preact_resnet18")],
)
def test_a_misspelt_choice_is_answered_with_the_nearest_one(override, nearest):
    message = f"Could not find '{override.replace('=', '/')}'\n\nAvailable options in 'norm':\n\tgroup\n"
    assert errors.explain(message, [override]).endswith(f"\n\nNearest: {nearest}")


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("+lr=0.1", r"lr: there is no such key, use optimizer.lr_per_256=0.1"),
        ("++epochs=3", r"epochs: there is no such key, use trainer.max_epochs=3"),
        (
            "+optimizer.lr=0.1",
            r"optimizer.lr is no argument of train.optim.build_optimizer: .* use optimizer.lr_per_256=0.1",
        ),
        (
            "+trainer.max_epoch=3",
            r"trainer.max_epoch is no argument of lightning.pytorch.Trainer: .* use trainer.max_epochs=3",
        ),
        (
            "+optimizer.factory.momentun=0",
            r"momentun is no argument of torch.optim.SGD: .* use optimizer.factory.momentum=0",
        ),
        ("+data.batchsize=4", r"data.batchsize is no argument of train.data.ImageData: .*batch_size"),
        ("+callbacks.best.every=4", r"callbacks.best.every is no argument of train.best.Best"),
    ],
)
def test_a_key_that_nothing_reads_is_refused_where_hydra_adds_it(override, sentence):
    with pytest.raises(Refusal, match=sentence):
        settings.check_keys(run.compose([override]))


def test_hydra_s_own_advice_is_replaced_and_other_messages_are_kept(tmp_path):
    done = start([*TRAIN, "lr=0.1"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Could not override 'lr': there is no such key, use optimizer.lr_per_256=0.1")
    assert "+lr" not in done.stderr
    assert errors.explain("something else\n", []) == "something else"


NAMES = ["US$", "a$b$c", r"\frac", "$\\alpha", "{x}", "[red]x[/red]", "100%", "a_b^c", "<b>", "名"]


def test_names_of_any_kind_are_drawn_in_pictures(tmp_path):
    confusion = torch.eye(len(NAMES), dtype=torch.long)
    pictures.draw_confusion(confusion, NAMES, tmp_path / "confusion.png")
    mistakes = [Mistake(0.9, label, 0, torch.zeros(1, 4, 4)) for label in range(len(NAMES))]
    pictures.draw_mistakes(mistakes, NAMES, [0.5], [0.5], tmp_path / "mistakes.png")
    for name in ("confusion.png", "mistakes.png"):
        assert matplotlib.image.imread(tmp_path / name).any()


def test_a_picture_of_few_mistakes_is_as_wide_as_they_are(tmp_path):
    mistakes = [Mistake(0.9, 1, 0, torch.rand(1, 4, 4)) for _ in range(7)]
    shapes = []
    for count in (0, 1, 2, 7):
        pictures.draw_mistakes(mistakes[:count], ["a", "b"], [0.5], [0.5], tmp_path / "mistakes.png")
        image = matplotlib.image.imread(tmp_path / "mistakes.png")
        assert image[..., :3].min() < 0.5, "nothing is drawn"
        shapes.append(image.shape)
    assert shapes[1][1] < 0.7 * shapes[2][1] < 0.5 * shapes[3][1]
    assert shapes[2][0] < 0.7 * shapes[3][0]


def test_values_of_any_kind_are_printed_and_reported(tmp_path, capsys):
    directory = tmp_path / "[red]x[/] |y"
    directory.mkdir(parents=True)
    figures = {"test_accuracy": 0.5, "run_dir": str(directory), "name": "[/]", "smile": ":smile:"}
    report.print_table(figures)
    shown = capsys.readouterr().out.replace("\n", "")
    assert "[/]" in shown
    assert ":smile:" in shown
    text = report.write_report(directory, figures, "python -m train", {}, "").read_text()
    assert r"[red]x[/] \|y |" in text


def test_results_are_there_if_pictures_fail(tmp_path, monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("no font")

    for name in ("callbacks.draw_curves", "pictures.draw_confusion", "pictures.draw_mistakes"):
        monkeypatch.setattr(f"train.{name}", fail)
    _, _, result = fit(tmp_path, "trainer.max_epochs=1")
    assert result["total"] == 360
    assert "confusion.png" not in (tmp_path / "report.md").read_text()
    warnings = [record.message for record in caplog.records if "could not be drawn" in record.message]
    assert [re.search(r"/(\w+).png could not be drawn \(RuntimeError: no font\)", line)[1] for line in warnings] == [
        *("curves", "confusion", "mistakes")
    ]


def test_results_are_there_before_the_pictures(tmp_path, monkeypatch):
    def look(*arguments):
        assert (tmp_path / "report.md").exists()
        assert json.loads((tmp_path / "result.json").read_text())["total"] == 360
        raise KeyboardInterrupt

    monkeypatch.setattr("train.callbacks.draw_curves", lambda *arguments: None)
    monkeypatch.setattr("train.pictures.draw_confusion", look)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, "trainer.max_epochs=1")


SHORT = [*SMALL, "trainer.max_epochs=1"]


def test_a_sweep_goes_on_after_a_job_that_diverges_and_says_which(tmp_path):
    rates = "optimizer.lr_per_256=0.1,1e30,0.2"
    done = start([*TRAIN, "-m", *SHORT, rates, "callbacks.snapshots.every_n_steps=1", "run_name=sweep"], tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(r"job 1 \(.*optimizer.lr_per_256=1e\+30.*\) failed: .* is not finite at step \d", done.stderr)
    assert re.search(r"error: 1 job\(s\) of the sweep failed: 1 \(", done.stderr)
    assert [(tmp_path / "outputs" / "sweep" / str(job) / "result.json").exists() for job in range(3)] == [
        True,
        False,
        True,
    ]


def test_a_changed_directory_keeps_every_printed_path(tmp_path):
    done = start([*TRAIN, *SHORT, "hydra.job.chdir=true", "run_name=run"], tmp_path)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "outputs" / "run"
    assert f"report: {directory}/report.md" in done.stdout
    assert {path.name for path in directory.iterdir()} >= {"checkpoints", "report.md", "result.json", "csv", ".hydra"}
    assert not (directory / "outputs").exists()
    again = start([*TRAIN, *SHORT, "hydra.job.chdir=true", "run_name=run", "resume=auto"], tmp_path)
    assert f"resumed from {directory}/checkpoints/last.ckpt" in again.stdout
    other = [*TRAIN, *SHORT, "hydra.job.chdir=true", "run_name=b", "resume=outputs/run/checkpoints/last.ckpt"]
    assert start(other, tmp_path).returncode == 0


def test_the_torchrun_command_names_ranks_and_nodes():
    assert distenv.torchrun(4) == "torchrun --standalone --nproc-per-node=4 -m train"
    assert distenv.torchrun(4, 2).startswith("torchrun --nnodes=2 ")


def test_ranks_keep_the_best_end_together_and_go_on(tmp_path):
    command = [
        *TORCHRUN,
        *TRAIN,
        *SMALL,
        "run_name=run",
        "callbacks.best.save_top_k=2",
        "+trainer.val_check_interval=3",
    ]
    checkpoints = tmp_path / "outputs" / "run" / "checkpoints"
    for limit, steps in ((7, 7), (10, 10)):
        done = start([*command, f"+trainer.max_steps={limit}", "resume=auto", "test_checkpoint=best"], tmp_path)
        assert done.returncode == 0, done.stderr
        assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == steps
        assert len(list(checkpoints.glob("best-step*"))) == 2


def test_ranks_answer_a_misspelt_key_once(tmp_path):
    done = start([*TORCHRUN, *TRAIN, "lr=0.1"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("use optimizer.lr_per_256=0.1") == 1
