"""What the loggers receive: every figure as often as metrics.csv, grouped names, settings, results and pictures."""

import csv
import json
import shlex
import sys
from typing import ClassVar

import pytest
import torch
from cli import start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train import loggers, run
from train.distenv import Refusal

RUN = ["model=mlp", "model.widths=[16]", "trainer=cpu", "callbacks.progress=null", "trainer.max_epochs=4"]
EPOCH_FIGURES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_top5_accuracy", "images_per_second")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run of 4 epochs with 4 steps each: its first epoch is within the throughput's warm-up."""
    directory = tmp_path_factory.mktemp("run") / "run"
    metrics = run.fit(run.compose([*RUN, f"run_dir={directory}", "data.global_batch_size=330"]))
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    with (directory / "csv" / "metrics.csv").open(newline="") as file:
        return directory, metrics, events, list(csv.DictReader(file))


def test_every_figure_has_as_many_points_in_tensorboard_as_in_the_csv_file(written):
    _, _, events, rows = written
    columns = [column for column in rows[0] if column not in ("step", "epoch")]
    assert set(EPOCH_FIGURES) < set(columns)
    for column in columns:
        points = [float(row[column]) for row in rows if row[column]]
        found = [event.value for event in events.Scalars(loggers.grouped(column))]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(points), equal_nan=True)
    for column in EPOCH_FIGURES:
        assert sum(bool(row[column]) for row in rows) == 4, column
    assert {name.partition("/")[0] for name in events.Tags()["scalars"]} == {"train", "val", "test", "result", "epoch"}


def test_the_settings_the_results_and_the_pictures_are_in_tensorboard(written):
    directory, metrics, events, _ = written
    assert set(events.Tags()["images"]) == {"report/curves", "report/confusion", "report/mistakes"}
    (found,) = events.Scalars("result/test_accuracy")
    assert found.value == pytest.approx(metrics["test_accuracy"])
    content = b"".join(path.read_bytes() for path in (directory / "tensorboard").iterdir())
    assert b"_hparams_/session_start_info" in content
    assert b"optimizer.lr_per_256" in content


def test_the_report_has_units_the_bn_batch_and_a_figure_of_the_five_best(written):
    directory, metrics, _, _ = written
    text = (directory / "report.md").read_text()
    assert "| BN batch | 330 | images that share batch statistics |" in text
    rows = [line.split("|") for line in text.split("| | | unit |")[1].split("\n\n")[0].splitlines()[2:]]
    assert len(rows) > 15
    assert all(row[3].strip() for row in rows)
    result = json.loads((directory / "result.json").read_text())
    assert result["bn_batch"] == 330
    assert metrics["val_accuracy"] < metrics["val_top5_accuracy"] == result["val_top5_accuracy"] <= 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_whose_package_is_missing_is_refused_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Exception, match=f"logger={name} needs the package {name} .*: pip install {name}") as caught:
        run.fit(run.compose([*RUN, f"logger={name}", f"run_dir={tmp_path}/run"]))
    assert any(isinstance(error, Refusal) for error in (caught.value, caught.value.__cause__))
    assert not (tmp_path / "run").exists()


class FakeRun:
    """What Lightning's class and ours use of a run of wandb."""

    def __init__(self, **options):
        self.options, self.logged = options, []
        self.id = options["id"]

    def log(self, metrics, step=None, **options):
        self.logged.append(metrics)

    def define_metric(self, *arguments, **options):
        pass

    class config:
        known: ClassVar[dict] = {}

        @classmethod
        def update(cls, params, **options):
            cls.known.update(params)


def test_wandb_gets_the_metrics_and_a_resumed_run_continues_under_its_id(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(loggers, "_require", lambda module, package: None)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)

    class Connected(loggers.WandB):
        @property
        def experiment(self):
            if not runs or runs[-1].id != self.options["id"]:
                runs.append(FakeRun(**self.options))
            return runs[-1]

        def log_image(self, key, images, **options):
            runs[-1].logged.append({key: images})

    monkeypatch.setattr(loggers, "WandB", Connected)
    chosen = ["logger=wandb", f"run_dir={tmp_path}/run", "trainer.max_epochs=1"]
    run.fit(run.compose([*RUN, *chosen]))
    names = {name for metrics in runs[0].logged for name in metrics}
    assert {"val_loss", "lr", "result/test_accuracy", "report/confusion"} <= names
    assert runs[0].config.known["model.widths"] == [16]
    (first,) = runs
    run.fit(run.compose([*RUN, *chosen, "trainer.max_epochs=2", "resume=auto"]))
    assert [made.id for made in runs] == [first.id]


def test_the_command_in_the_report_repeats_the_run_with_its_own_configuration_directory(tmp_path):
    (tmp_path / "my conf" / "trainer").mkdir(parents=True)
    (tmp_path / "my conf" / "trainer" / "mine.yaml").write_text("defaults: [cpu]\nmax_epochs: 1\n")
    overrides = ["trainer=mine", "model=mlp", "model.widths=[16,8]", "logger=none", "hydra.job.name=my"]
    first = start(["-m", "train", "--config-dir", "my conf", *overrides, "run_dir=first"], tmp_path)
    assert first.returncode == 0, first.stderr
    command = (tmp_path / "first" / "report.md").read_text().split("\n\n")[1].strip()
    launcher, *arguments = shlex.split(command)
    assert launcher == "python"
    again = start([argument.replace("run_dir=first", "run_dir=again") for argument in arguments], tmp_path)
    assert again.returncode == 0, again.stderr
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("first", "again")]
    assert results[0]["test_loss"] == results[1]["test_loss"]
    assert results[0]["epochs"] == 1
    assert (tmp_path / "again" / "my.log").exists()
