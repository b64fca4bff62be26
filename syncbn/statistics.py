"""What travels between the steps, and pure functions on per-channel statistics: pack for the wire, unpack, averages.

Nothing communicates. Per-channel values are float64 from the wire on, whatever the dtype of the activations; formulas:
`syncbn.reference`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Channels(NamedTuple):
    """What the elementwise verbs apply to each channel."""

    mean: Tensor  # (C,) float64
    invstd: Tensor  # (C,) float64
    weight: Tensor | None  # (C,) of any floating dtype
    bias: Tensor | None  # (C,) of any floating dtype
    coefficients: Tensor | None = None  # the same, prepared by a backend for itself


class Running(NamedTuple):
    """Running statistics and how far a batch moves them."""

    mean: Tensor  # (C,) of any floating dtype
    var: Tensor  # (C,) of any floating dtype
    num_batches_tracked: Tensor | None  # () int64
    momentum: float | None  # None: a cumulative average; without num_batches_tracked nothing moves then


class Fused(NamedTuple):
    """What is done beside the normalization: `activation(normalized + residual)` where the mask is True, else 0."""

    residual: Tensor | None = None  # like x
    mask: Tensor | None = None  # bool, (N, 1, *S) or broadcast
    activation: str = "identity"


class Wanted(NamedTuple):
    """Which gradients a backward pass is asked for, besides that of x."""

    weight_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None
    dy: bool  # the gradient in front of the activation, that of the residual


class Reduced(NamedTuple):
    """What the first half of a backward pass finds on one rank."""

    sums: Tensor  # (2C,) float64: sum(dy), then sum(dy * (x - mean)); to be summed over ranks
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    dy: Tensor | None  # the gradient in front of the activation, where it is wanted or has been written on the way


class Gradients(NamedTuple):
    """What a backward pass finds."""

    grad_input: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    dy: Tensor | None  # as in `Reduced`


def pack(count: Tensor, mean: Tensor, M2: Tensor) -> Tensor:
    """Return the vector `[n, sum(x), sum(x^2)]` whose sum over ranks describes the whole batch.

    The sum of squares is formed in float64 from values centred on this rank: as `sum(x^2)` of float32 activations it
    would lose every digit of the variance at mean/std = 1e4.

    Args:
        count: () float64, values per channel on this rank; may be 0.
        mean: (C,) mean of this rank.
        M2: (C,) sum of squared deviations from `mean` on this rank.

    Returns:
        (2C + 1,) float64.
    """
    mean, M2 = mean.double(), M2.double()
    total = count * mean
    return torch.cat([count.reshape(1), total, M2 + total * mean])


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (), mean (C,) and biased var (C,), float64; all zero when the count is 0.

    Args:
        packed: (2C + 1,) float64, as `pack` makes it, summed over ranks or not.
    """
    num_channels = (packed.shape[0] - 1) // 2
    count = packed[0].clone()  # not a view that keeps the rest alive
    divisor = count.clamp(min=1)
    mean = packed[1 : num_channels + 1] / divisor
    var = (packed[num_channels + 1 :] / divisor - mean * mean).clamp(min=0)
    return count, mean, var


def invstd_of(var: Tensor, eps: float | Tensor) -> Tensor:
    """Return `1 / sqrt(var + eps)`, and 0 where `var + eps` is 0: a constant channel then yields the bias, not NaN."""
    shifted = var + eps
    if isinstance(eps, float) and eps > 0:
        return shifted.rsqrt()
    return torch.where(shifted == 0, 0.0, shifted.rsqrt())


def update_running_(
    running_mean: Tensor,
    running_var: Tensor,
    *,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float | Tensor,
) -> None:
    """Move the running averages towards the statistics of the whole batch, in place.

    `running = (1 - momentum) * running + momentum * batch`, torch's convention (0.1); several texts keep the reverse,
    `momentum * running + (1 - momentum) * batch` (0.9). The variance that enters is the unbiased one of the whole
    batch, `var * n / (n - 1)`; a batch of no values, or of a single one that has no such variance, moves nothing.

    Args:
        running_mean: (C,) of any floating dtype.
        running_var: (C,) of any floating dtype.
        count: () float64, values per channel in the whole batch.
        mean: (C,) float64.
        var: (C,) float64, biased.
        momentum: weight of the batch; a () tensor for a cumulative average.
    """
    unbiased_var = var * (count / (count - 1).clamp(min=1))
    is_valid = count > 1  # neither for an empty batch nor for the NaN of a rank that refuses its input
    for running, batch in ((running_mean, mean), (running_var, unbiased_var)):
        running.copy_(torch.where(is_valid, running + momentum * (batch - running), running))


def advance_(running: Running, *, count: Tensor, mean: Tensor, var: Tensor) -> None:
    """Count the batch and move the running statistics, in place; arguments as of `update_running_`."""
    momentum: float | Tensor | None = running.momentum
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(count > 1)
        if momentum is None:
            momentum = 1 / running.num_batches_tracked.clamp(min=1).double()
    momentum = 0.0 if momentum is None else momentum
    update_running_(running.mean, running.var, count=count, mean=mean, var=var, momentum=momentum)
