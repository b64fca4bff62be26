"""The shares of a training step's time: waiting for data, computing, and collectives between the ranks."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile


class TimeShares(Callback):
    """Profiles a few steps on rank 0, once, and reports the shares of their time.

    `collective_share` is the time in which a collective was running, including any overlap with computation.
    `compute_share` is the remainder after `collective_share` and `data_wait_share`. `Throughput` excludes the profiled
    steps; the other steps have no overhead.

    Args:
        skip_steps: steps to skip at the start of the process.
        num_steps: steps to profile.
    """

    def __init__(self, skip_steps: int = 8, num_steps: int = 5) -> None:
        self.skip_steps = skip_steps
        self.num_steps = num_steps
        self.shares: dict[str, float] = {}
        self._steps = 0
        self.is_profiling = False  # `Throughput` excludes these steps
        self._profiler: Any = None
        self._start = self._batch_end = self._waited = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add the time since the previous batch ended to the data wait."""
        if self._profiler is not None:
            self._waited += time.perf_counter() - self._batch_end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start the profiler after `skip_steps`, and stop it after `num_steps` more."""
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
        """Stop the profiler."""
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the profiler if the run was too short."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def _collective_seconds(events: Any) -> float:
    """Return the seconds in which at least one collective was running."""
    names = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if e.name.startswith(names))
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total / 1e6
