"""What torch.compile makes kernels of, for `compiled`: the formulas of `torch_ops` over whole halves of a pass.

Operands come in a common view, per-channel values after them. Sums are over `parts`: in the accumulation dtype value by
value over the streams of a part, which are read side by side, then over its last dimension; over the rest in float64.
What is stacked is written to memory: sums of streams, and per-channel values where elementwise loops read them, which
would compute them again for every element.
"""

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from syncbn.activations import ACTIVATIONS
from syncbn.backends import torch_ops
from syncbn.backends.cpu_layout import cost_little
from syncbn.backends.torch_ops import Affine, accumulation_dtype, per_channel
from syncbn.statistics import Channels, Running, advance_, invstd_of, pack, unpack

Parts = Sequence[Tensor]  # (streams, N, C, ..., run) each, which together are the batch
Operands = Sequence[Tensor | None]  # x, grad_output and residual in one view


def packed(parts: Parts, few: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the vector for the all-reduce, the mean, and whether both are exact; `few` (C, k) are about the mean."""
    mean, M2, is_exact = _measured(parts, few, count)
    return pack(count, mean, M2), mean, is_exact


def normalized_alone(
    x: Tensor,
    residual: Tensor | None,
    parts: Parts,
    few: Tensor,
    count: Tensor,
    is_last: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: Any,
    running: Sequence[Any] | None,
    activation: str,
) -> tuple[Tensor, ...]:
    """Return the output, count, mean, var, invstd, the coefficients, and whether these are exact.

    Running statistics are moved if so, or if no other attempt follows.
    """
    mean, M2, is_exact = _measured(parts, few, count)
    var = M2 / count
    counted = torch.where(is_exact | is_last, count, 0)
    return *_normalized(x, residual, counted, mean, var, weight, bias, eps, running, activation), is_exact


def normalized(
    x: Tensor,
    residual: Tensor | None,
    packed: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: Any,
    running: Sequence[Any] | None,
    activation: str,
) -> tuple[Tensor, ...]:
    """Return the output, count, mean, var, invstd and the coefficients; move the running statistics."""
    return _normalized(x, residual, *unpack(packed), weight, bias, eps, running, activation)


def dy(
    x: Tensor,
    grad_output: Tensor,
    residual: Tensor | None,
    pivot: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
) -> Tensor:
    """Return the gradient in front of the activation, like x."""
    if activation == "identity":
        return grad_output
    z = torch_ops.preactivation(x, _affine(x, pivot, scale, shift), residual)
    return torch_ops.activation_backward(grad_output, z, activation).to(x.dtype)


def backward_sums(
    parts: Sequence[Operands],
    pivot: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    activation: str,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return sum(dy) and sum(dy * (x - mean)), (2C,), and the gradients of weight and bias."""

    def terms(x: Tensor, grad_output: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        centred = x - per_channel(pivot, x)
        own = dy(x, grad_output, residual, pivot, scale, shift, activation).to(centred.dtype)
        return own, own * centred

    sum_dy, sum_dy_centred = _sums(terms, parts)
    sum_dy_xmu = sum_dy_centred + sum_dy * (pivot - mean)
    grad_weight = None if weight_dtype is None else (sum_dy_xmu * invstd).to(weight_dtype)
    grad_bias = None if bias_dtype is None else sum_dy.to(bias_dtype, copy=True)
    return torch.cat([sum_dy, sum_dy_xmu]), grad_weight, grad_bias


def grad_input(
    x: Tensor,
    grad_output: Tensor,
    residual: Tensor | None,
    pivot: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    sums: Tensor,
    activation: str,
) -> Tensor:
    """Return the gradient of x."""
    channels = Channels(mean, invstd, None, None)
    slope, offset = torch_ops.slope_and_shift(scale.double(), channels, count, *sums.chunk(2))
    offset = offset + (pivot - mean) * slope
    slope, offset = torch.stack([value.to(pivot.dtype) for value in (slope, offset)])
    own = dy(x, grad_output, residual, pivot, scale, shift, activation)
    return _affine(x, pivot, slope, offset)(x).add_(own * per_channel(scale, x)).to(x.dtype)


def backward_alone(
    x: Tensor,
    grad_output: Tensor,
    residual: Tensor | None,
    parts: Sequence[Operands],
    pivot: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
    activation: str,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight and bias."""
    rows = (pivot, scale, shift, mean, invstd)
    sums, grad_weight, grad_bias = backward_sums(parts, *rows, activation, weight_dtype, bias_dtype)
    return grad_input(x, grad_output, residual, *rows, count, sums, activation), grad_weight, grad_bias


def _measured(parts: Parts, few: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and M2, (C,) float64, and whether they are exact: the mean of `few` is near the mean."""
    pivot = few.mean(-1, dtype=accumulation_dtype(few))

    def terms(x: Tensor) -> tuple[Tensor, Tensor]:
        centred = x - per_channel(pivot, x)
        return centred, centred.square()

    total, square = _sums(terms, [(part,) for part in parts])
    offset = total / count
    M2 = (square - total * offset).clamp(min=0)
    return pivot + offset, M2, cost_little(offset.square() * count, M2)


def _normalized(
    x: Tensor,
    residual: Tensor | None,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: Any,
    running: Sequence[Any] | None,
    activation: str,
) -> tuple[Tensor, ...]:
    if running is not None:
        advance_(Running(*running), count=count, mean=mean, var=var)
    invstd = invstd_of(var, eps)
    scale, shift = torch_ops.forward_coefficients(Channels(mean, invstd, weight, bias))
    pivot = mean.to(accumulation_dtype(x))
    pivot = torch.where(pivot.isfinite(), pivot, 0)  # only where the output is not finite anyway
    rows = (pivot, scale, shift + (pivot - mean) * scale)
    coefficients = torch.stack([row.to(pivot.dtype) for row in rows])
    z = torch_ops.preactivation(x, _affine(x, *coefficients), residual)
    return ACTIVATIONS[activation].apply_(z).to(x.dtype), count, mean, var, invstd, coefficients


def _affine(x: Tensor, *values: Tensor) -> Affine:
    return Affine(*(per_channel(value, x) for value in values))


def _sums(terms: Callable[..., tuple[Tensor, Tensor]], parts: Sequence[Operands]) -> list[Tensor]:
    """Return the sums of both terms of operands, (C,) float64 each."""
    sums = []
    for operands in parts:
        assert operands[0] is not None
        none = [None] * operands[0].shape[0]
        streams = zip(*(none if part is None else part.unbind() for part in operands), strict=True)
        added = [reduce(operator.add, values) for values in zip(*(terms(*stream) for stream in streams), strict=True)]
        if len(none) > 1:
            added = [values.movedim(-1, 1) for values in torch.stack([values.movedim(1, -1) for values in added])]
        sums.append([values.sum(-1).double().sum([0, *range(2, values.dim() - 1)]) for values in added])
    return [reduce(operator.add, values) for values in zip(*sums, strict=True)]
