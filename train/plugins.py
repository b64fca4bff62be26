"""Lightning plugins for several ranks: torch's synchronized BatchNorm, atomic checkpoint files, restartable DDP."""

import inspect
import io
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import LayerSync, TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from train import distenv, lightning_internals
from train.distenv import Refusal


class TorchSyncBatchNormPlugin(LayerSync):
    """torch.nn.SyncBatchNorm over all ranks, also for evaluation, in which it does not communicate."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the model with torch.nn.SyncBatchNorm layers."""
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Return the model unchanged: Lightning's own revert loses train/eval modes and classes."""
        return model


class AtomicFiles(TorchCheckpointIO):
    """Writes each checkpoint file completely or not at all, on every file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a temporary file beside `path`, then rename it to `path`.

        Raises:
            Refusal: there is no space left, or the directory cannot be written.
        """
        path = Path(path)
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".part").open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            path.with_suffix(".part").replace(path)
        except OSError as error:
            raise Refusal(
                f"the checkpoint {path} cannot be written ({error.strerror}): make space or name another "
                "directory with run_dir=DIR; the previous file is intact"
            ) from error


class Restartable(DDPStrategy):
    """DDPStrategy whose process group can be initialized again after torchrun restarts the ranks of a run.

    torchrun's store outlives the ranks, and torch (2.14) would read the addresses of dead ranks from it. Each life of a
    run therefore has a separate key prefix.
    """

    def setup_distributed(self) -> None:
        """Initialize the process group, unless there is one."""
        if distenv.has_agent_store() and not dist.is_initialized():
            device = self.root_device
            backend, timeout = lightning_internals.process_group_options(self)
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(distenv.life().name, distenv.agent_store()),
                rank=distenv.rank(),
                world_size=distenv.world_size(),
                timeout=timeout,
                device_id=None if device.type == "cpu" else device,
            )
        super().setup_distributed()


def strategy(
    accelerator: str,
    timeout_minutes: float = 5,
    find_unused_parameters: bool = False,
    static_graph: bool = False,
    gradient_as_bucket_view: bool = True,
) -> Strategy | str:
    """Return DDP for several ranks (NCCL on GPUs, gloo on CPUs), and "auto" for one.

    DDP does not broadcast buffers before every forward: synchronized running statistics are equal anyway, and
    `statistics.EqualBuffers` makes those of `norm=local` equal before an evaluation.

    Args:
        accelerator: "gpu" or "cpu".
        timeout_minutes: how long a collective waits for a rank before the run fails.
        find_unused_parameters, static_graph: those of DDP, which with the latter knows after one step which
            parameters are used, and in which order.
        gradient_as_bucket_view: whether the gradients are parts of the buffers that DDP sends, not copies of them.
    """
    if distenv.world_size() == 1:
        return "auto"
    # called `broadcast_buffers` until torch 2.12
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    broadcast = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {broadcast: False, "find_unused_parameters": find_unused_parameters}
    return Restartable(
        process_group_backend="nccl" if accelerator == "gpu" else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        static_graph=static_graph,
        gradient_as_bucket_view=gradient_as_bucket_view,
        **options,
    )
