"""What `norm=` chooses: how a network normalizes a number of channels, and what makes that span the ranks."""

from collections.abc import Callable
from typing import NamedTuple

from lightning.pytorch.plugins import LayerSync
from torch import nn


class Norm(NamedTuple):
    """A choice of normalization.

    Attributes:
        layer: `layer(num_channels)` returns a new module for (N, num_channels, H, W).
        sync: the Lightning plugin that synchronizes it, if it is synchronized. A single process needs none.
    """

    layer: Callable[[int], nn.Module]
    sync: LayerSync | None = None


def group_norm(num_channels: int, num_groups: int = 32) -> nn.GroupNorm:
    """Return GroupNorm with `num_groups` groups, or the most that divide a narrower layer's channels evenly.

    Source: Wu & He 2018. One group is layer normalization over (C, H, W) with a weight and bias for each channel.
    """
    groups = next(groups for groups in range(min(num_groups, num_channels), 0, -1) if num_channels % groups == 0)
    return nn.GroupNorm(groups, num_channels)
