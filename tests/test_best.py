"""The best checkpoints: of every validation, with their values, wherever the run directory is."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn

from train import run, settings
from train.best import Best
from train.distenv import Refusal

SMALL = [
    *("model=mlp", "model.widths=[16]", "logger=none", "trainer=cpu", "callbacks.progress=null"),
    *("trainer.max_epochs=3", "+trainer.limit_train_batches=4", "+trainer.val_check_interval=0.5"),
]
FROZEN = ["optimizer.lr_per_256=0", "norm=none"]  # all validations are equal, so that the first stays the best


class Values(Callback):
    """Keeps what every validation has measured: (step, accuracy, loss)."""

    seen: list = []  # noqa: RUF012 - a run of the configuration builds its own

    def on_validation_end(self, trainer, pl_module):
        figures = trainer.callback_metrics
        self.seen.append((trainer.global_step, float(figures["val_accuracy"]), float(figures["val_loss"])))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("train.pictures.attempt", lambda *arguments: None)
    monkeypatch.setattr(Values, "seen", [])


def fit(directory, *overrides):
    return run.fit(run.compose([*SMALL, f"run_dir={directory}", *overrides]))


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def best_files(directory):
    return sorted((directory / "checkpoints").glob("best*"), key=step_of)


@pytest.mark.parametrize(
    "overrides, rank, kept",
    [
        ((), lambda row: row[1], 1),
        (("callbacks.best.save_top_k=3",), lambda row: row[1], 3),
        (("callbacks.best.save_top_k=2", *("callbacks.best.monitor=val_loss", "callbacks.best.mode=min")), None, 2),
        (("callbacks.best.save_top_k=-1",), lambda row: row[1], 6),
        (("callbacks.best.save_top_k=0",), lambda row: row[1], 0),
        (("callbacks=ema", "callbacks.best.save_top_k=2"), lambda row: row[1], 2),
    ],
)
def test_the_best_of_all_validations_are_kept_also_of_those_within_an_epoch(overrides, rank, kept, tmp_path):
    fit(tmp_path, *overrides, "+callbacks.values={_target_: test_best.Values}")
    rows = Values.seen
    assert [step for step, *_ in rows] == [2, 4, 6, 8, 10, 12]
    rows = sorted(rows, key=lambda row: (-(rank(row) if rank else -row[2]), row[0]))[:kept]
    files = best_files(tmp_path)
    assert [step_of(path) for path in files] == sorted(step for step, *_ in rows)
    if kept not in (0, 1):
        names = {f"best-step{row[0]}-val_{'accuracy' if rank else 'loss'}{row[1 if rank else 2]:.4f}" for row in rows}
        assert {path.stem for path in files} == names


def stub(values):
    """A trainer that has validated with these values, one after the other."""
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING),
        sanity_checking=False,
        fast_dev_run=False,
        is_global_zero=True,
        global_step=0,
        save_checkpoint=lambda path: path.write_text(""),
        strategy=SimpleNamespace(broadcast=lambda value: value, remove_checkpoint=lambda path: path.unlink()),
    )
    for step, value in enumerate(values, 1):
        trainer.global_step, trainer.callback_metrics = step, {"val_loss": torch.tensor(value)}
        yield trainer


@pytest.mark.parametrize(
    "mode, values, steps",
    [
        ("max", [1.0, 1.0, 2.0, 2.0, 1.5], [3, 4]),  # of equal values the earlier ones
        ("max", [3.0, 2.0, 2.0, 1.0], [1, 2]),
        ("min", [math.nan, 3.0, math.nan, 2.0, 5.0, math.inf], [2, 4]),  # NaN is never the best
        ("min", [-1.0, -2.0, -3.0], [2, 3]),
    ],
)
def test_equal_values_and_nan(mode, values, steps, tmp_path):
    best = Best(str(tmp_path), monitor="val_loss", mode=mode, save_top_k=2)
    for trainer in stub(values):
        best.on_validation_end(trainer, None)
    assert [int(name.split("-")[1].removeprefix("step")) for name in best.kept] == steps
    assert {path.name for path in tmp_path.iterdir()} == set(best.kept)


def test_a_metric_that_is_not_logged_is_named_with_those_that_are(tmp_path):
    best = Best(str(tmp_path), monitor="val_top1")
    for trainer in stub([1.0]):
        with pytest.raises(Refusal, match=r"monitor=val_top1 is not logged: choose one of \['val_loss'\]"):
            best.on_validation_end(trainer, None)


def test_a_run_directory_can_be_moved(tmp_path):
    fit(tmp_path / "old", "callbacks.best.save_top_k=2")
    expected = fit(tmp_path / "old", "callbacks.best.save_top_k=2", "resume=auto", "test_checkpoint=best")
    shutil.move(tmp_path / "old", tmp_path / "new")
    moved = fit(tmp_path / "new", "callbacks.best.save_top_k=2", "resume=auto", "test_checkpoint=best")
    assert moved["test_loss"] == expected["test_loss"]
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_run_that_continues_in_another_directory_keeps_the_best_so_far(is_moved, tmp_path):
    frozen = (*FROZEN, "test_checkpoint=best")
    fit(tmp_path / "one", *frozen)
    (first,) = best_files(tmp_path / "one")
    assert step_of(first) == 2
    source = tmp_path / "one"
    if is_moved:
        source = shutil.move(source, tmp_path / "archive")
    fit(tmp_path / "two", *frozen, f"resume={source}/checkpoints/last.ckpt", "trainer.max_epochs=4")
    shutil.rmtree(source)
    (copy,) = best_files(tmp_path / "two")
    assert step_of(copy) == 2
    fit(tmp_path / "two", *frozen, "resume=auto", "trainer.max_epochs=4")


def test_a_best_checkpoint_that_is_missing_is_forgotten(tmp_path):
    fit(tmp_path / "one", *FROZEN)
    (tmp_path / "one" / "checkpoints" / "best.ckpt").unlink()
    fit(tmp_path / "one", *FROZEN, "trainer.max_epochs=4", "resume=auto", "test_checkpoint=best")
    assert [step_of(path) for path in best_files(tmp_path / "one")] == [14]


@pytest.mark.parametrize(
    "overrides, reason",
    [
        (("callbacks=none",), "callbacks.best is missing: use callbacks=default"),
        (("callbacks.best=null",), "callbacks.best is missing"),
        (("callbacks.best.save_top_k=0",), "callbacks.best.save_top_k is 0: set it to 1"),
        (("+trainer.limit_val_batches=0",), "trainer.limit_val_batches is 0"),
        (("+trainer.fast_dev_run=true",), "trainer.fast_dev_run writes no checkpoint"),
        (("+trainer.check_val_every_n_epoch=30",), "trainer.check_val_every_n_epoch is 30 and trainer.max_epochs 20"),
    ],
)
def test_testing_the_best_is_refused_where_there_can_be_none(overrides, reason):
    settings.check_launch(run.compose(["trainer=cpu", *overrides]))
    with pytest.raises(Refusal, match=f"test_checkpoint=best needs a validated checkpoint, and {reason}"):
        settings.check_launch(run.compose(["trainer=cpu", *overrides, "test_checkpoint=best"]))


@pytest.mark.parametrize(
    "override",
    [
        "callbacks.best.monitor=accuracy",
        "callbacks.best.monitor=val_top1",
        "+callbacks.early={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: loss}",
    ],
)
def test_monitoring_a_metric_that_is_not_logged_is_refused(override):
    rule = r"callbacks.(best|early).monitor must be one of val_accuracy, val_top5_accuracy, val_loss, train_"
    with pytest.raises(Refusal, match=rule):
        settings.check_launch(run.compose(["trainer=cpu", override]))
    own = "+callbacks.own={_target_: test_best.Values}"  # may log the metric
    settings.check_launch(run.compose(["trainer=cpu", override, own]))


@pytest.mark.parametrize("name", ["best-{step}", "a/b"])
def test_the_file_name_is_plain(name):
    with pytest.raises(Refusal, match=r"callbacks.best.filename must be a plain name"):
        Best("x", filename=name)


@pytest.mark.parametrize("name", ["../../.ssh/authorized_keys", "/etc/passwd", "a/b.ckpt", "..", ".", "", "x/"])
def test_a_checkpoint_cannot_name_files_elsewhere(name):
    with pytest.raises(Refusal, match="a best checkpoint must have a plain file name"):
        Best("x").load_state_dict({"kept": {name: 1.0}})
