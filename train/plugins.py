"""How Lightning runs on several ranks: this project's layer in place of torch's, and DDP set up for it."""

import inspect
import io
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import LayerSync, TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from train import distenv
from train.distenv import Refusal


class SyncBatchNormPlugin(LayerSync):
    """BatchNorm over the images of all ranks while fitting, plain BatchNorm before and after."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Return the model with synchronized BatchNorm; Lightning calls it when the process group is up."""
        return syncbn.convert_sync_batchnorm(model)

    def revert(self, model: nn.Module) -> nn.Module:
        """Return the model with the BatchNorm classes it had."""
        return syncbn.revert_sync_batchnorm(model)


class AtomicFiles(TorchCheckpointIO):
    """Checkpoint files that are whole or not there, on every file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write beside the file and then put it in its place.

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
                "directory with run_dir=DIR; what was there before is whole"
            ) from error


def strategy(accelerator: str, timeout_minutes: float = 5, find_unused_parameters: bool = False) -> Strategy | str:
    """Return DDP for several ranks (NCCL on GPUs, gloo on CPUs), and "auto" for one.

    DDP does not broadcast buffers before every forward: synchronized running statistics are equal anyway, and those of
    `norm=local` are made equal before an evaluation by `callbacks.BroadcastBuffers`.

    Args:
        accelerator: "gpu" or "cpu".
        timeout_minutes: how long a collective waits for a rank before the run fails.
    """
    if distenv.world_size() == 1:
        return "auto"
    # `broadcast_buffers` until torch 2.12
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    broadcast = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {broadcast: False, "find_unused_parameters": find_unused_parameters}
    return DDPStrategy(
        process_group_backend="nccl" if accelerator == "gpu" else "gloo",
        timeout=timedelta(minutes=timeout_minutes),
        **options,
    )
