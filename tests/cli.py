"""start(command, cwd): run the trainer as a user does, from any directory, alone or under torchrun."""

import json
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


FORKING = """
import json, os, sys, traceback
import train.run, train.__main__
for number, arguments in enumerate(json.loads(sys.argv[1])):
    if os.fork() == 0:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["train", *arguments]
        try:
            train.__main__.main()
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int | None) else 1
            if code != exit.code:
                print(exit.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def start_each(cases, cwd):
    """Return (exit code, stdout, stderr) of `python -m train` with the arguments of each case; imports happen once."""
    done = start([sys.executable, "-c", FORKING, json.dumps(cases)], cwd)
    codes = [int(line) for line in done.stdout.splitlines()]
    assert len(codes) == len(cases), done.stderr
    texts = [[(cwd / f"{i}.{name}").read_text() for name in ("stdout", "stderr")] for i in range(len(cases))]
    return [(code, *text) for code, text in zip(codes, texts, strict=True)]
