"""The four verbs in plain PyTorch: every device, every dtype, every layout, traceable by torch.compile.

Elementwise steps run in the accumulation dtype and in place on one temporary; on CPU they are several times faster than
the fused training-mode kernels of ATen. Per-channel values are float64; `x - mean` is taken as `(x - pivot) - (mean -
pivot)` with the pivot representable in the accumulation dtype and the small rest folded into a per-channel constant,
so that nothing cancels at any mean/std.
"""

import torch
from torch import Tensor


def batch_norm_stats(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return count (), mean (C,) and M2 (C,) of this rank, float64: two passes, corrected for the pivot's rounding."""
    dims = reduced_dims(x)
    size = x.numel() // x.shape[1]
    divisor = max(size, 1)
    pivot = x.sum(dims, dtype=accumulation_dtype(x)) / divisor
    centred = x - per_channel(pivot, x)
    mean_offset = centred.sum(dims).double() / divisor  # what the rounding of the pivot left
    M2 = centred.square_().sum(dims).double() - size * mean_offset.square()
    count = torch.full((), size, dtype=torch.float64, device=x.device)
    return count, pivot.double() + mean_offset, M2.clamp(min=0)


def batch_norm_elemt(x: Tensor, *, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return `(x - mean) * invstd * weight + bias` in the dtype and layout of x."""
    pivot = mean.to(accumulation_dtype(x))
    scale = _scale(invstd, weight)
    shift = (pivot - mean) * scale
    if bias is not None:
        shift = shift + bias
    return (x - per_channel(pivot, x)).mul_(per_channel(scale, x)).add_(per_channel(shift, x)).to(x.dtype)


def batch_norm_backward_reduce(grad_output: Tensor, x: Tensor, *, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum(dy) and sum(dy * (x - mean)) of this rank, each (C,) float64."""
    dims = reduced_dims(x)
    pivot = mean.to(accumulation_dtype(x))
    sum_dy = grad_output.sum(dims, dtype=pivot.dtype).double()
    sum_dy_xmu = (x - per_channel(pivot, x)).mul_(grad_output).sum(dims).double()
    return sum_dy, sum_dy_xmu + sum_dy * (pivot - mean)


def batch_norm_backward_elemt(
    grad_output: Tensor,
    x: Tensor,
    *,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    count: Tensor,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
) -> Tensor:
    """Return the gradient of x in its dtype and layout; count and both sums are those of the whole group."""
    pivot = mean.to(accumulation_dtype(x))
    divisor = count.clamp(min=1)
    scale = _scale(invstd, weight)
    slope = -scale * invstd.square() * sum_dy_xmu / divisor
    shift = -scale * sum_dy / divisor + slope * (pivot - mean)
    grad_input = (x - per_channel(pivot, x)).mul_(per_channel(slope, x)).add_(per_channel(shift, x))
    return grad_input.add_(grad_output * per_channel(scale, x)).to(x.dtype)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64 activations, float32 for every other dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scale(invstd: Tensor, weight: Tensor | None) -> Tensor:
    return invstd if weight is None else invstd * weight


def reduced_dims(x: Tensor) -> list[int]:
    """Return every dimension but that of the channels."""
    return [0, *range(2, x.dim())]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Return (C,) `values` in the accumulation dtype of x, shaped (1, C, 1, ...) to broadcast over it."""
    return values.to(accumulation_dtype(x)).view(1, -1, *[1] * (x.dim() - 2))
