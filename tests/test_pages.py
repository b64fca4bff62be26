"""The pages are correct: their programs run, their commands compose, and their links exist."""

import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from train import distenv

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/**/*.md")])
ON_RANKS = ("integrations.md", "troubleshooting.md")  # their programs run on two ranks, see test_guides
KNOWN = {"python", "bash", "two-ranks", "toctree", "automodule", "eval-rst", "figure"}


def blocks(page):
    """Return the blocks of a page: language, line and text."""
    text = page.read_text()
    found = re.finditer(r"^```\{?([\w-]*)\}?[^\n]*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [(match[1], text[: match.start(2)].count("\n"), match[2]) for match in found]


def name(page):
    return str(page.relative_to(ROOT))


WITH_PYTHON = [p for p in PAGES if p.name not in ON_RANKS and any(b[0] == "python" for b in blocks(p))]
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for page in PAGES
        for language, _, text in blocks(page)
        if language == "bash"
        for line in text.replace("\\\n", " ").splitlines()
        if re.search(r"-m train|scripts/", line.split("#")[0])
    }
)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_the_python_blocks_of_a_page_run_one_after_the_other(page):
    namespace = {"__name__": "__main__"}
    for language, line, text in blocks(page):
        if language == "python":
            exec(compile("\n" * line + text, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_of_a_kind_that_a_test_runs(page):
    assert {language for language, _, _ in blocks(page)} <= KNOWN


@pytest.mark.parametrize("command", COMMANDS)
def test_the_overrides_of_every_training_command_compose(command):
    words = shlex.split(command)
    target = next(word for word in words if re.fullmatch(r"train(\.\w+)?|scripts/.*\.py", word))
    if target.endswith(".py"):
        assert (ROOT / target).exists()
        target = "train"
    after = words[words.index("-m", 0) + 1 :] if "-m" in words else words
    overrides = [word for word in after if re.match(r"[~+]*[\w./@]+=", word)]
    choices = [re.sub(r",(?![^\[{]*[\]}]).*", "", word) for word in overrides]  # the first value of a sweep
    distenv.register_resolvers()
    with initialize_config_module("conf", version_base="1.3"):
        assert compose(target.removeprefix("train.").removesuffix(".py"), choices)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_linked_file_exists(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#]+)", prose):
        assert target.startswith("http") or (page.parent / target).exists(), f"{name(page)}: {target}"


def test_formulas_in_docstrings_become_literal_blocks_and_asterisks_stay():
    sys.path.insert(0, str(ROOT / "docs" / "_extensions"))
    docstring = """Return x of (N, C, *S).

        a = b * c
        d = e

    After it.

    Args:
        x: (N, *S).

        y: none.
    """
    assert importlib.import_module("docstrings").to_rst(inspect.cleandoc(docstring).splitlines()) == [
        *(r"Return x of (N, C, \*S).", "", "::", "", "    a = b * c", "    d = e", "", "After it.", ""),
        *("Args:", r"    x: (N, \*S).", "", "    y: none."),
    ]


def test_every_source_part_names_tests_that_exist():
    page = (ROOT / "docs" / "sources.md").read_text()
    parts = re.findall(r"^## (S\d+)\. [^\n]+\n(.*?)(?=^## )", page, flags=re.DOTALL | re.MULTILINE)
    assert [number for number, _ in parts] == [f"S{number}" for number in range(1, 19)]
    for number, text in parts:
        file = None
        named = re.findall(r"\(\.\./(tests/\w+\.py)\)|`(test_\w+)`(?!\])", text)
        assert any(test for _, test in named), number
        for path, test in named:
            file = path or file
            assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
