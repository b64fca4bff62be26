"""The values that travel between the ops, and functions on per-channel statistics.

Nothing communicates. Per-channel values are float64 for every dtype of the activations. Formulas: `syncbn.reference`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.recomputation import is_recomputing, unless_recomputing


class Channels(NamedTuple):
    """The per-channel values that forward keeps for backward."""

    mean: Tensor  # (C,) float64
    invstd: Tensor  # (C,) float64
    weight: Tensor | None  # (C,) of any floating dtype
    bias: Tensor | None  # (C,) of any floating dtype
    coefficients: Tensor | None = None  # derived from the others by a backend, in a format of its own


class Running(NamedTuple):
    """Running statistics, and the weight of a batch in them."""

    mean: Tensor  # (C,) of any floating dtype
    var: Tensor  # (C,) of any floating dtype
    num_batches_tracked: Tensor | None  # () int64
    momentum: float | None  # None: a cumulative average; without num_batches_tracked nothing moves then


class Epilogue(NamedTuple):
    """The operations after normalization: `activation(normalized + residual)` where the mask is True, else 0."""

    residual: Tensor | None = None  # like x
    mask: Tensor | None = None  # bool, (N, 1, *S) or broadcast
    activation: str = "identity"


class OutputMask(NamedTuple):
    """What backward needs besides the gradient of x."""

    weight: bool
    bias: bool
    dy: bool  # the gradient in front of the activation, which is that of the residual
    y: bool = False  # the output of forward


class Reduced(NamedTuple):
    """The results of the first half of a backward pass on one rank."""

    sums: Tensor  # (2C + 1,) float64, as `pack_sums` makes it
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    dy: Tensor | None  # the gradient in front of the activation, if it is needed or was written anyway
    y: Tensor | None = None  # the output of forward, up to rounding, if it is needed


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


def unpack(packed: Tensor, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (), mean (C,) and biased var (C,), float64; all zero if the count is 0.

    A variance within the rounding of mean^2 is 0, so that a constant channel has no variance on any number of ranks.

    Args:
        packed: (2C + 1,) float64, the sum over ranks of the vectors that `pack` makes.
        ranks: number of vectors in the sum, those of ranks or (in recalibrate) of batches.
    """
    num_channels = (packed.shape[0] - 1) // 2
    count = packed[0].clone()  # a view would keep the whole vector alive
    divisor = count.clamp(min=1)
    mean = packed[1 : num_channels + 1] / divisor
    return count, mean, without_rounding(packed[num_channels + 1 :] / divisor - mean * mean, mean, ranks)


def gather_stats(
    packed: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, ranks: int, running: Running | None
) -> tuple[Tensor, Tensor, Channels]:
    """Return count (), biased var (C,) and the per-channel values of the group; move the running statistics.

    Args:
        packed: as for `unpack`.
    """
    count, mean, var = unpack(packed, ranks)
    if running is not None:
        update_running_stats_(running, count=count, mean=mean, var=var)
    return count, var, Channels(mean, invstd_of(var, eps), weight, bias)


def rounding_of_variance(ranks: int) -> float:
    """Return the largest error of `sum(x^2) / n - mean^2`, relative to mean^2, of float64 sums over ranks.

    A sum over W ranks, one after the other, errs by up to W units of 2^-53. It enters once in the sum of squares and
    twice in mean^2; products and divisions add a few units.
    """
    return (4 + 1.5 * ranks) * 2.0**-52


def without_rounding(var: Tensor, mean: Tensor, ranks: int) -> Tensor:
    """Return the variance, with 0 where it is within the rounding of mean^2; NaN stays."""
    return torch.where(var <= rounding_of_variance(ranks) * mean * mean, 0.0, var)


def pack_sums(sum_dy: Tensor, sum_dy_xmu: Tensor) -> Tensor:
    """Return the vector `[0, sum(dy), sum(dy * (x - mean))]` of backward, (2C + 1,) float64.

    The first number is NaN on a rank that refuses, as the count is in forward.
    """
    return torch.cat([sum_dy.new_zeros(1), sum_dy, sum_dy_xmu])


