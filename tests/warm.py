"""A Python that has imported the trainer already: a command that it is given runs in a fork of it.

`python()` is the path of an executable that takes `-m module argument ...` or `script.py argument ...` as Python does,
with the caller's directory, environment and streams, and ends as the command ends. SIGTERM and SIGINT are passed on; a
command whose caller was killed is killed.
"""

import atexit
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

MODULES = ["torch.distributed.launcher.api", "train.run", "train.commands"]
SEPARATOR = "\0"  # neither arguments nor variables can hold it

CALLER = """#!{python} -IS
import os, signal, socket, sys
link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
link.connect({address!r})
parts = [os.getcwd(), *sys.argv[1:], "", *(f"{{name}}={{value}}" for name, value in os.environ.items())]
socket.send_fds(link, ["\\0".join(parts).encode()], [0, 1, 2])
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda signum, frame: link.send(bytes([signum])))
code = int(link.recv(16) or b"1")
if code < 0:
    if -code in (signal.SIGTERM, signal.SIGINT):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@cache
def python() -> str:
    """Start the server of this process where there is none yet, and return the path of the executable."""
    folder = tempfile.TemporaryDirectory(prefix="warm")  # short: the path of a socket has about 100 characters
    address, caller = f"{folder.name}/socket", Path(folder.name, "python")
    caller.write_text(CALLER.format(python=sys.executable, address=address))
    caller.chmod(caller.stat().st_mode | stat.S_IXUSR)
    server = subprocess.Popen(
        [sys.executable, __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    atexit.register(folder.cleanup)
    atexit.register(server.communicate)  # it ends when its input does
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return str(caller)


def environment() -> dict[str, str]:
    """Return this process's environment with this repository's packages and test modules in the path."""
    tests = Path(__file__).parent
    path = os.pathsep.join(filter(None, [str(tests.parent), str(tests), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def serve(address: str) -> tuple[list[str], list[int]]:
    """Fork for every caller; return in the fork, with the caller's message and streams."""
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # a collection in a fork would copy and search all that has been imported
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            sys.exit()
        link, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            break
        link.close()
    if os.fork() != 0:
        os._exit(0)  # the server has no child to wait for
    message, streams, _, _ = socket.recv_fds(link, 2**20, 3)
    command = os.fork()
    if command != 0:
        watch(command, link)
    link.close()
    return message.decode().split(SEPARATOR), streams


def watch(command: int, link: socket.socket) -> None:
    """Pass signals on to the command and its end to the caller, then exit."""
    end = os.pidfd_open(command)
    while True:
        ready, _, _ = select.select([link, end], [], [])
        if end in ready:
            code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
            link.send(str(code).encode())
            os._exit(0)
        os.kill(command, (link.recv(1) or bytes([signal.SIGKILL]))[0])


def run(parts: list[str], streams: list[int]) -> None:
    """Run the command of a message as Python would."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    directory, *rest = parts
    end = rest.index("")
    arguments = [argument for argument in rest[:end] if argument != "-u"]
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(variable.split("=", 1) for variable in rest[end + 1 :])
    sys.executable = os.environ.get("PYTHON_EXEC", sys.executable)  # what the command starts is warm too
    sys.argv = arguments[1:] if arguments[0] == "-m" else arguments
    code: object = 0
    try:
        if arguments[0] == "-m":
            sys.path[0] = directory
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # to take apart what the fork shares with the server would copy it first, for a second or two


if __name__ == "__main__":
    run(*serve(sys.argv[1]))
