"""The steps on CPU for contiguous activations, in few calls: most of the work goes to ATen's own kernels.

In contiguous activations these add up float32 within a run of positions, which is handed to them in parts where it is
long, and float64 over runs. They round what they return to float32 and know no pivot: where the mean is far from 0,
activations are centred first. What is not contiguous or masked is left to the verbs.
"""

import math

import torch
from torch import Tensor

from syncbn.activations import ACTIVATIONS
from syncbn.backends import torch_ops
from syncbn.backends.composed import Composed, reduced_of
from syncbn.backends.cpu_layout import constants, has_runs, like, parts_of_run
from syncbn.statistics import Channels, Fused, Gradients, Reduced, Running, Wanted, invstd_of, unpack

MAX_MEAN_OVER_STD = 2.0  # up to which sums about 0 and `x * scale + shift` cost no more than a bit of the result

aten = torch.ops.aten


class Contiguous(Composed):
    """The steps for CPU tensors. Coefficients are pivot, scale and shift of `(x - pivot) * scale + shift`."""

    updates_running = True

    def __init__(self) -> None:
        super().__init__(torch_ops)

    def stats(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and M2 of this rank, in one read of x where the mean is near 0."""
        if not has_runs(x, mask):
            return super().stats(x, mask)
        mean, var, _ = _measured(_values(x))
        count = torch_ops.local_count(x, None)
        return count, mean, var * count

    def normalize(
        self,
        x: Tensor,
        packed: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        fused: Fused,
        *,
        eps: float,
        running: Running | None,
    ) -> tuple[Tensor, Tensor, Tensor, Channels]:
        """Return the output, count, var and what the backward steps need; move the running statistics."""
        if not has_runs(x, fused.mask):
            y, count, var, channels = super().normalize(x, packed, weight, bias, fused, eps=eps, running=None)
        else:
            values = _values(x)
            if packed is None:
                count, (mean, var, pivot) = torch_ops.local_count(x, None), _measured(values)
            else:
                count, mean, var = unpack(packed)
                pivot = _pivot_for(mean, var, values.dtype)
            channels = Channels(mean, invstd_of(var, eps), weight, bias)
            channels = channels._replace(coefficients=_coefficients(channels, pivot, values.dtype))
            z = _preactivation(_centred(values, pivot), channels, fused)
            y = ACTIVATIONS[fused.activation].apply_(z).to(x.dtype)
        if running is not None:
            advance_on_host_(running, count=count.item(), mean=channels.mean, var=var)
        return y, count, var, channels

    def match_layout(self, tensor: Tensor, x: Tensor) -> Tensor:
        """Return the tensor in the layout of x."""
        return like(tensor, x)

    def backward_reduce(
        self, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted
    ) -> Reduced:
        """Return both sums of this rank, the gradients of weight and bias, and dy."""
        if not has_runs(x, fused.mask) or channels.coefficients is None:
            return super().backward_reduce(grad_output, x, channels, fused, wanted)
        values, mean = _pivoted(x, channels)
        dy = _dy(grad_output, x, values, channels, fused)
        origin = mean.to(values.dtype)
        sum_dy, sum_dy_xmu = _sums(dy.to(values.dtype), values, origin)
        sum_dy = sum_dy.double()
        return reduced_of(sum_dy, sum_dy_xmu + sum_dy * (origin - mean), channels, wanted, dy)

    def backward_elemt(
        self,
        grad_output: Tensor,
        x: Tensor,
        channels: Channels,
        fused: Fused,
        wanted: Wanted,
        reduced: Reduced,
        *,
        count: Tensor,
    ) -> Tensor:
        """Return the gradient of x."""
        if not has_runs(x, fused.mask) or channels.coefficients is None:
            return super().backward_elemt(grad_output, x, channels, fused, wanted, reduced, count=count)
        assert reduced.dy is not None
        scale, _ = torch_ops.forward_coefficients(channels)
        slope, shift = torch_ops.slope_and_shift(scale, channels, count, *reduced.sums.chunk(2))
        values, mean = _pivoted(x, channels)
        total = _affine(values, *(row.to(values.dtype) for row in (slope, shift - mean * slope)))
        own, factor = _values(reduced.dy), torch_ops.per_channel(scale, x)
        is_free = fused.activation != "identity" and not wanted.dy  # nobody else has this memory
        return total.add_(own.mul_(factor) if is_free else own * factor).to(x.dtype)

    def backward(
        self, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted, *, count: Tensor
    ) -> Gradients:
        """Return the gradient of x and the others, from one kernel."""
        # of a single channel ATen may think as channels last, and add up all of it in float32
        is_one_kernel = x.shape[1] > 1 and has_runs(x, fused.mask) and _repeats(x) == 1
        if not is_one_kernel or channels.coefficients is None:
            return super().backward(grad_output, x, channels, fused, wanted, count=count)
        values, mean = _pivoted(x, channels)
        dy = _dy(grad_output, x, values, channels, fused)
        weight = None if channels.weight is None else channels.weight.to(values.dtype)
        statistics = mean.to(values.dtype), channels.invstd.to(values.dtype)
        grad_input, grad_weight, grad_bias = aten.native_batch_norm_backward(
            dy.to(values.dtype), values, weight, None, None, *statistics, True, 0.0, [True, True, True]
        )
        grad_weight = None if wanted.weight_dtype is None else grad_weight.to(wanted.weight_dtype)
        grad_bias = None if wanted.bias_dtype is None else grad_bias.to(wanted.bias_dtype)
        return Gradients(grad_input.to(x.dtype), grad_weight, grad_bias, dy)


def advance_on_host_(running: Running, *, count: float, mean: Tensor, var: Tensor) -> None:
    """Do what `statistics.advance_` does where the host knows the count."""
    running_mean, running_var, num_batches_tracked, momentum = running
    if not count > 1:
        return
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        momentum = 1 / num_batches_tracked.item() if momentum is None else momentum
    unbiased_var = var * (count / (count - 1))
    for own, batch in ((running_mean, mean), (running_var, unbiased_var)):
        own.copy_(own.double().lerp_(batch, momentum or 0.0))


def activation_backward_(grad_output: Tensor, z: Tensor, activation: str) -> Tensor:
    """Return the gradient in front of the activation, in the memory of z, which went into it."""
    if activation == "relu":
        return aten.threshold_backward.grad_input(grad_output, z, 0, grad_input=z)
    return z.copy_(ACTIVATIONS[activation].backward(grad_output, z))


def sums_of(dy: Tensor, x: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum(dy) and sum(dy * (x - origin)), (C,) like origin, of ATen's evaluation-mode backward kernel."""
    ones = constants(1, len(origin), origin.dtype)
    _, product, total = aten.native_batch_norm_backward(
        dy, x, None, origin, ones, None, None, False, 0.0, [False, True, True]
    )
    return total, product


def _values(x: Tensor) -> Tensor:
    return x.detach().to(torch_ops.accumulation_dtype(x))


def _centred(values: Tensor, pivot: Tensor | None) -> Tensor:
    return values if pivot is None else values - torch_ops.per_channel(pivot, values)


def _measured(values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return mean and var of this rank, (C,) float64, and the pivot for these values."""
    mean, var = _mean_and_var(values)
    pivot = _pivot_for(mean, var, values.dtype)
    if pivot is None:
        return mean, var, None
    offset, var = _mean_and_var(_centred(values, pivot))
    return pivot + offset, var.clamp_(min=0), pivot


def _mean_and_var(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return both, (C,) float64, for a mean near 0."""
    count = values.numel() // values.shape[1]
    total, square = _sums(values, values, constants(0, values.shape[1], values.dtype))
    mean = total.double() / count
    return mean, (square - total * mean) / count


def _pivot_for(mean: Tensor, var: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return what to subtract first, (C,) in this dtype; None where every mean is near 0."""
    low, high = torch.addcmul(var, mean, mean, value=-(MAX_MEAN_OVER_STD**-2)).aminmax()
    if low.item() >= 0 and high.item() < math.inf:
        return None
    pivot = mean.to(dtype)
    return torch.where(pivot.isfinite(), pivot, 0)  # only where the output is not finite anyway


def _coefficients(channels: Channels, pivot: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return pivot, scale and shift, (3, C) in this dtype."""
    mean, invstd, weight, bias, _ = channels
    scale = invstd if weight is None else invstd * weight
    shift = mean * -scale if pivot is None else (pivot - mean) * scale
    shift = shift if bias is None else shift + bias
    first = constants(0, len(mean), dtype) if pivot is None else pivot
    return torch.stack([first, scale.to(dtype), shift.to(dtype)])


def _pivoted(x: Tensor, channels: Channels) -> tuple[Tensor, Tensor]:
    """Return `x - pivot` and `mean - pivot`, x and mean themselves where no channel has a pivot."""
    assert channels.coefficients is not None
    values, pivot = _values(x), channels.coefficients[0]
    if not pivot.any().item():
        return values, channels.mean
    return _centred(values, pivot), channels.mean - pivot


def _preactivation(values: Tensor, channels: Channels, fused: Fused) -> Tensor:
    """Return what goes into the activation from `x - pivot`, in the accumulation dtype."""
    assert channels.coefficients is not None
    _, scale, shift = channels.coefficients.to(values.dtype).unbind()
    z = _affine(values, scale, shift)
    return z if fused.residual is None else z.add_(fused.residual)


def _dy(grad_output: Tensor, x: Tensor, values: Tensor, channels: Channels, fused: Fused) -> Tensor:
    """Return the gradient in front of the activation, like x; `grad_output` itself where nothing changes."""
    if fused.activation == "identity":
        return grad_output
    z = _preactivation(values, channels, fused)
    return activation_backward_(grad_output.to(z.dtype), z, fused.activation).to(x.dtype)


def _sums(dy: Tensor, values: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum(dy) and sum(dy * (values - origin)), (C,); float64 where runs are added up in parts."""
    repeats = _repeats(values)
    dy, values = (tensor.view(len(tensor), len(origin) * repeats, -1) for tensor in (dy, values))
    if repeats > 1:
        origin = origin.repeat_interleave(repeats)
    total, product = sums_of(dy, values, origin)
    if repeats > 1:
        total, product = (sums.view(-1, repeats).sum(1, dtype=torch.float64) for sums in (total, product))
    return total, product


def _repeats(values: Tensor) -> int:
    return parts_of_run(values.numel() // (values.shape[0] * values.shape[1]))


def _affine(values: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return `values * scale + shift`: normalization by a mean of 0 and a variance of 1."""
    zeros, ones = (constants(value, len(scale), scale.dtype) for value in (0, 1))
    return torch.native_batch_norm(values, scale, shift, zeros, ones, False, 0.0, 0.0)[0]
