"""start(command, cwd): run the trainer as a user does, from any directory, alone or under torchrun."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TRAIN = [sys.executable, "-m", "train"]


def user_environment(**environment):
    path = os.pathsep.join(filter(None, [str(REPOSITORY), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}


def start(command, cwd, timeout=240, **environment):
    return subprocess.run(
        command, cwd=cwd, env=user_environment(**environment), capture_output=True, text=True, timeout=timeout
    )
