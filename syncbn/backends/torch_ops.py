"""The ops in plain PyTorch: every device, every dtype, every layout, traceable by torch.compile.

Elementwise arithmetic runs in the accumulation dtype. Per-channel values are float64; `x - mean` is computed as
`(x - pivot) - (mean - pivot)`, with a pivot that the accumulation dtype represents exactly and the small second term
folded into a per-channel constant, so that nothing cancels at any mean/std.
"""

import torch
from torch import Tensor

from syncbn.activations import ACTIVATIONS
from syncbn.statistics import (
    Channels,
    Epilogue,
    OutputMask,
    Reduced,
    Running,
    accumulation_dtype,
    apply_mask,
    apply_mask_,
    gather_stats,
    grad_input_coefficients,
    local_count,
    pack,
    per_channel,
    pivot_of,
    reduced_dims,
    reduced_of,
    scale_and_shift,
)


def pack_stats(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the vector of this rank for the all-reduce: two passes, corrected for the rounding of the pivot."""
    dims = reduced_dims(x)
    count = local_count(x, mask)
    divisor = count.clamp(min=1)
    pivot = pivot_of(apply_mask(x, mask).sum(dims, dtype=accumulation_dtype(x)) / divisor, x)
    centred = apply_mask_(x - per_channel(pivot, x), mask)
    offset = centred.sum(dims).double() / divisor  # mean - pivot
    square = centred.square_().sum(dims).double()
    return pack(count, pivot.double() + offset, (square - count * offset.square()).clamp(min=0))


def normalize(
    x: Tensor,
    packed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    *,
    eps: float,
    ranks: int,
    running: Running | None,
) -> tuple[Tensor, Tensor, Channels]:
    """Return the output, the count of the group and the per-channel values; move the running statistics."""
    count, _, channels = gather_stats(packed, weight, bias, eps=eps, ranks=ranks, running=running)
    z = _preactivation(_centred(x, channels), channels, epilogue.residual, overwrite=True)
    return _activated_(z, x, epilogue), count, channels


def backward_reduce(
    grad_output: Tensor, x: Tensor, channels: Channels, epilogue: Epilogue, output_mask: OutputMask
) -> Reduced:
    """Return the sums of this rank, the gradients of weight and bias, dy, and y if it is needed."""
    dims, centred, dy, y = reduced_dims(x), _centred(x, channels), grad_output, None
    if epilogue.activation != "identity" or output_mask.y:
        z = _preactivation(centred, channels, epilogue.residual, overwrite=False)
        dy = ACTIVATIONS[epilogue.activation].backward(grad_output.to(z.dtype), z)
        y = _activated_(z, x, epilogue) if output_mask.y else None
    dy = apply_mask(dy, epilogue.mask) if dy is grad_output else _like_x(apply_mask_(dy, epilogue.mask), x)
    pivot = _pivot(x, channels)
    sum_dy = dy.sum(dims, dtype=pivot.dtype).double()
    products = apply_mask_(centred, epilogue.mask).mul_(dy)
    sum_dy_xmu = products.sum(dims).double() + sum_dy * (pivot - channels.mean)
    return reduced_of(sum_dy, sum_dy_xmu, channels, output_mask, dy, y)


def backward_elemt(
    grad_output: Tensor, x: Tensor, channels: Channels, epilogue: Epilogue, reduced: Reduced, *, count: Tensor
) -> Tensor:
    """Return the gradient of x in its dtype and layout."""
    assert reduced.dy is not None
    scale, slope, shift = grad_input_coefficients(channels, count, reduced.sums)
    shift = shift + (_pivot(x, channels) - channels.mean) * slope
    grad_input = _centred(x, channels).mul_(per_channel(slope, x)).add_(per_channel(shift, x))
    grad_input = grad_input.add_(reduced.dy * per_channel(scale, x))
    return _like_x(apply_mask_(grad_input, epilogue.mask), x)


def _pivot(x: Tensor, channels: Channels) -> Tensor:
    """Return the mean in the accumulation dtype of x, (C,)."""
    return channels.mean.to(accumulation_dtype(x))


def _centred(x: Tensor, channels: Channels) -> Tensor:
    """Return x minus the pivot, in the accumulation dtype."""
    return x - per_channel(_pivot(x, channels), x)


def _preactivation(centred: Tensor, channels: Channels, residual: Tensor | None, *, overwrite: bool) -> Tensor:
    """Return the input of the activation from x minus the pivot, without cancellation."""
    scale, shift = scale_and_shift(channels)
    shift = shift + (_pivot(centred, channels) - channels.mean) * scale
    factor = per_channel(scale, centred)
    z = (centred.mul_(factor) if overwrite else centred * factor).add_(per_channel(shift, centred))
    return z if residual is None else z.add_(residual)


def _activated_(z: Tensor, x: Tensor, epilogue: Epilogue) -> Tensor:
    """Return y like x from the input of the activation, which is overwritten."""
    return _like_x(apply_mask_(ACTIVATIONS[epilogue.activation].apply_(z), epilogue.mask), x)


def _like_x(values: Tensor, x: Tensor) -> Tensor:
    """Return a result in the dtype of x."""
    values = values.to(x.dtype)
    # torch 2.11 loses the gradient of an output that is also an intermediate result; inductor removes the copy
    return values.clone() if torch.compiler.is_compiling() else values
