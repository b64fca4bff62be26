"""The verbs in plain PyTorch: every device, every dtype, every layout, traceable by torch.compile.

Elementwise steps run in the accumulation dtype and in place on one temporary; on CPU on a part of the batch at a time,
so that the temporary stays in the cache. There this is several times faster than ATen's fused training-mode kernels.
Per-channel values are float64; `x - mean` is taken as `(x - pivot) - (mean - pivot)` with the pivot representable in
the accumulation dtype and the small rest folded into a per-channel constant, so that nothing cancels at any mean/std.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from syncbn.activations import ACTIVATIONS
from syncbn.statistics import Channels

PART_ELEMENTS = 2**17  # 512 KB of float32: half of a usual second-level cache

WHOLE = slice(None)


def batch_norm_stats(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (), mean (C,) and M2 (C,) of this rank, float64: two passes, corrected for the pivot's rounding."""
    dims = reduced_dims(x)
    count = local_count(x, mask)
    divisor = count.clamp(min=1)
    pivot = (hide(x, mask).sum(dims, dtype=accumulation_dtype(x)) / divisor).to(accumulation_dtype(x))

    def sums(part: slice) -> Tensor:
        centred = hide_(x[part] - per_channel(pivot, x), mask, part)
        return torch.stack([centred.sum(dims), centred.square_().sum(dims)]).double()

    offset, square = _sum_over_parts(sums, x)
    mean_offset = offset / divisor  # what the rounding of the pivot left
    return count, pivot.double() + mean_offset, (square - count * mean_offset.square()).clamp(min=0)


def batch_norm_elemt(
    x: Tensor, channels: Channels, *, residual: Tensor | None, mask: Tensor | None, activation: str
) -> Tensor:
    """Return `activation((x - mean) * invstd * weight + bias + residual)` in the dtype and layout of x."""
    preactivation = _preactivation(x, channels, residual)

    def output(part: slice) -> Tensor:
        return hide_(ACTIVATIONS[activation].apply_(preactivation(part)), mask, part)

    return _over_parts(output, x)


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
    if activation == "identity":
        return grad_output if mask is None else hide_(grad_output.clone(), mask)
    preactivation = _preactivation(x, channels, residual)

    def dy(part: slice) -> Tensor:
        z = preactivation(part)
        return hide_(ACTIVATIONS[activation].backward(grad_output[part].to(z.dtype), z), mask, part)

    return _over_parts(dy, x)


def batch_norm_backward_reduce(
    dy: Tensor, x: Tensor, channels: Channels, *, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return sum(dy) and sum(dy * (x - mean)) of this rank, each (C,) float64."""
    dims = reduced_dims(x)
    pivot = channels.mean.to(accumulation_dtype(x))

    def sums(part: slice) -> Tensor:
        centred = hide_(x[part] - per_channel(pivot, x), mask, part)
        return torch.stack([dy[part].sum(dims, dtype=pivot.dtype), centred.mul_(dy[part]).sum(dims)]).double()

    sum_dy, sum_dy_xmu = _sum_over_parts(sums, x)
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
    pivot, scale, slope, shift = (per_channel(values, x) for values in (pivot, scale, slope, shift))

    def grad_input(part: slice) -> Tensor:
        return hide_((x[part] - pivot).mul_(slope).add_(shift).add_(dy[part] * scale), mask, part)

    return _over_parts(grad_input, x)


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


def hide_(values: Tensor, mask: Tensor | None, part: slice = WHOLE) -> Tensor:
    """Set the masked positions of a part of the batch to 0, in place."""
    if mask is None:
        return values
    own = mask[part] if mask.dim() == values.dim() and mask.shape[0] > 1 else mask
    return values.masked_fill_(~own, 0)


def _preactivation(x: Tensor, channels: Channels, residual: Tensor | None) -> Callable[[slice], Tensor]:
    """Return a function to a part of `(x - mean) * invstd * weight + bias + residual`, in the accumulation dtype."""
    pivot = channels.mean.to(accumulation_dtype(x))
    scale = _scale(channels)
    shift = (pivot - channels.mean) * scale
    if channels.bias is not None:
        shift = shift + channels.bias
    pivot, scale, shift = (per_channel(values, x) for values in (pivot, scale, shift))

    def preactivation(part: slice) -> Tensor:
        z = (x[part] - pivot).mul_(scale).add_(shift)
        return z if residual is None else z.add_(residual[part])

    return preactivation


def _scale(channels: Channels) -> Tensor:
    return channels.invstd if channels.weight is None else channels.invstd * channels.weight


def _parts(x: Tensor) -> list[slice]:
    """Return the parts of the batch that are worked on one after the other."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.numel() <= PART_ELEMENTS:
        return [WHOLE]
    size = max(1, PART_ELEMENTS * x.shape[0] // x.numel())
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def _sum_over_parts(sums: Callable[[slice], Tensor], x: Tensor) -> Tensor:
    first, *others = _parts(x)
    total = sums(first)
    for part in others:
        total += sums(part)
    return total


def _over_parts(values: Callable[[slice], Tensor], x: Tensor) -> Tensor:
    """Return `values` of every part in one tensor of the dtype and layout of x."""
    first, *others = _parts(x)
    if torch.compiler.is_compiling():
        # torch 2.11 makes outputs of intermediates and loses the gradient of a result that is one; a copy costs nothing
        return values(first).to(x.dtype).clone()
    if not others:
        return values(first).to(x.dtype)
    result = torch.empty_like(x)
    for part in (first, *others):
        result[part] = values(part)
    return result
