"""start(command, cwd): run the trainer as a user does, from any directory, alone or under torchrun."""

import importlib
import subprocess
from pathlib import Path
from unittest.mock import patch

import warm

REPOSITORY = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TRAIN = ["-m", "train"]


def popen(arguments, cwd, python=None, **environment):
    """Start Python with these arguments; with `warm.python()` for `python`, it and torchrun's ranks import nothing."""
    python = python or warm.python()
    return subprocess.Popen(
        [python, *arguments],
        cwd=cwd,
        env=warm.environment() | {"PYTHON_EXEC": python} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(arguments, cwd, timeout=240, python=None, **environment):
    process = popen(arguments, cwd, python, **environment)
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def call(command, arguments):
    """Run evaluate, export or predict in this process as its module does."""
    from train import commands

    module = importlib.import_module(f"train.{command}")
    with patch("sys.argv", [command, *map(str, arguments)]):
        commands.main(command, getattr(module, command), module.__doc__)
