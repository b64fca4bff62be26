"""Find the checkpoint to resume from, and refuse one that the run could not continue exactly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from omegaconf import DictConfig, OmegaConf
from torch import nn

from train import distenv
from train.distenv import Refusal
from train.norms import Norm

# The values that determine the result of a run; all others may change on resume.
COURSE = (
    *("seed", "model", "norm", "optimizer", "scheduler", "mixing", "label_smoothing"),
    *("finetune", "callbacks.ema", "callbacks.recalibrate"),
    *(f"data.{name}" for name in ("source", "train_transforms", "batch_transforms", "reduce", "val_fraction")),
    *(f"data.{name}" for name in ("num_train", "shuffle", "seed")),
    *(f"data.{name}" for name in ("global_batch_size", "batch_size_per_rank")),
    *(f"data.{name}" for name in ("num_classes", "in_channels", "image_size", "mean", "std")),
    *(f"trainer.{name}" for name in ("precision", "accumulate_grad_batches", "limit_train_batches", "overfit_batches")),
    *(f"trainer.{name}" for name in ("gradient_clip_val", "gradient_clip_algorithm")),
)


def find(config: DictConfig) -> Path | None:
    """Return the checkpoint to resume from, the same on every rank, or None to start a new run.

    After a restart by torchrun it is the one in the run directory, regardless of `resume`.

    Raises:
        Refusal: the directory holds a run and `resume` does not ask for it, or the named file does not exist.
    """
    own = Path(config.run_dir) / "checkpoints" / "last.ckpt"
    named = None if config.resume in (None, "auto") else Path(config.resume)
    exists = distenv.agreed("resume", str(own.exists())) == "True"
    is_asked_for = config.resume == "auto" or (named is not None and named.resolve() == own.resolve())
    if exists and not is_asked_for and not distenv.life().is_restart:
        raise Refusal(f"{config.run_dir} holds a run already: continue it with resume=auto, or choose another run_name")
    if not exists and config.resume is None and (own.parents[1] / "result.json").exists():
        raise Refusal(f"{config.run_dir} holds a run without a checkpoint to continue: choose another run_name")
    path = own if exists else named
    if path is None:
        return None
    if not path.is_file():
        raise Refusal(f"rank {distenv.rank()} finds no checkpoint {path}: name one that every node can read")
    return path


def load(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint file.

    Raises:
        Refusal: the file is missing or damaged, or not a checkpoint of this trainer.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Refusal(f"there is no checkpoint {path}: name one with checkpoint=FILE or resume=FILE") from None
    except Exception as error:  # a damaged file can raise any exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refusal(f"{path} is damaged or not a checkpoint ({reason}): use another one") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "config"} <= set(checkpoint):
        raise Refusal(f"{path} is not a checkpoint of this trainer: it has no state_dict and config")
    return checkpoint


def check(
    path: Path, checkpoint: dict[str, Any], config: DictConfig, norm: Norm, network: nn.Module, global_batch: int
) -> None:
    """Raise Refusal, on every rank, if this run would not exactly continue the run that wrote the checkpoint."""
    snapshot = checkpoint.get("snapshot")
    if snapshot is None:
        raise Refusal(f"{path} is for evaluation and has no training state: resume from last.ckpt")
    before, now = flat(checkpoint["config"]), flat(OmegaConf.to_container(config))
    course = [key for key in sorted(before | now) if key.startswith(tuple(f"{name}." for name in COURSE))]
    course += [key for key in COURSE if key in before | now]
    for key in course:
        if before.get(key) != now.get(key):
            raise Refusal(
                f"{path} cannot be continued exactly: {key} was {before.get(key)} and is {now.get(key)}; "
                "restore the old value, or start a new run"
            )
    for name in ("max_epochs", "max_steps"):
        limit_before, limit = (values.get(f"trainer.{name}", -1) for values in (before, now))
        if 0 <= limit < limit_before:
            raise Refusal(
                f"{path} is of a run of {limit_before} {name[4:]}, and trainer.{name} may grow but not shrink, got "
                f"{limit}: its learning rates would have been different"
            )
    epochs_before, epochs = before["trainer.max_epochs"], now["trainer.max_epochs"]
    if snapshot["batch_idx"] is None and config.callbacks.get("ema") and epochs != epochs_before:
        raise Refusal(
            f"{path} is of a finished run whose weights have become their average: it cannot train for {epochs} "
            "epochs, start a new run"
        )
    check_weights(path, checkpoint, network)
    _check_world_size(path, snapshot, config, norm, network, global_batch)


def check_weights(path: Path, checkpoint: dict[str, Any], network: nn.Module) -> None:
    """Raise Refusal if the weights in a checkpoint differ from those of the network in name or shape."""
    prefix = "network."
    found = {
        name.removeprefix(prefix): tuple(value.shape)
        for name, value in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise Refusal(
                f"{path} is of another model: {name} has shape {found.get(name, 'none')} in the file and "
                f"{expected.get(name, 'none')} in the network"
            )


def _check_world_size(
    path: Path, snapshot: dict[str, Any], config: DictConfig, norm: Norm, network: nn.Module, global_batch: int
) -> None:
    before, now = snapshot["world_size"], distenv.world_size()
    if before == now:
        if norm.ranks == "node" and snapshot["local_world_size"] != distenv.local_world_size():
            raise Refusal(
                f"{path} is of {snapshot['local_world_size']} ranks per node and there are "
                f"{distenv.local_world_size()}: norm.group=node needs the same number as before"
            )
        return
    reason = None
    if snapshot["global_batch_size"] != global_batch:
        reason = f"the global batch would change from {snapshot['global_batch_size']} to {global_batch} images"
    elif snapshot["buffers"] is not None or norm.ranks not in (None, "world"):
        reason = "BatchNorm is not over all ranks, so its batch would change"
    elif any(map(_draws_masks, network.modules())):
        reason = "every rank draws its own dropout masks"
    elif config.mixing is not None:
        reason = "images are mixed within a rank"
    if reason is not None:
        raise Refusal(f"{path} is of {before} ranks and there are {now}: {reason}; start {before} ranks")


def _draws_masks(module: nn.Module) -> bool:
    """Return whether a module drops values or paths: one of torch or torchvision, or of timm, by its attributes."""
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd | torchvision.ops.StochasticDepth)
    return bool(module.p) if is_dropout else bool(getattr(module, "drop_prob", 0))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted name."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, child in value.items():
        leaves |= flat(child, f"{prefix}.{key}" if prefix else key)
    return leaves
