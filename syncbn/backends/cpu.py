"""The steps on CPU, from ATen's vectorized kernels, on a part of the batch at a time so that temporaries stay in cache.

There ATen's training-mode kernels are slow or accumulate in float32 over the whole batch. The kernels used here are
those that have neither fault: normalization in evaluation mode, which is `x * scale + shift`, and its backward sums,
`sum(dy)` and `sum(dy * (x - mean))` in one read. Their accumulators get short runs: the batch is viewed with more
channels than it has, each of them a part of a true one, and the rest is added in float64.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.activations import ACTIVATIONS
from syncbn.backends import torch_ops
from syncbn.backends.composed import Composed, reduced
from syncbn.backends.torch_ops import accumulation_dtype, reduced_dims
from syncbn.statistics import Channels, Reduced

PART_ELEMENTS = 2**19  # 2 MB of float32; smaller parts pay more for calls than they gain in the cache
MAX_RUN = 1024  # values that one float32 accumulator adds up: 1e-7 relative error at random signs
MAX_SPREAD_CHANNELS = 4096  # accumulators side by side that stay in the first-level cache
MAX_MEAN_OVER_STD = 8.0  # up to which `x * scale + shift` costs no more than a bit of the result
MAX_SQUARES = 4.0  # over the variance, up to which `sum(x * (x - pivot))` costs no more than a bit of it

aten = torch.ops.aten


class View(NamedTuple):
    """How x and its like are read: (N, C * repeats, S / repeats), channels last (N * S / repeats, repeats * C)."""

    shape: tuple[int, ...]
    num_channels: int
    repeats: int
    is_channels_last: bool

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of `tensor`, which has the layout of x."""
        return (tensor.movedim(1, -1) if self.is_channels_last else tensor).view(self.shape)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Return (..., C) values for each channel of the view, in the accumulation dtype."""
        values, shape = values.to(accumulation_dtype(x)), values.shape[:-1]
        if self.repeats > 1:
            repeated = values[..., None, :] if self.is_channels_last else values[..., None]
            values = repeated.expand(*shape, *self._parts_of_channels()).reshape(*shape, -1)
        return values.contiguous()  # the kernels do not look at strides

    def broadcast(self, values: Tensor) -> Tensor:
        """Return `spread` values in the shape that broadcasts over the view."""
        return values if self.is_channels_last else values[:, None]

    def fold(self, values: Tensor) -> Tensor:
        """Return (..., C) sums, float64, over the parts of each true channel."""
        if self.repeats == 1:
            return values.double()
        parts = values.view(*values.shape[:-1], *self._parts_of_channels())
        return parts.sum(-2 if self.is_channels_last else -1, dtype=torch.float64)

    def _parts_of_channels(self) -> tuple[int, int]:
        own = (self.num_channels, self.repeats)
        return own[::-1] if self.is_channels_last else own

    def sample_mean(self, x: Tensor) -> Tensor:
        """Return a guess of the mean, (C,) float64."""
        sample = self.of(x)[:1].to(accumulation_dtype(x))
        return self.fold(sample.sum(reduced_dims(sample))) / (sample.numel() / self.num_channels)

    def parts(self) -> Iterator[slice]:
        """Yield the parts of the view that are worked on one after the other."""
        size = max(1, PART_ELEMENTS // math.prod(self.shape[1:]))
        if self.is_channels_last:
            size = min(size, MAX_RUN)
        for start in range(0, self.shape[0], size):
            yield slice(start, start + size)


def view_of(x: Tensor) -> View | None:
    """Return how to read x; None where these kernels have no use for it."""
    if type(x) not in (Tensor, torch.nn.Parameter) or not x.is_floating_point() or x.numel() == 0:
        return None
    is_channels_last = x.movedim(1, -1).is_contiguous()
    return _view(x.shape, is_channels_last) if is_channels_last or x.is_contiguous() else None


@lru_cache
def _view(shape: torch.Size, is_channels_last: bool) -> View | None:
    num_channels, spatial = shape[1], math.prod(shape[2:])
    if not is_channels_last:
        repeats = next(d for d in _divisors(spatial) if spatial // d <= MAX_RUN)
        run = spatial // repeats
        view = View((shape[0], num_channels * repeats, run), num_channels, repeats, False)
        return view if run >= 16 or repeats == 1 else None
    rows = shape[0] * spatial
    repeats = max(d for d in _divisors(rows) if d == 1 or d * num_channels <= MAX_SPREAD_CHANNELS)
    return View((rows // repeats, repeats * num_channels), num_channels, repeats, True)


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """Return the tensor in the layout of x."""
    return tensor if tensor.stride() == x.stride() else torch.empty_like(x).copy_(tensor)


class Cpu(Composed):
    """The steps for CPU tensors, contiguous or channels last; what is masked or of another layout goes to the verbs."""

    max_mean_over_std = MAX_MEAN_OVER_STD

    def __init__(self) -> None:
        super().__init__(torch_ops)

    def stats(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and M2 of this rank in one read of x, or in two where the mean is far from 0."""
        view = view_of(x) if mask is None else None
        if view is None:
            return super().stats(x, mask)
        flat, count = view.of(x), torch_ops.local_count(x, None)
        mean = view.sample_mean(x)
        for is_centred in (False, True):
            pivot = mean.to(accumulation_dtype(x))
            origin = view.spread(pivot, x)
            sums: Tensor | None = None
            for part in view.parts():
                values = flat[part].to(origin.dtype)
                if is_centred:
                    values = values - view.broadcast(origin)
                sums = _add(sums, values, values, _constant(0, origin) if is_centred else origin, view)
            assert sums is not None
            total, product = sums
            mean = total / count
            mean = mean + pivot if is_centred else mean
            offset = mean - pivot
            M2 = product - total * offset
            if ((mean.square() + offset.square()) * count <= MAX_SQUARES * M2).all():
                break
        return count, mean, M2.clamp(min=0)

    def channels(self, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Channels:
        """Return what the elementwise steps need, with their coefficients."""
        channels = Channels(mean, invstd, weight, bias)
        return channels._replace(coefficients=coefficients_of(channels, self.max_mean_over_std))

    def elemt(
        self, x: Tensor, channels: Channels, *, residual: Tensor | None, mask: Tensor | None, activation: str
    ) -> Tensor:
        """Return the output."""
        view = view_of(x) if mask is None else None
        if view is None:
            return super().elemt(x, channels, residual=residual, mask=mask, activation=activation)
        y = torch.empty_like(x)
        output = view.of(y)
        preactivation = _Affine(x, coefficients_of(channels), view)
        added = None if residual is None else view.of(like(residual, x))
        for part in view.parts():
            z = preactivation.of(part, out=output[part])
            if added is not None:
                z += added[part]
            z = ACTIVATIONS[activation].apply_(z)
            if z.dtype != x.dtype:
                output[part] = z
        return y

    def match_layout(self, tensor: Tensor, x: Tensor) -> Tensor:
        """Return the tensor in the layout of x."""
        return like(tensor, x)

    def backward_reduce(
        self,
        grad_output: Tensor,
        x: Tensor,
        channels: Channels,
        *,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: str,
        weight_dtype: torch.dtype | None,
        bias_dtype: torch.dtype | None,
        needs_dy: bool,
    ) -> Reduced:
        """Return both sums of this rank, the gradients of weight and bias, and dy."""
        view = view_of(x) if mask is None else None
        if view is None:
            return super().backward_reduce(
                grad_output,
                x,
                channels,
                residual=residual,
                mask=mask,
                activation=activation,
                weight_dtype=weight_dtype,
                bias_dtype=bias_dtype,
                needs_dy=needs_dy,
            )
        dy = grad_output if activation == "identity" else torch.empty_like(x)
        flat, gradient, gradient_in = view.of(x), view.of(grad_output), view.of(dy)
        pivot = channels.mean.to(accumulation_dtype(x))
        origin = view.spread(pivot, x)
        if activation != "identity":
            preactivation = _Affine(x, coefficients_of(channels), view)
        added = None if residual is None else view.of(like(residual, x))
        sums: Tensor | None = None
        for part in view.parts():
            if activation != "identity":
                z = preactivation.of(part, out=gradient_in[part])
                if added is not None:
                    z += added[part]
                own = gradient[part].to(z.dtype)
                if activation == "relu":
                    aten.threshold_backward.grad_input(own, z, 0, grad_input=z)
                else:
                    z.copy_(ACTIVATIONS[activation].backward(own, z))
                if z.dtype != x.dtype:
                    gradient_in[part] = z
            sums = _add(sums, gradient_in[part].to(origin.dtype), flat[part].to(origin.dtype), origin, view)
        assert sums is not None
        sum_dy, sum_dy_xmu = sums
        sum_dy_xmu += sum_dy * (pivot - channels.mean)
        return reduced(sum_dy, sum_dy_xmu, channels, dy, weight_dtype=weight_dtype, bias_dtype=bias_dtype)

    def backward_elemt(
        self,
        grad_output: Tensor,
        x: Tensor,
        channels: Channels,
        *,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: str,
        dy: Tensor | None,
        keeps_dy: bool,
        count: Tensor,
        sums: Tensor,
    ) -> Tensor:
        """Return the gradient of x, in the memory of dy where nobody else has it."""
        view = view_of(x) if mask is None else None
        if view is None:
            return super().backward_elemt(
                grad_output,
                x,
                channels,
                residual=residual,
                mask=mask,
                activation=activation,
                dy=dy,
                keeps_dy=keeps_dy,
                count=count,
                sums=sums,
            )
        assert dy is not None
        grad_input = dy if activation != "identity" and not keeps_dy else torch.empty_like(x)
        gradient, result = view.of(dy), view.of(grad_input)
        pivot, scale, _ = coefficients_of(channels)
        slope, shift = torch_ops.slope_and_shift(scale, channels, count, *sums.chunk(2))
        linear = _Affine(x, torch.stack([pivot, slope, shift + (pivot - channels.mean) * slope]), view)
        scale = view.broadcast(view.spread(scale, x))
        for part in view.parts():
            term, own = linear.of(part), gradient[part]
            if view.is_channels_last and own.dtype == term.dtype:
                torch.addcmul(term, own, scale, out=result[part])
            elif own.dtype == term.dtype:  # two fast kernels against one slow
                torch.mul(own, scale, out=result[part]).add_(term)
            else:
                result[part].copy_(term.addcmul_(own, scale))
        return grad_input


def coefficients_of(channels: Channels, max_mean_over_std: float = MAX_MEAN_OVER_STD) -> Tensor:
    """Return pivot, scale and shift of `(x - pivot) * scale + shift`, (3, C) float64; pivot 0 where nothing cancels."""
    if channels.coefficients is not None:
        return channels.coefficients
    cancels = (channels.mean * channels.invstd).abs() > max_mean_over_std
    pivot = torch.where(cancels, channels.mean.float(), 0)
    scale, shift = torch_ops.forward_coefficients(channels)
    return torch.stack([pivot, scale, shift + (pivot - channels.mean) * scale])


class _Affine:
    """`(x - pivot) * scale + shift` of a part, in the accumulation dtype."""

    def __init__(self, x: Tensor, coefficients: Tensor, view: View) -> None:
        self.values = view.of(x)
        pivot, self.scale, self.shift = view.spread(coefficients, x)
        self.pivot = view.broadcast(pivot) if coefficients[0].any() else None
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
        return aten.native_batch_norm.out(
            values, self.scale, self.shift, _constant(0, self.scale), _constant(1, self.scale), False, 0.0, 0.0,
            out=out, save_mean=_constants(0, 0, out.dtype), save_invstd=_constants(0, 0, out.dtype),
        )[0]  # fmt: skip


def _add(sums: Tensor | None, dy: Tensor, x: Tensor, mean: Tensor, view: View) -> Tensor:
    """Return `sums` plus sum(dy) and sum(dy * (x - mean)) of a part, (2, C) float64."""
    _, product, total = aten.native_batch_norm_backward(
        dy, x, None, mean, _constant(1, mean), None, None, False, 0.0, [False, True, True]
    )
    own = view.fold(torch.stack([total, product]))
    return own if sums is None else sums.add_(own)


def _constant(value: float, like: Tensor) -> Tensor:
    return _constants(value, like.shape[0], like.dtype)


@lru_cache
def _constants(value: float, size: int, dtype: torch.dtype) -> Tensor:
    return torch.full((size,), value, dtype=dtype)  # nobody writes to it


def _divisors(number: int) -> list[int]:
    """Return all divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
