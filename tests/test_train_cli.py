"""The trainer as a user starts it: from any directory, alone and under torchrun."""

import json
import re

import pytest
import yaml
from cli import TORCHRUN, TRAIN, start

SHORT = ["model.width=4", "debug=limit"]


def test_ranks_that_start_in_different_seconds_share_one_run(tmp_path):
    late = tmp_path / "late.py"
    late.write_text(
        "import os, runpy, time\n"
        "time.sleep(1.5 * int(os.environ['RANK']))\n"
        "runpy.run_module('train', run_name='__main__', alter_sys=True)\n"
    )
    done = start([*TORCHRUN, str(late), *SHORT], tmp_path)
    assert done.returncode == 0, done.stderr
    (directory,) = (tmp_path / "outputs").iterdir()
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("RESULT")] == [lines[-1]]
    assert re.fullmatch(
        r"RESULT test_accuracy=\d\.\d{4} correct=\d+ total=360 epochs=2 world_size=2 "
        rf"run_dir=outputs/{directory.name}",
        lines[-1],
    )
    assert lines[-2] == f"report: outputs/{directory.name}/report.md"
    names = {str(path.relative_to(directory)) for path in directory.rglob("*")}
    assert names >= {
        "config.yaml",
        "report.md",
        "result.json",
        "curves.png",
        "csv/metrics.csv",
        "tensorboard",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        ".hydra/config.yaml",
        ".hydra/overrides.yaml",
    }
    assert [name for name in names if name.endswith(".log")] == ["train.log"]
    log = (directory / "train.log").read_text()
    assert [log.count(f"epoch {n}/2  train_loss") for n in (1, 2)] == [1, 1]
    assert yaml.safe_load((directory / "config.yaml").read_text())["run_name"] == directory.name
    assert json.loads((directory / "result.json").read_text())["world_size"] == 2


def test_a_refused_run_leaves_the_directory_of_another_as_it_is(tmp_path):
    command = [*TRAIN, "model=mlp", "model.widths=[4]", "trainer.max_epochs=1", "logger=none", "run_name=run"]
    assert start(command, tmp_path).returncode == 0
    files = sorted(path for path in (tmp_path / "outputs" / "run").rglob("*") if path.is_file())
    before = [path.read_bytes() for path in files]
    refused = start([*command, "seed=5"], tmp_path)
    assert refused.returncode == 1
    assert "holds a run already" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert [path.read_bytes() for path in files] == before
    (tmp_path / "outputs" / "run" / "checkpoints" / "last.ckpt").unlink()
    assert "holds a run without a checkpoint" in start([*command, "seed=5"], tmp_path).stderr


def test_multirun_under_torchrun_is_refused_with_the_command_to_use(tmp_path):
    done = start([*TRAIN, "-m", "norm=sync,local"], tmp_path, RANK="0", WORLD_SIZE="2")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "`python -m train -m norm=sync,local`" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_norm_names_the_choices_once_for_all_ranks(tmp_path):
    done = start([*TORCHRUN, *TRAIN, "norm=nonsense"], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("Could not find 'norm/nonsense'") == 1
    assert re.search(r"Available options in 'norm':\s+group\s+layer\s+local\s+none\s+sync", done.stderr)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("nonsense=1", "Could not override 'nonsense'"),
        ("model.depht=20", "Could not override 'model.depht'"),
        ("data=cifar10", "error: CIFAR10 is missing or damaged in .*: add data.download=true to download it"),
    ],
)
def test_what_a_user_gets_wrong_is_one_short_message_and_no_traceback(override, expected, tmp_path):
    done = start([*TRAIN, override], tmp_path)
    assert done.returncode == 1
    assert re.search(expected, done.stderr)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 8
