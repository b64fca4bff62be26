"""SIGTERM and SIGINT: noted at once, acted upon by all ranks between two steps, and waited for no longer than 8 s."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

DEADLINE_S = 8  # then the process ends as it is: a peer may be gone, and a collective would wait for it


class Stopped(SystemExit):
    """The run was told to stop; its exit code is the one that shells give a signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def ignore_signals(worker_id: int) -> None:
    """Let a process that loads images live until its rank ends it: the signals go to all processes of a run."""
    for signum in StopSignals.watched:
        signal.signal(signum, signal.SIG_IGN)


class StopSignals:
    """Notes SIGTERM and SIGINT between `install` and `remove`.

    Python runs a handler between two of its own instructions, so not while the main thread waits in a collective. The
    signal's number also goes through a pipe to a thread, which ends the process when the deadline has passed.
    """

    watched = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._over = threading.Event()

    def install(self) -> None:
        """Take the signals over; in a thread other than the main one signals cannot be, and nothing happens."""
        if self._pipe is not None or threading.current_thread() is not threading.main_thread():
            return
        self._before = {signum: signal.signal(signum, self._note) for signum in self.watched}
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._over.clear()
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()

    def remove(self) -> None:
        """Give the signals back to whom they belonged."""
        if self._pipe is None:
            return
        self._over.set()
        signal.set_wakeup_fd(-1)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        os.close(self._pipe[1])  # its reader ends
        self._pipe = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = self.received or signum

    def _watch(self, reader: int) -> None:
        with contextlib.closing(os.fdopen(reader, "rb", buffering=0)) as pipe:
            while byte := pipe.read(1):
                if byte[0] in self.watched and not self._over.wait(DEADLINE_S):
                    os._exit(128 + byte[0])


class StopsTests(Callback):
    """Ends a test on SIGTERM or SIGINT after the batch, with the signal's exit code; Lightning's would be 0."""

    def __init__(self) -> None:
        self._signals = StopSignals()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning."""
        self._signals.install()

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Leave."""
        if self._signals.received is not None:
            raise Stopped(self._signals.received)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._signals.remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._signals.remove()
