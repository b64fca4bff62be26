"""The README is correct: its Python block runs, and its links and commands exist."""

import re
import shlex
from pathlib import Path

import pytest

from train import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_block_runs():
    (block,) = [text for language, text in BLOCKS if language == "python"]
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    exec(compile(block, "README.md", "exec"), {})


def test_every_linked_file_exists():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    for page in pages:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)#]+)", prose):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def commands() -> list[list[str]]:
    lines = [line.split("#")[0] for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.strip()]


@pytest.mark.parametrize("command", [c for c in commands() if "train" in c and "make" not in c], ids=" ".join)
def test_the_overrides_of_every_training_command_compose(command):
    overrides = [word for word in command[command.index("train") + 1 :] if "=" in word]
    choices = [re.sub(r",.*", "", word) for word in overrides]  # the first value of a sweep
    assert run.compose(choices).data is not None


def test_every_make_target_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = set(re.findall(r"\bmake (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"train", "test", "bench"} <= used
    assert used - {"sets"} <= targets, used - targets
