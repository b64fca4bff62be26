"""Sphinx configuration; `make docs` builds the site without network into docs/_build/html."""

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_extensions")]

import syncbn  # noqa: E402

project = "syncbn"
author = "the authors of syncbn"
project_copyright = author
release = syncbn.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",  # serves MathJax from the package
    "docstrings",
    "two_ranks",
    "repository_links",
]
exclude_patterns = ["_build", "_extensions"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_custom_sections = ["Source"]
default_role = "code"

html_theme = "furo"
html_title = f"syncbn {release}"
html_theme_options = {"footer_icons": []}
html_show_sphinx = False
html_copy_source = False
