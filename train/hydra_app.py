"""Starting a task through Hydra on every rank: rank 0 alone writes Hydra's files, and errors are sentences."""

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from train import distenv, errors

_own_streams: list[TextIO] = [sys.stdout, sys.stderr]
VALUED_FLAGS = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c"),
    "--experimental-rerun",
)
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
FLAGS = (
    *VALUED_FLAGS,
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m", "--info", "-i"),
    *("--shell-completion", "-sc"),
)
ONE_WRITER = ("hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none")


def start(task: Callable[[], Any], command: str, known: dict[str, Any] | None = None) -> None:
    """Run a task of `hydra.main` with this process's arguments; only rank 0 writes Hydra's directory and log.

    What Hydra writes to stderr before the task begins is held back, and explained if Hydra exits with an error.

    Args:
        task: calls `begin` first.
        command: what lists all keys, for messages.
        known: the configuration whose keys an override may name; by default that of `python -m train`.
    """
    arguments = sys.argv[1:]
    sys.argv[1:] = flags_first(arguments)
    is_writer = distenv.rank() == 0
    if not is_writer:
        sys.argv += ONE_WRITER
    held_back = io.StringIO()
    error = None
    _own_streams[:] = [sys.stdout, sys.stderr]
    with contextlib.redirect_stderr(held_back), contextlib.redirect_stdout(sys.stdout if is_writer else io.StringIO()):
        try:
            task()
        except SystemExit as exit:
            error = exit
        has_begun = sys.stderr is not held_back
    if error is not None and error.code == 1 and not has_begun and held_back.getvalue():
        distenv.leave(errors.explain(held_back.getvalue(), arguments, command, known))
    print(held_back.getvalue(), end="", file=sys.stderr)
    if error is not None and error.code:
        raise error


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with Hydra's flags before the overrides, in one row, as its parser needs them."""
    marks = are_flags(arguments)
    parts = [
        [argument for argument, mark in zip(arguments, marks, strict=True) if mark is kind] for kind in (True, False)
    ]
    return parts[0] + parts[1]


def are_flags(arguments: Sequence[str]) -> list[bool]:
    """Return for each argument whether it is a flag of Hydra or the value of one."""
    marks: list[bool] = []
    for position, argument in enumerate(arguments):
        before = arguments[position - 1] if position else ""
        is_value = before in VALUED_FLAGS or (before in ("--info", "-i") and argument in INFO)
        marks.append(argument in FLAGS or (is_value and marks[-1]))
    return marks


def begin() -> None:
    """Give the process its own output again: Hydra has composed the configuration."""
    sys.stdout, sys.stderr = _own_streams
