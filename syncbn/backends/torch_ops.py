"""The verbs in plain PyTorch: every device, every dtype, every layout, traceable by torch.compile.

Elementwise steps run in the accumulation dtype. Per-channel values are float64; `x - mean` is taken as
`(x - pivot) - (mean - pivot)` with the pivot representable in the accumulation dtype and the small rest folded into a
per-channel constant, so that nothing cancels at any mean/std.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.activations import ACTIVATIONS
from syncbn.statistics import Channels, Fused


class Affine(NamedTuple):
    """`(x - pivot) * scale + shift`, each in a shape that broadcasts over x."""

    pivot: Tensor
    scale: Tensor
    shift: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return it in the accumulation dtype."""
        return (x - self.pivot).mul_(self.scale).add_(self.shift)


def batch_norm_stats(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (), mean (C,) and M2 (C,) of this rank, float64: two passes, corrected for the pivot's rounding."""
    dims = reduced_dims(x)
    count = local_count(x, mask)
    divisor = count.clamp(min=1)
    pivot = (hide(x, mask).sum(dims, dtype=accumulation_dtype(x)) / divisor).to(accumulation_dtype(x))
    centred = hide_(x - per_channel(pivot, x), mask)
    offset = centred.sum(dims).double() / divisor  # what the rounding of the pivot left
    square = centred.square_().sum(dims).double()
    return count, pivot.double() + offset, (square - count * offset.square()).clamp(min=0)


def batch_norm_elemt(x: Tensor, channels: Channels, fused: Fused) -> Tensor:
    """Return `activation((x - mean) * invstd * weight + bias + residual)` in the dtype and layout of x."""
    y = ACTIVATIONS[fused.activation].apply_(preactivation(x, normalization(channels, x), fused.residual))
    return _finished(hide_(y, fused.mask), x)


def batch_norm_activation_backward(grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused) -> Tensor:
    """Return dy, the gradient of what went into the activation, like x; `grad_output` itself where nothing changes."""
    if fused.activation == "identity":
        return grad_output if fused.mask is None else hide_(grad_output.clone(), fused.mask)
    z = preactivation(x, normalization(channels, x), fused.residual)
    return _finished(hide_(activation_backward(grad_output, z, fused.activation), fused.mask), x)


def batch_norm_backward_reduce(
    dy: Tensor, x: Tensor, channels: Channels, *, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return sum(dy) and sum(dy * (x - mean)) of this rank, each (C,) float64."""
    dims = reduced_dims(x)
    pivot = channels.mean.to(accumulation_dtype(x))
    centred = hide_(x - per_channel(pivot, x), mask)
    sum_dy = dy.sum(dims, dtype=pivot.dtype).double()
    return sum_dy, centred.mul_(dy).sum(dims).double() + sum_dy * (pivot - channels.mean)


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
    scale, _ = forward_coefficients(channels)
    slope, shift = slope_and_shift(scale, channels, count, sum_dy, sum_dy_xmu)
    grad_input = affine(channels, x, slope, shift)(x).add_(dy * per_channel(scale, x))
    return _finished(hide_(grad_input, mask), x)


def preactivation(x: Tensor, normalization: Affine, residual: Tensor | None) -> Tensor:
    """Return what goes into the activation, in the accumulation dtype."""
    z = normalization(x)
    return z if residual is None else z.add_(residual)


def activation_backward(grad_output: Tensor, z: Tensor, activation: str) -> Tensor:
    """Return the gradient in front of the activation, whose input was z, in the dtype of z."""
    return ACTIVATIONS[activation].backward(grad_output.to(z.dtype), z)


def affine(channels: Channels, x: Tensor, scale: Tensor, shift: Tensor) -> Affine:
    """Return `(x - mean) * scale + shift` for (C,) float64 values, without cancellation."""
    pivot = channels.mean.to(accumulation_dtype(x))
    shift = shift + (pivot - channels.mean) * scale
    return Affine(*(per_channel(values, x) for values in (pivot, scale, shift)))


def normalization(channels: Channels, x: Tensor) -> Affine:
    """Return `(x - mean) * invstd * weight + bias`."""
    return affine(channels, x, *forward_coefficients(channels))


def forward_coefficients(channels: Channels) -> tuple[Tensor, Tensor]:
    """Return scale and shift of `(x - mean) * scale + shift`, each (C,) float64."""
    scale = channels.invstd if channels.weight is None else channels.invstd * channels.weight
    return scale, torch.zeros_like(scale) if channels.bias is None else channels.bias.double()


def slope_and_shift(
    scale: Tensor, channels: Channels, count: Tensor, sum_dy: Tensor, sum_dy_xmu: Tensor
) -> tuple[Tensor, Tensor]:
    """Return slope and shift of `grad_input = dy * scale + (x - mean) * slope + shift`, each (C,) float64."""
    scale = scale / -count.clamp(min=1)
    return scale * channels.invstd.square() * sum_dy_xmu, scale * sum_dy


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


def hide(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return values with masked positions set to 0, whatever stood there, NaN too; differentiable."""
    return values if mask is None else values.masked_fill(~mask, 0)


def hide_(values: Tensor, mask: Tensor | None) -> Tensor:
    """Set the masked positions to 0, in place."""
    return values if mask is None else values.masked_fill_(~mask, 0)


def _finished(values: Tensor, x: Tensor) -> Tensor:
    """Return a result in the dtype of x."""
    values = values.to(x.dtype)
    # torch 2.11 makes outputs of intermediates and loses the gradient of a result that is one; a copy costs nothing
    return values.clone() if torch.compiler.is_compiling() else values
