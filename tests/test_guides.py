"""Every Python program in the guides runs as a program of two ranks."""

import os
import re
import socket
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import run_ranks

DOCS = Path(__file__).parents[1] / "docs"

LANGUAGE = {  # of the programs of two ranks in each page
    "integrations.md": r"```python\n(.*?)```",
    "troubleshooting.md": r"```python\n(.*?)```",
    "tutorial/2-two-ranks.md": r"```\{two-ranks\}\n(.*?)```",
}


def programs() -> dict[str, str]:
    """Return the Python blocks of the guides by page and heading."""
    found = {}
    for page in LANGUAGE:
        for section in re.split(r"^## ", (DOCS / page).read_text(), flags=re.MULTILINE)[1:]:
            heading = section.split("\n", 1)[0]
            for number, code in enumerate(re.findall(LANGUAGE[page], section, flags=re.DOTALL)):
                found[f"{page} {heading}{f' {number + 1}' * (number > 0)}"] = code
    return found


def run_program(name: str, code: str, store: str) -> str:
    """Run the code as torchrun does, with no process group yet."""
    address = [None]
    if dist.get_rank() == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = [free.getsockname()[1]]
    dist.broadcast_object_list(address)
    dist.destroy_process_group()
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(address[0]), TORCHELASTIC_RUN_ID="guides", LOCAL_WORLD_SIZE="2"
    )
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    if not dist.is_initialized():  # run_ranks ends with a barrier
        rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)
    return "ended"


PROGRAMS = programs()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_runs_on_two_ranks(name, tmp_path):
    assert run_ranks(2, run_program, name, PROGRAMS[name], str(tmp_path / "store")) == ["ended", "ended"]


def test_the_guides_have_a_program_for_each_section():
    headings = re.findall(r"^## (.*)$", (DOCS / "integrations.md").read_text(), flags=re.MULTILINE)
    assert len(headings) == 10
    assert all(f"integrations.md {heading}" in PROGRAMS for heading in headings)
