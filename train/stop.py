"""SIGTERM and SIGINT: recorded at once, handled by all ranks between two steps, at the latest after 8 s."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

DEADLINE_S = 8  # then the process exits without saving: a collective may be waiting for a rank that has ended


class Stopped(SystemExit):
    """The run was asked to stop; the exit code is 128 + the signal number, as in shells."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def ignore_signals(worker_id: int) -> None:
    """Ignore the signals in a DataLoader worker, which ends with its rank: they go to all processes of a run."""
    for signum in StopSignals.watched:
        signal.signal(signum, signal.SIG_IGN)


class StopSignals:
    """Records SIGTERM and SIGINT between `install` and `remove`.

    Python runs signal handlers between bytecode instructions, so not while the main thread waits in a collective. The
    signal number is therefore also sent through a pipe to a thread, which ends the process after the deadline.
    """

    watched = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._over = threading.Event()

    def install(self) -> None:
        """Install the handlers; outside the main thread, where Python does not allow this, do nothing."""
        if self._pipe is not None or threading.current_thread() is not threading.main_thread():
            return
        self._before = {signum: signal.signal(signum, self._note) for signum in self.watched}
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._over.clear()
        threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True).start()

    def remove(self) -> None:
        """Restore the previous handlers."""
        if self._pipe is None:
            return
        self._over.set()
        signal.set_wakeup_fd(-1)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        os.close(self._pipe[1])  # ends the reading thread
        self._pipe = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received = self.received or signum

    def _watch(self, reader: int) -> None:
        with contextlib.closing(os.fdopen(reader, "rb", buffering=0)) as pipe:
            while byte := pipe.read(1):
                if byte[0] in self.watched and not self._over.wait(DEADLINE_S):
                    os._exit(128 + byte[0])


class StopsTests(Callback):
    """Ends a test on SIGTERM or SIGINT after the current batch, with the signal's exit code; Lightning's would be 0."""

    def __init__(self) -> None:
        self._signals = StopSignals()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers."""
        self._signals.install()

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Raise `Stopped` if a signal was received."""
        if self._signals.received is not None:
            raise Stopped(self._signals.received)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers."""
        self._signals.remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous handlers."""
        self._signals.remove()
