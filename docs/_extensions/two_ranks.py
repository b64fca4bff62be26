"""The directive `two-ranks`: a Python program that two ranks run while the page is built, with what it prints.

```{two-ranks}
import torch.distributed as dist
...
```
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]


def output_of(program: str) -> str:
    """Return what a program of two ranks prints, one line of a rank after the other, sorted.

    Raises:
        ExtensionError: it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(program)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path)]
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=120)
    if done.returncode:
        raise ExtensionError(f"a program of two ranks failed:\n{program}\n{done.stderr}")
    return "\n".join(sorted(done.stdout.splitlines()))


class TwoRanks(SphinxDirective):
    """Shows the program, runs it on two ranks and shows its output."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return the program, a label and the output."""
        program = "\n".join(self.content)
        code = nodes.literal_block(program, program, language="python")
        output = output_of(program)
        label = nodes.paragraph("", "", nodes.strong("", "2 ranks print:"))
        return [code, label, nodes.literal_block(output, output, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("two-ranks", TwoRanks)
    return {"parallel_read_safe": True}
