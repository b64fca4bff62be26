"""The choices for `norm=`: the normalization layer, and the Lightning plugin that synchronizes it over ranks."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

from lightning.pytorch.plugins import LayerSync
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from syncbn.lightning import SyncBatchNormPlugin
from train import distenv
from train.distenv import Refusal
from train.plugins import TorchSyncBatchNormPlugin

FEW_IMAGES = 16  # BatchNorm's error grows below this number: Wu & He 2018, figure 1


class Norm(NamedTuple):
    """A choice of normalization.

    Attributes:
        layer: `layer(num_channels)` returns a new module for (N, num_channels, H, W). A module with a fused activation
            names it in the attribute `activation`.
        sync: the Lightning plugin that synchronizes the layers, or None. A single process does not need it.
        ranks: the ranks that share batch statistics: "world", "node" or a number; None without batch statistics.
    """

    layer: Callable[[int], nn.Module]
    sync: LayerSync | None = None
    ranks: int | str | None = None

    def num_ranks(self) -> int:
        """Return the number of ranks that share batch statistics; 0 without batch statistics."""
        known = {"world": distenv.world_size(), "node": distenv.local_world_size(), None: 0}
        return known[self.ranks] if self.ranks in known else int(self.ranks)  # type: ignore[arg-type]

    def check(self, accelerator: str) -> None:
        """Raise Refusal, on every rank, if it does not support this world size or accelerator ("gpu" or "cpu")."""
        world_size = distenv.world_size()
        if self.ranks not in ("world", "node", None) and (not isinstance(self.ranks, int) or world_size % self.ranks):
            sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
            raise Refusal(
                f"norm.group must be world, node or a number that divides the {world_size} ranks, got {self.ranks}: "
                f"use {sizes}"
            )
        if isinstance(self.sync, TorchSyncBatchNormPlugin) and accelerator == "cpu":
            raise Refusal(
                "norm=torch_sync needs a GPU for every rank, as torch.nn.SyncBatchNorm has no CPU code: use norm=sync"
            )

    def batch(self, images_per_rank: float, network: nn.Module) -> "Batch":
        """Return the number of images that share batch statistics in a network, and a line with it.

        Args:
            network: its modules that are in evaluation mode use running statistics.
        """
        ranks = self.num_ranks()
        layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        if not ranks:
            return Batch(None, "no batch statistics")
        if not any(layer.training for layer in layers):
            reason = "those of all layers are frozen" if layers else "the network has no batch normalization"
            return Batch(None, f"no batch statistics: {reason}")
        images = ranks * images_per_rank
        images = int(images) if images == int(images) else images
        group = {"world": "all ranks", "node": "group node", 1: "each rank alone"}.get(
            self.ranks,
            f"groups of {self.ranks}",
        )
        line = f"BN batch = {ranks} x {images_per_rank:g} = {images:g} over {group}"
        if images >= FEW_IMAGES:
            return Batch(images, line)
        return Batch(
            images,
            f"{line}; warning: statistics of fewer than {FEW_IMAGES} images are noisy, synchronize more ranks "
            "(norm=sync norm.group=world), enlarge the batch or use norm=group",
        )


class Batch(NamedTuple):
    """The images that share batch statistics: their number, None without such statistics, and a line for the user."""

    images: float | None
    line: str


def batch_norm(num_channels: int, activation: str = "identity", temperature: float = 1.0) -> nn.Module:
    """Return nn.BatchNorm2d, or syncbn.BatchNorm if an activation or a temperature is fused."""
    if activation == "identity" and temperature == 1:
        return nn.BatchNorm2d(num_channels)
    return syncbn.BatchNorm(num_channels, activation=activation, temperature=temperature)


def local(activation: str = "identity", temperature: float = 1.0) -> Norm:
    """Return BatchNorm over each rank's own images."""
    return Norm(partial(batch_norm, activation=activation, temperature=temperature), ranks=1)


def synchronized(
    group: int | Literal["world", "node"] = "world", activation: str = "identity", temperature: float = 1.0
) -> Norm:
    """Return BatchNorm over the images of several ranks.

    Args:
        group: all ranks ("world"), the ranks of a node ("node"), or a number of consecutive ranks.
        activation: identity, relu, leaky_relu, silu, relu6, gelu or hardswish, fused into the layer.
        temperature: factor on the normalized output.
    """
    layer = partial(batch_norm, activation=activation, temperature=temperature)
    return Norm(layer, SyncBatchNormPlugin(group), group)


def torch_synchronized() -> Norm:
    """Return torch.nn.SyncBatchNorm over all ranks, for comparison."""
    return Norm(nn.BatchNorm2d, TorchSyncBatchNormPlugin(), "world")


def group_norm(num_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Return GroupNorm with the largest number of groups, up to `num_groups`, that divides the number of channels.

    Raises:
        Refusal: there are no groups; on every rank.

    Source: Wu & He 2018. One group is layer normalization over (C, H, W) with a weight and bias for each channel.
    """
    if num_groups < 1:
        raise Refusal(f"norm.layer.num_groups must be 1 or more, got {num_groups}")
    groups = next(groups for groups in range(min(num_groups, num_channels), 0, -1) if num_channels % groups == 0)
    return nn.GroupNorm(groups, num_channels)
