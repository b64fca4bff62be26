"""The README's first block is short, and the targets it names exist; test_pages runs its code and follows its links."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_block_is_short():
    (block,) = [text for language, text in BLOCKS if language == "python"]
    assert len([line for line in block.splitlines() if line.strip()]) <= 12


def test_every_make_target_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    used = set(re.findall(r"\bmake (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"train", "test", "bench"} <= used
    assert used - {"sets"} <= targets, used - targets
