"""Docstrings of this repository as reStructuredText: indented formulas stay as they are, `*S` is no emphasis."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

SECTION = re.compile(r"^[A-Z][\w ]*:$")  # such as "Args:"


def to_rst(lines: list[str]) -> list[str]:
    """Return the lines with formulas as literal blocks and asterisks escaped elsewhere."""
    found: list[str] = []
    in_section = in_formula = False
    for line in lines:
        is_indented = line.startswith("    ")
        if line and not is_indented:
            in_section, in_formula = bool(SECTION.match(line)), False
        if is_indented and not in_section and not in_formula and not (found and found[-1]):
            found += ["::", ""]
            in_formula = True
        found.append(line if in_formula else re.sub(r"\*(?=\S)", r"\\*", line))
    return found


def process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Change the lines in place."""
    lines[:] = to_rst(lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register before napoleon."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True}
