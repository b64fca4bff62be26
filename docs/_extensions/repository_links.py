"""Links from a page to a file of the repository outside docs/ become a copy of that file beside the pages.

On a code host the links of the pages work as they are; on the site, `../tests/test_module.py` has no page. Such a file
is shown by the browser as plain text from `_repository/tests/test_module.py.txt`, so that no link leaves the site.
"""

import os
import shutil
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "_repository"
SHOWN = {".csv", ".md", ".py", ".toml", ".yaml", ".sbatch"}


class RepositoryLinks(SphinxPostTransform):
    """Points links to files outside docs/ to their copies, and remembers the files."""

    default_priority = 5  # before the references that MyST leaves pending are resolved

    def run(self, **kwargs: object) -> None:
        """Replace the references."""
        folder = (Path(self.env.srcdir) / self.env.docname).parent
        depth = self.env.docname.count("/")
        for node in list(self.document.findall(lambda node: "reftarget" in getattr(node, "attributes", {}))):
            target = node["reftarget"].partition("#")[0]
            path = (folder / target).resolve()
            is_page = path.is_relative_to(self.env.srcdir) and path.suffix == ".md"
            if not target or target.startswith("http") or not path.is_relative_to(ROOT) or is_page:
                continue
            if path.is_dir():
                self.replace(node, None)
            elif path.is_file():
                name = f"{FOLDER}/{path.relative_to(ROOT)}" + ".txt" * (path.suffix in SHOWN)
                self.env.repository_files.add((str(path), name))
                self.replace(node, "../" * depth + name)

    def replace(self, node: nodes.Element, uri: str | None) -> None:
        """Replace a pending reference by a link, or by its text alone."""
        children = [child.deepcopy() for child in node.children]
        node.replace_self(children if uri is None else nodes.reference("", "", *children, refuri=uri))


def start(app: Sphinx) -> None:
    """Begin with no files."""
    app.env.repository_files = set()


def copy(app: Sphinx, error: Exception | None) -> None:
    """Copy the files that pages link to."""
    for path, name in app.env.repository_files if error is None else ():
        target = Path(app.outdir, name)
        os.makedirs(target.parent, exist_ok=True)
        shutil.copyfile(path, target)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the transform."""
    app.add_post_transform(RepositoryLinks)
    app.connect("builder-inited", start)
    app.connect("build-finished", copy)
    return {"parallel_read_safe": False}
