"""Every experiment runs, draws and says what its rows show; the pages that are kept say what their rows show."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from slow import all_but
from torch.utils.data import TensorDataset

from train.datasets import Splits

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "experiments"
sys.path.insert(0, str(FOLDER))

import lab  # noqa: E402

SHARED = {"lab", "figures", "convnet"}
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)
QUICK = ["evaluation_statistics"]


@pytest.fixture
def fake_cifar10(monkeypatch):
    """Images that look like nothing, in the place of CIFAR-10."""
    generator = torch.Generator().manual_seed(0)

    def part(count):
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return TensorDataset(images, torch.arange(count) % 10)

    splits = Splits(part(5000), part(1000), [index % 10 for index in range(5000)])
    monkeypatch.setattr(lab, "cifar10", lambda root, download=False: splits)


@pytest.mark.parametrize("name", all_but(QUICK, NAMES))
def test_an_experiment_runs_draws_and_says_what_its_rows_show(name, fake_cifar10, tmp_path):
    experiment = importlib.import_module(name)
    rows = [row for job in experiment.jobs(range(2), quick=True) for row in experiment.run(job)]
    facts = {"device": "a device", "torch": "2", "commit": "abc", "date": "2026-01-02", "minutes": "1.5"}
    lab.append_rows(tmp_path / "rows.csv", [{**row, **facts} for row in rows])
    lab.publish(experiment, name, lab.read_rows(tmp_path / "rows.csv"), tmp_path)
    page = (tmp_path / f"{name}.md").read_text()
    assert page.startswith("# ")
    assert "holds" in page or "does not hold" in page
    assert "2 seeds" in page
    for axes in experiment.draw(lab.read_rows(tmp_path / "rows.csv")).axes:
        assert axes.get_xlabel() or not len(axes.get_xticks()) or axes.get_xticklabels()[0].get_text()


@pytest.mark.parametrize("path", sorted(lab.ROWS.glob("*.csv")), ids=lambda path: path.stem)
def test_a_page_says_what_its_rows_show(path):
    experiment = importlib.import_module(path.stem)
    rows = lab.read_rows(path)
    assert len(lab.levels(rows, "seed")) >= 5
    assert "dirty" not in rows[0]["commit"]
    assert (lab.PAGES / f"{path.stem}.md").read_text() == lab.page(experiment, path.stem, rows)
    assert (lab.PAGES / f"{path.stem}.png").exists()


def test_the_gallery_shows_every_experiment():
    assert (lab.PAGES / "index.md").read_text() == lab.gallery()
    assert sorted(lab.ORDER) == NAMES


def test_intervals_are_those_of_students_t():
    found = lab.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)
    assert math.isnan(lab.interval([1.0]).half)
    rows = [{"seed": seed, "norm": norm, "x": seed + (norm == "a")} for seed in range(3) for norm in "ab"]
    paired = lab.difference(rows, "x", {"norm": "a"}, {"norm": "b"})
    assert (paired.mean, paired.half, paired.n) == (1, 0, 3)
    assert lab.column(rows, "x", norm="b").mean == 1


def test_a_quick_run_does_not_replace_what_was_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "__main__", importlib.import_module("world_size"))
    monkeypatch.setattr(sys, "argv", ["world_size.py", "--quick"])
    with pytest.raises(SystemExit):
        lab.main()
    assert "name other files with --csv and --pages" in capsys.readouterr().err
