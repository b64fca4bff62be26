"""Where the time of a training step goes: waiting for data, computing, and collectives between the ranks."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile


class TimeShares(Callback):
    """Profiles a few steps on rank 0, once, and reports the shares of their time.

    `collective_share` is the time in which a collective was under way, also where computing went on beside it, and
    `compute_share` what is left after it and after `data_wait_share`. `Throughput` leaves these steps out, and the
    others cost nothing.

    Args:
        skip_steps: at the start of the process.
        num_steps: that are profiled.
    """

    def __init__(self, skip_steps: int = 8, num_steps: int = 5) -> None:
        self.skip_steps = skip_steps
        self.num_steps = num_steps
        self.shares: dict[str, float] = {}
        self._steps = 0
        self.is_profiling = False  # `Throughput` leaves these steps out
        self._profiler: Any = None
        self._start = self._batch_end = self._waited = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin, or note how long the batch took to come."""
        if self._profiler is not None:
            self._waited += time.perf_counter() - self._batch_end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start behind the steps to skip, and end after those to profile."""
        self._steps += 1
        self.is_profiling = self.skip_steps <= self._steps <= self.skip_steps + self.num_steps
        if self._steps == self.skip_steps and trainer.is_global_zero:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if pl_module.device.type == "cuda" else [])]
            config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
            self._profiler = profile(activities=activities, experimental_config=config, acc_events=True)
            self._profiler.start()
            self._start = time.perf_counter()
        elif self._steps == self.skip_steps + self.num_steps and self._profiler is not None:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self._start
            self._profiler.stop()
            data, collective = self._waited / seconds, _collective_seconds(self._profiler.events()) / seconds
            self._profiler = None
            self.shares = {
                "data_wait_share": data,
                "collective_share": collective,
                "compute_share": max(0.0, 1 - data - collective),
            }
        self._batch_end = time.perf_counter()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the profiler."""
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the profiler where the run was shorter."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def _collective_seconds(events: Any) -> float:
    """Return for how long at least one collective was under way."""
    names = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.name.startswith(names))
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6
