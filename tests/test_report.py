"""The record of a run: the contents of its files and of its result line."""

import json
import re

import matplotlib.image
import pytest

from train import pictures, report
from train.callbacks import EpochLines, History, Throughput, progress

FIGURES = {
    "test_accuracy": 0.99166,
    "correct": 357,
    "total": 360,
    "epochs": 20,
    "world_size": 2,
    "run_dir": "outputs/x",
}
EPOCHS = [
    {"epoch": n, "train_loss": 1 / n, "val_loss": 2 / n, "train_accuracy": 0.5, "val_accuracy": 0.4} for n in (1, 2, 3)
]


def test_the_result_is_one_line_that_machines_read():
    assert report.result_line(FIGURES) == (
        "RESULT test_accuracy=0.9917 correct=357 total=360 epochs=20 world_size=2 run_dir=outputs/x"
    )


def test_the_report_holds_the_command_every_figure_and_the_curves(tmp_path):
    pictures.draw_curves(EPOCHS, [(0.5, 0.1), (1.0, 0.2)], tmp_path / "curves.png")
    text = report.write_report(
        tmp_path, FIGURES, "python -m train norm=sync", {"commit": "a1"}, "seed: 0\n"
    ).read_text()
    assert "python -m train norm=sync" in text
    assert "| test accuracy | 0.9917 |" in text
    assert "](curves.png)" in text
    assert "| commit | a1 |" in text
    assert "```yaml\nseed: 0\n```" in text
    assert json.loads((tmp_path / "result.json").read_text()) == {**FIGURES, "environment": {"commit": "a1"}}


def test_the_report_of_a_run_without_curves_shows_none(tmp_path):
    assert "curves.png" not in report.write_report(tmp_path, FIGURES, "python -m train", {}, "").read_text()


@pytest.mark.parametrize("epochs", [EPOCHS, EPOCHS[:1], [{"epoch": 1, "train_loss": 2.0, "train_accuracy": 0.1}]])
@pytest.mark.parametrize("rates", [[], [(0.5, 0.1)]])
def test_curves_are_drawn_from_whatever_is_known(epochs, rates, tmp_path):
    path = tmp_path / "curves.png"
    pictures.draw_curves(epochs, rates, path)
    height, width = matplotlib.image.imread(path).shape[:2]
    assert (width, height) == (1950, 1080)


def test_the_table_shows_every_figure(capsys):
    report.print_table(FIGURES)
    shown = capsys.readouterr().out
    assert all(re.search(rf"{name.replace('_', ' ')}\s", shown) for name in FIGURES)


def test_a_resumed_history_continues(tmp_path):
    first, second = History(str(tmp_path)), History(str(tmp_path))
    first.epochs, first.rates = list(EPOCHS), [(1.0, 0.1)]
    second.load_state_dict(first.state_dict())
    assert (second.epochs, second.rates) == (EPOCHS, [(1.0, 0.1)])


def test_no_throughput_is_known_before_the_first_epoch():
    assert Throughput().images_per_second != Throughput().images_per_second


def test_without_a_terminal_the_progress_is_a_line_an_epoch(capsys):
    assert isinstance(progress(), EpochLines)