def unpack_sums(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum(dy) and sum(dy * (x - mean)), each (C,) float64."""
    sum_dy, sum_dy_xmu = sums[1:].chunk(2)
    return sum_dy, sum_dy_xmu


def reduced_of(
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    channels: Channels,
    output_mask: OutputMask,
    dy: Tensor | None,
    y: Tensor | None,
) -> Reduced:
    """Return the result for both sums of one rank, (C,) float64; the gradients of weight and bias follow from them."""
    grad_weight = grad_bias = None
    if output_mask.weight:
        assert channels.weight is not None
        grad_weight = (sum_dy_xmu * channels.invstd).to(channels.weight.dtype)
    if output_mask.bias:
        assert channels.bias is not None
        grad_bias = sum_dy.to(channels.bias.dtype, copy=True)
    return Reduced(pack_sums(sum_dy, sum_dy_xmu), grad_weight, grad_bias, dy, y)


def scale_and_shift(channels: Channels) -> tuple[Tensor, Tensor]:
    """Return scale and shift of `(x - mean) * scale + shift`, each (C,) float64."""
    scale = channels.invstd if channels.weight is None else channels.invstd * channels.weight
    return scale, torch.zeros_like(scale) if channels.bias is None else channels.bias.double()


def grad_input_coefficients(channels: Channels, count: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale, slope and shift of `grad_input = dy * scale + (x - mean) * slope + shift`, each (C,) float64."""
    scale, _ = scale_and_shift(channels)
    sum_dy, sum_dy_xmu = unpack_sums(sums)
    factor = scale / -count.clamp(min=1)
    return scale, factor * channels.invstd.square() * sum_dy_xmu, factor * sum_dy


def invstd_of(var: Tensor, eps: float) -> Tensor:
    """Return `1 / sqrt(var + eps)`, and 0 where `var + eps` is 0: a constant channel then yields the bias, not NaN."""
    shifted = var + eps
    if eps > 0:
        return shifted.rsqrt()
    is_zero = shifted == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, shifted).rsqrt())  # the derivative there is 0 too


def update_running_stats_(running: Running, *, count: Tensor, mean: Tensor, var: Tensor) -> None:
    """Count the batch and move the running statistics towards those of the whole batch, in place.

    `running = (1 - momentum) * running + momentum * batch`, torch's convention (0.1); several texts use the reverse,
    `momentum * running + (1 - momentum) * batch` (0.9). The variance of the batch is the unbiased one,
    `var * n / (n - 1)`. A batch of fewer than two values has none, and moves nothing; nor does a forward pass that
    checkpointing repeats, which runs the same operations nevertheless.

    Args:
        running: updated in place.
        count: () float64, values per channel in the whole batch.
        mean: (C,) float64.
        var: (C,) float64, biased.
    """
    count, mean, var = _detach(count), _detach(mean), _detach(var)
    is_valid = count > (torch.inf if is_recomputing() else 1)  # False for NaN too
    if torch.compiler.is_compiling():
        is_valid = unless_recomputing(is_valid, torch.zeros_like(is_valid))
    momentum: float | Tensor = 0.0 if running.momentum is None else running.momentum
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(is_valid)
        if running.momentum is None:
            momentum = 1 / running.num_batches_tracked.clamp(min=1).double()
    for own, batch in ((running.mean, mean), (running.var, unbiased(var, count))):
        own.copy_(torch.where(is_valid, own + momentum * (batch - own), own))


def unbiased(var: Tensor, count: Tensor) -> Tensor:
    """Return the unbiased variance, `var * n / (n - 1)`; 0 times `var` where n is 0."""
    return var * (count / (count - 1).clamp(min=1))


def _detach(values: Tensor) -> Tensor:
    """Return float64 values detached from autograd, also in a recorded graph.

    `make_fx` records `detach()` as a differentiable view, and its graphs run with gradients enabled; a view as integers
    has no gradient. `torch.jit.trace` records `detach()`, and does not support a view with another dtype.
    """
    return values.detach() if torch.jit.is_tracing() else values.view(torch.int64).view(torch.float64)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64 activations, float32 for every other dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def local_count(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the number of values per channel on this rank, () float64."""
    if mask is None:
        return torch.full((), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
    return mask.expand(x.shape[0], 1, *x.shape[2:]).sum(dtype=torch.float64)


def reduced_dims(x: Tensor) -> list[int]:
    """Return every dimension but that of the channels."""
    return [0, *range(2, x.dim())]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Return (C,) `values` in the accumulation dtype of x, shaped (1, C, 1, ...) to broadcast over it."""
    return values.to(accumulation_dtype(x)).view(1, -1, *[1] * (x.dim() - 2))


def pivot_of(mean: Tensor, x: Tensor) -> Tensor:
    """Return an approximate mean in the accumulation dtype of x, 0 where it is infinite: `x - inf` would be NaN."""
    return mean.to(accumulation_dtype(x)).nan_to_num(0.0, 0.0, 0.0)


def apply_mask(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return values with masked positions set to 0, even where they are NaN; differentiable."""
    return values if mask is None else values.masked_fill(~mask, 0)


def apply_mask_(values: Tensor, mask: Tensor | None) -> Tensor:
    """Set the masked positions to 0, in place."""
    return values if mask is None else values.masked_fill_(~mask, 0)


def match_layout(tensor: Tensor, x: Tensor) -> Tensor:
    """Return the tensor with the strides of x, which may be a meta tensor; a copy only if they differ."""
    if tensor.stride() == x.stride() and not tensor.is_neg():
        return tensor
    return torch.empty_like(x, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
