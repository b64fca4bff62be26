"""Callbacks that disturb a run: one kills a rank during the run, one slows the run down."""

import os
import signal
import time

from lightning.pytorch import Callback

from train import stop


class Killed(Callback):
    """Kills a rank after a step, in each life of the run: the first, and those after torchrun's restarts.

    Args:
        deaths: (rank, step) of each life.
    """

    def __init__(self, deaths):
        self.deaths = deaths
        stop.DEADLINE_S = 1  # the dead rank's DataLoader worker keeps its connections open for seconds

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if [trainer.global_rank, trainer.global_step] in self.deaths[life : life + 1]:
            os.kill(os.getpid(), signal.SIGKILL)


class Slow(Callback):
    """Slows every step down, so that a signal arrives during training."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(self.seconds)
