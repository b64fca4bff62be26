"""The verbs in plain PyTorch: every device, every dtype, every layout, traceable by torch.compile.

Elementwise steps run in the accumulation dtype and in place on one temporary; on CPU they are several times faster than
the fused training-mode kernels of ATen. Per-channel values are float64; `x - mean` is taken as `(x - pivot) - (mean -
pivot)` with the pivot representable in the accumulation dtype and the small rest folded into a per-channel constant,
so that nothing cancels at any mean/std.
"""

import torch
from torch import Tensor

from syncbn.activations import ACTIVATIONS
from syncbn.statistics import Channels


def batch_norm_stats(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (), mean (C,) and M2 (C,) of this rank, float64: two passes, corrected for the pivot's rounding."""
    dims = reduced_dims(x)
    count = local_count(x, mask)
    divisor = count.clamp(min=1)
    valid = x if mask is None else x.masked_fill(~mask, 0)
    pivot = (valid.sum(dims, dtype=accumulation_dtype(x)) / divisor).to(accumulation_dtype(x))
    centred = hide_(x - per_channel(pivot, x), mask)
    mean_offset = centred.sum(dims).double() / divisor  # what the rounding of the pivot left
    M2 = centred.square_().sum(dims).double() - count * mean_offset.square()
    return count, pivot.double() + mean_offset, M2.clamp(min=0)


def batch_norm_elemt(
    x: Tensor, channels: Channels, *, residual: Tensor | None, mask: Tensor | None, activation: str
) -> Tensor:
    """Return `activation((x - mean) * invstd * weight + bias + residual)` in the dtype and layout of x."""
    z = _preactivation(x, channels, residual)
    return hide_(ACTIVATIONS[activation].apply_(z), mask).to(x.dtype)


def batch_norm_activation_backward(
    grad_output: Tensor,
    x: Tensor,
    channels: Channels,
    *,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
) -> Tensor:
    """Return dy, the gradient of what went into the activation, like x; `grad_output` itself where nothing changes."""
    dy = grad_output
    if activation != "identity":
        z = _preactivation(x, channels, residual)
        dy = ACTIVATIONS[activation].backward(dy.to(z.dtype), z).to(x.dtype)
    return dy if mask is None else dy.masked_fill(~mask, 0)


def batch_norm_backward_reduce(
    dy: Tensor, x: Tensor, channels: Channels, *, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return sum(dy) and sum(dy * (x - mean)) of this rank, each (C,) float64."""
    dims = reduced_dims(x)
    pivot = channels.mean.to(accumulation_dtype(x))
    sum_dy = dy.sum(dims, dtype=pivot.dtype).double()
    sum_dy_xmu = hide_(x - per_channel(pivot, x), mask).mul_(dy).sum(dims).double()
    return sum_dy, sum_dy_xmu + sum_dy * (pivot - channels.mean)


def batch_norm_backward_elemt(
    dy: Tensor,
    x: Tensor,
    channels: Channels,
    *,
    mask: Tensor | None,
    count: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
) -> Tensor:
    """Return the gradient of x in its dtype and layout; count and both sums are those of the whole group."""
    pivot = channels.mean.to(accumulation_dtype(x))
    divisor = count.clamp(min=1)
    scale = _scale(channels)
    slope = -scale * channels.invstd.square() * sum_dy_xmu / divisor
    shift = -scale * sum_dy / divisor + slope * (pivot - channels.mean)
    grad_input = (x - per_channel(pivot, x)).mul_(per_channel(slope, x)).add_(per_channel(shift, x))
    return hide_(grad_input.add_(dy * per_channel(scale, x)), mask).to(x.dtype)


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


def hide_(values: Tensor, mask: Tensor | None) -> Tensor:
    """Set masked positions to 0, in place, whatever stood there, NaN too."""
    return values if mask is None else values.masked_fill_(~mask, 0)


def _preactivation(x: Tensor, channels: Channels, residual: Tensor | None) -> Tensor:
    """Return a new tensor `(x - mean) * invstd * weight + bias + residual` in the accumulation dtype."""
    pivot = channels.mean.to(accumulation_dtype(x))
    scale = _scale(channels)
    shift = (pivot - channels.mean) * scale
    if channels.bias is not None:
        shift = shift + channels.bias
    z = (x - per_channel(pivot, x)).mul_(per_channel(scale, x)).add_(per_channel(shift, x))
    return z if residual is None else z.add_(residual)


def _scale(channels: Channels) -> Tensor:
    return channels.invstd if channels.weight is None else channels.invstd * channels.weight
