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
    return activate(x, channels, epilogue), count, channels


def activate(x: Tensor, channels: Channels, epilogue: Epilogue) -> Tensor:
    """Return the output, from per-channel values."""
    y = ACTIVATIONS[epilogue.activation].apply_(_preactivation(x, channels, epilogue.residual))
    return _like_x(apply_mask_(y, epilogue.mask), x)


def backward_reduce(
    grad_output: Tensor, x: Tensor, channels: Channels, epilogue: Epilogue, output_mask: OutputMask
) -> Reduced:
    """Return the sums of this rank, the gradients of weight and bias, and dy."""
    dy = _activation_backward(grad_output, x, channels, epilogue)
    dims = reduced_dims(x)
    pivot = channels.mean.to(accumulation_dtype(x))
    centred = apply_mask_(x - per_channel(pivot, x), epilogue.mask)
    sum_dy = dy.sum(dims, dtype=pivot.dtype).double()
    sum_dy_xmu = centred.mul_(dy).sum(dims).double() + sum_dy * (pivot - channels.mean)
    return reduced_of(sum_dy, sum_dy_xmu, channels, output_mask, dy)


def backward_elemt(
    grad_output: Tensor, x: Tensor, channels: Channels, epilogue: Epilogue, reduced: Reduced, *, count: Tensor
) -> Tensor:
    """Return the gradient of x in its dtype and layout."""
    assert reduced.dy is not None
    scale, slope, shift = grad_input_coefficients(channels, count, reduced.sums)
    grad_input = _affine(x, channels.mean, slope, shift).add_(reduced.dy * per_channel(scale, x))
    return _like_x(apply_mask_(grad_input, epilogue.mask), x)


def _affine(x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return `(x - mean) * scale + shift` for (C,) float64 values, in the accumulation dtype, without cancellation."""
    pivot = mean.to(accumulation_dtype(x))
    shift = shift + (pivot - mean) * scale
    return (x - per_channel(pivot, x)).mul_(per_channel(scale, x)).add_(per_channel(shift, x))


def _preactivation(x: Tensor, channels: Channels, residual: Tensor | None) -> Tensor:
    """Return the input of the activation, in the accumulation dtype."""
    z = _affine(x, channels.mean, *scale_and_shift(channels))
    return z if residual is None else z.add_(residual)


def _activation_backward(grad_output: Tensor, x: Tensor, channels: Channels, epilogue: Epilogue) -> Tensor:
    """Return dy like x; `grad_output` itself if there is neither an activation nor a mask."""
    residual, mask, activation = epilogue
    if activation == "identity":
        return grad_output if mask is None else apply_mask(grad_output, mask)
    z = _preactivation(x, channels, residual)
    return _like_x(apply_mask_(ACTIVATIONS[activation].backward(grad_output.to(z.dtype), z), mask), x)


def _like_x(values: Tensor, x: Tensor) -> Tensor:
    """Return a result in the dtype of x."""
    values = values.to(x.dtype)
    # torch 2.11 loses the gradient of an output that is also an intermediate result; inductor removes the copy
    return values.clone() if torch.compiler.is_compiling() else values
