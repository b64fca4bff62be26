"""The steps on CPU for large activations, channels last or in half precision, in parts so that temporaries stay small.

There ATen's training-mode kernels are slow or accumulate in float32 over the whole batch. The kernels used here are
those that have neither fault: `x * scale + shift`, and the backward sums of normalization in evaluation mode, `sum(dy)`
and `sum(dy * (x - mean))` in one read. Their accumulators get short runs: the batch is viewed with more channels than
it has, each of them a part of a true one, and the rest is added in float64.
"""

import numpy as np
import torch
from torch import Tensor

from syncbn.activations import ACTIVATIONS
from syncbn.backends import torch_ops
from syncbn.backends.composed import Composed, reduced_of
from syncbn.backends.cpu_contiguous import Contiguous, activation_backward_, advance_on_host_, sums_of
from syncbn.backends.cpu_layout import Array, View, constants, cost_little, like, view_of
from syncbn.statistics import Channels, Fused, Gradients, Reduced, Running, Wanted, invstd_of, unpack

MAX_MEAN_OVER_STD = 8.0  # up to which `x * scale + shift` costs no more than a bit of the result

aten = torch.ops.aten


class Cpu(Contiguous):
    """The steps for CPU tensors; what is contiguous or small is left to `Contiguous`."""

    def stats(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and M2 of this rank in one read of x, or in two where the mean is far from 0."""
        view = view_of(x) if mask is None else None
        if view is None:
            return super().stats(x, mask)
        with np.errstate(all="ignore"):
            mean, M2 = _mean_and_M2(x, view)
        return torch_ops.local_count(x, None), torch.from_numpy(mean), torch.from_numpy(M2)

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
        """Return the output, count, var and what the backward steps need."""
        view = view_of(x) if fused.mask is None else None
        if view is None:
            return super().normalize(x, packed, weight, bias, fused, eps=eps, running=running)
        if packed is None:
            count, mean, M2 = self.stats(x, None)
            var = M2 / count
        else:
            count, mean, var = unpack(packed)
        channels = Channels(mean, invstd_of(var, eps), weight, bias)
        channels = channels._replace(coefficients=coefficients_of(channels))
        y = torch.empty_like(x)
        output = view.of(y)
        preactivation = _Affine(x, coefficients_of(channels).numpy(), view)
        added = None if fused.residual is None else view.of(like(fused.residual, x))
        for part in view.parts():
            z = preactivation.of(part, out=output[part])
            if added is not None:
                z += added[part]
            z = ACTIVATIONS[fused.activation].apply_(z)
            if z.dtype != x.dtype:
                output[part] = z
        if running is not None:
            advance_on_host_(running, count=count.item(), mean=mean, var=var)
        return y, count, var, channels

    def backward_reduce(
        self, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted
    ) -> Reduced:
        """Return both sums of this rank, the gradients of weight and bias, and dy."""
        view = view_of(x) if fused.mask is None else None
        if view is None:
            return super().backward_reduce(grad_output, x, channels, fused, wanted)
        residual, _, activation = fused
        dy = grad_output if activation == "identity" else torch.empty_like(x)
        flat, gradient, gradient_in = view.of(x), view.of(grad_output), view.of(dy)
        mean = channels.mean.numpy()
        origin = view.spread(mean, x)
        if activation != "identity":
            preactivation = _Affine(x, coefficients_of(channels).numpy(), view)
        added = None if residual is None else view.of(like(residual, x))
        sums = np.zeros((2, len(origin)))
        for part in view.parts():
            if activation != "identity":
                z = preactivation.of(part, out=gradient_in[part])
                if added is not None:
                    z += added[part]
                z = activation_backward_(gradient[part].to(z.dtype), z, activation)
                if z.dtype != x.dtype:
                    gradient_in[part] = z
            sums += _sums(gradient_in[part].to(origin.dtype), flat[part].to(origin.dtype), origin)
        sum_dy, sum_dy_xmu = map(view.fold, sums)
        sum_dy_xmu += sum_dy * (mean.astype(origin.numpy().dtype) - mean)  # what rounding the mean has left
        return reduced_of(torch.from_numpy(sum_dy), torch.from_numpy(sum_dy_xmu), channels, wanted, dy)

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
        """Return the gradient of x, in the memory of dy where nobody else has it."""
        view, dy = view_of(x) if fused.mask is None else None, reduced.dy
        if view is None:
            return super().backward_elemt(grad_output, x, channels, fused, wanted, reduced, count=count)
        assert dy is not None
        grad_input = dy if fused.activation != "identity" and not wanted.dy else torch.empty_like(x)
        gradient, result = view.of(dy), view.of(grad_input)
        with np.errstate(all="ignore"):
            scale, coefficients = grad_input_coefficients(channels, count, reduced.sums)
        linear = _Affine(x, coefficients, view)
        factor = view.broadcast(view.spread(scale, x))
        for part in view.parts():
            term, own = linear.of(part), gradient[part]
            if own.dtype == term.dtype:
                torch.addcmul(term, own, factor, out=result[part])
            else:
                result[part].copy_(term.addcmul_(own, factor))
        return grad_input

    def backward(
        self, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted, *, count: Tensor
    ) -> Gradients:
        """Return the gradient of x and the others."""
        if fused.mask is None and view_of(x) is not None:  # the steps of this class
            return Composed.backward(self, grad_output, x, channels, fused, wanted, count=count)
        return super().backward(grad_output, x, channels, fused, wanted, count=count)


def coefficients_of(channels: Channels) -> Tensor:
    """Return pivot, scale and shift of `(x - pivot) * scale + shift`, (3, C) float64; pivot 0 where nothing cancels."""
    if channels.coefficients is not None:
        return channels.coefficients
    mean, invstd = channels.mean.numpy(), channels.invstd.numpy()
    with np.errstate(all="ignore"):
        rounded = mean.astype(np.float32).astype(np.float64)
        rounded = np.where(np.isfinite(rounded), rounded, mean)
        pivot = np.where(np.abs(mean * invstd) > MAX_MEAN_OVER_STD, rounded, 0)
        scale = invstd if channels.weight is None else invstd * _float64(channels.weight)
        shift = (pivot - mean) * scale
        if channels.bias is not None:
            shift += _float64(channels.bias)
    return torch.from_numpy(np.stack([pivot, scale, shift]))


def grad_input_coefficients(channels: Channels, count: Tensor, sums: Tensor) -> tuple[Array, Array]:
    """Return `a`, (C,), and pivot, scale and shift, (3, C), of `grad_input = dy * a + (x - pivot) * scale + shift`."""
    pivot, scale, _ = coefficients_of(channels).double().numpy()  # of the compiled backend they are float32
    sum_dy, sum_dy_xmu = sums.numpy().reshape(2, -1)
    factor = -scale / max(float(count), 1.0)
    slope = factor * np.square(channels.invstd.numpy()) * sum_dy_xmu
    return scale, np.stack([pivot, slope, factor * sum_dy + (pivot - channels.mean.numpy()) * slope])


def _float64(values: Tensor) -> Array:
    array: Array = values.detach().to(torch.float64, copy=True).numpy()  # of a copy: FSDP resizes what it shards
    return array


def _mean_and_M2(x: Tensor, view: View) -> tuple[Array, Array]:
    """Return both of this rank, (C,) float64; the first pass is enough unless the mean is far from 0."""
    flat, count = view.of(x), x.numel() // view.num_channels
    pivot = view.guess_of_mean(x)
    for is_centred in (False, True, True):
        origin = view.spread(pivot, x)
        pivot = pivot.astype(origin.numpy().dtype).astype(np.float64)
        sums = np.zeros((2, len(origin)))
        for part in view.parts():
            values = flat[part].to(origin.dtype)
            if is_centred:
                values = values - view.broadcast(origin)
            sums += _sums(values, values, _constant(0, origin) if is_centred else origin)
        total, product = map(view.fold, sums)
        mean = total / count + (pivot if is_centred else 0)
        offset = mean - pivot
        M2 = product - total * offset
        squares = 16 * offset**2 if is_centred else offset**2 + mean**2  # the rest of a bad mean costs its square
        pivot = mean
        if cost_little(squares * count, M2):
            break
    return mean, np.maximum(M2, 0)


class _Affine:
    """`(x - pivot) * scale + shift` of a part, in the accumulation dtype."""

    def __init__(self, x: Tensor, coefficients: Array, view: View) -> None:
        pivot, scale, shift = coefficients
        self.values, self.is_channels_last = view.of(x), view.is_channels_last
        self.scale, self.shift = view.spread(scale, x), view.spread(shift, x)
        self.pivot = view.broadcast(view.spread(pivot, x)) if pivot.any() else None
        self.buffer: Tensor | None = None

    def of(self, part: slice, out: Tensor | None = None) -> Tensor:
        """Return the values of a part: in `out` where that has the dtype for it, else in memory that the next uses."""
        values = self.values[part].to(self.scale.dtype)
        if self.pivot is not None:
            values = values - self.pivot
        if out is None or out.dtype != values.dtype:
            if self.buffer is None:
                self.buffer = torch.empty_like(values)
            out = self.buffer[: values.shape[0]]
        if self.is_channels_last:
            return torch.addcmul(self.shift, values, self.scale, out=out)
        return aten.native_batch_norm.out(
            values, self.scale, self.shift, _constant(0, self.scale), _constant(1, self.scale), False, 0.0, 0.0,
            out=out, save_mean=constants(0, 0, out.dtype), save_invstd=constants(0, 0, out.dtype),
        )[0]  # fmt: skip


def _sums(dy: Tensor, x: Tensor, mean: Tensor) -> Array:
    """Return sum(dy) and sum(dy * (x - mean)) for each channel of a view, (2, K) float64."""
    return np.stack([sums.numpy() for sums in sums_of(dy, x, mean)]).astype(np.float64)


def _constant(value: float, like: Tensor) -> Tensor:
    return constants(value, like.shape[0], like.dtype)
