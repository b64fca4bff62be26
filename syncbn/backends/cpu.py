"""The steps on CPU, from ATen's vectorized kernels, on a part of the batch at a time so that temporaries stay in cache.

There ATen's training-mode kernels are slow or accumulate in float32 over the whole batch. The kernels used here are
those that have neither fault: normalization in evaluation mode, which is `x * scale + shift`, and its backward sums,
`sum(dy)` and `sum(dy * (x - mean))` in one read. Their accumulators get short runs: the batch is viewed with more
channels than it has, each of them a part of a true one, and the rest is added in float64. Per-channel values are worked
on in NumPy, whose calls cost a fraction of torch's.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from syncbn.activations import ACTIVATIONS
from syncbn.backends import torch_ops
from syncbn.backends.composed import Composed, reduced
from syncbn.backends.torch_ops import accumulation_dtype
from syncbn.statistics import Channels, Reduced, Running

MIN_ELEMENTS = 2**18  # below, plain operations are as fast: their calls are fewer
PART_ELEMENTS = 2**20  # 4 MB of float32; smaller parts pay more for calls than they gain in the cache
MAX_RUN = 1024  # values of a contiguous run; 16 accumulators side by side share it
MAX_ROWS = 64  # values that one accumulator adds up: below 5e-7 relative error of a sum of squares in float32
MAX_SPREAD_CHANNELS = 2**14  # accumulators side by side; as many as make a part of `MAX_ROWS` rows
GUESS_FROM = 16  # values: their mean is rarely off by more than a standard deviation
MAX_MEAN_OVER_STD = 8.0  # up to which `x * scale + shift` costs no more than a bit of the result
MAX_SQUARES = 4.0  # over the variance, up to which `sum(x * (x - pivot))` costs no more than a bit of it

Array = npt.NDArray[Any]

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

    def spread(self, values: Array, x: Tensor) -> Tensor:
        """Return (C,) values for each channel of the view, in the accumulation dtype of x."""
        values = values.astype(np.float64 if x.dtype == torch.float64 else np.float32)
        if self.repeats > 1:
            shape = self._parts_of_channels()
            values = np.broadcast_to(values if self.is_channels_last else values[:, None], shape)
            values = np.ascontiguousarray(values.reshape(-1))  # the kernels do not look at strides
        return torch.from_numpy(values)

    def broadcast(self, values: Tensor) -> Tensor:
        """Return `spread` values in the shape that broadcasts over the view."""
        return values if self.is_channels_last else values[:, None]

    def fold(self, values: Array) -> Array:
        """Return the sums, (C,) float64, over the parts of each true channel."""
        if self.repeats == 1:
            return values.astype(np.float64)
        return values.reshape(self._parts_of_channels()).sum(0 if self.is_channels_last else 1, dtype=np.float64)

    def _parts_of_channels(self) -> tuple[int, int]:
        own = (self.num_channels, self.repeats)
        return own[::-1] if self.is_channels_last else own

    def guess_of_mean(self, x: Tensor) -> Array:
        """Return the mean of a few values, (C,) float64."""
        flat = self.of(x.detach())
        few = flat[: -(-GUESS_FROM // self.repeats)] if self.is_channels_last else flat[0, :, :GUESS_FROM].T
        sums = few.to(accumulation_dtype(x)).sum(0).numpy()
        return self.fold(sums) / (len(few) * self.repeats)

    def parts(self) -> Iterator[slice]:
        """Yield the parts of the view that are worked on one after the other."""
        size = max(1, PART_ELEMENTS // math.prod(self.shape[1:]))
        if self.is_channels_last:
            size = min(size, MAX_ROWS)
        for start in range(0, self.shape[0], size):
            yield slice(start, start + size)


def is_large(x: Tensor) -> bool:
    """Return whether x is a plain tensor of some size, for which kernels other than plain operations are worth it."""
    if type(x) not in (Tensor, torch.nn.Parameter) or not x.is_floating_point() or x.is_neg():
        return False
    return x.numel() >= max(MIN_ELEMENTS, 1)


def view_of(x: Tensor) -> View | None:
    """Return how to read x; None where these kernels have no use for it."""
    if not is_large(x):
        return None
    is_channels_last = x.movedim(1, -1).is_contiguous()
    return _view(x.shape, is_channels_last) if is_channels_last or x.is_contiguous() else None


@lru_cache
def _view(shape: torch.Size, is_channels_last: bool) -> View | None:
    num_channels, spatial = shape[1], math.prod(shape[2:])
    if not is_channels_last:
        repeats = next(d for d in divisors(spatial) if spatial // d <= MAX_RUN)
        run = spatial // repeats
        view = View((shape[0], num_channels * repeats, run), num_channels, repeats, False)
        return view if run >= 16 or repeats == 1 else None
    rows = shape[0] * spatial
    repeats = max(d for d in divisors(rows) if d == 1 or d * num_channels <= MAX_SPREAD_CHANNELS)
    return View((rows // repeats, repeats * num_channels), num_channels, repeats, True)


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """Return the tensor in the layout of x."""
    return tensor if tensor.stride() == x.stride() and not tensor.is_neg() else torch.empty_like(x).copy_(tensor)


class Cpu(Composed):
    """The steps for CPU tensors, contiguous or channels last; what is small, masked or else goes to the verbs."""

    def __init__(self) -> None:
        super().__init__(torch_ops)

    def stats(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and M2 of this rank in one read of x, or in two where the mean is far from 0."""
        view = view_of(x) if mask is None else None
        if view is None:
            return super().stats(x, mask)
        with np.errstate(all="ignore"):
            mean, M2 = _mean_and_M2(x, view)
        return torch_ops.local_count(x, None), torch.from_numpy(mean), torch.from_numpy(M2)

    def gather_stats(
        self, packed: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, running: Running | None
    ) -> tuple[Tensor, Tensor, Channels]:
        """Return count, var and what the elementwise steps need, with coefficients where they will use them."""
        count, var, channels = super().gather_stats(packed, weight, bias, eps=eps, running=running)
        is_large = type(count) is Tensor and float(count.numpy()) * len(var) >= MIN_ELEMENTS  # some rank's x may be
        return count, var, _prepared(channels) if is_large else channels

    def own_stats(
        self,
        x: Tensor,
        mask: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        eps: float,
        running: Running | None,
    ) -> tuple[Tensor, Tensor, Channels]:
        """Return the same for this rank alone."""
        count, var, channels = super().own_stats(x, mask, weight, bias, eps=eps, running=running)
        return count, var, _prepared(channels) if is_large(x) else channels

    def elemt(
        self, x: Tensor, channels: Channels, *, residual: Tensor | None, mask: Tensor | None, activation: str
    ) -> Tensor:
        """Return the output."""
        view = view_of(x) if mask is None else None
        if view is None:
            return super().elemt(x, channels, residual=residual, mask=mask, activation=activation)
        y = torch.empty_like(x)
        output = view.of(y)
        preactivation = _Affine(x, coefficients_of(channels).numpy(), view)
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
                own = gradient[part].to(z.dtype)
                if activation == "relu":
                    aten.threshold_backward.grad_input(own, z, 0, grad_input=z)
                else:
                    z.copy_(ACTIVATIONS[activation].backward(own, z))
                if z.dtype != x.dtype:
                    gradient_in[part] = z
            sums += _sums(gradient_in[part].to(origin.dtype), flat[part].to(origin.dtype), origin)
        sum_dy, sum_dy_xmu = map(view.fold, sums)
        sum_dy_xmu += sum_dy * (mean.astype(origin.numpy().dtype) - mean)  # what rounding the mean has left
        return reduced_of(sum_dy, sum_dy_xmu, channels, dy, weight_dtype, bias_dtype)

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
        with np.errstate(all="ignore"):
            scale, coefficients = grad_input_coefficients(channels, count, sums)
        linear = _Affine(x, coefficients, view)
        factor = view.broadcast(view.spread(scale, x))
        for part in view.parts():
            term, own = linear.of(part), gradient[part]
            if view.is_channels_last and own.dtype == term.dtype:
                torch.addcmul(term, own, factor, out=result[part])
            elif own.dtype == term.dtype:  # two fast kernels against one slow
                torch.mul(own, factor, out=result[part]).add_(term)
            else:
                result[part].copy_(term.addcmul_(own, factor))
        return grad_input


def coefficients_of(channels: Channels, max_mean_over_std: float = MAX_MEAN_OVER_STD) -> Tensor:
    """Return pivot, scale and shift of `(x - pivot) * scale + shift`, (3, C) float64; pivot 0 where nothing cancels."""
    if channels.coefficients is not None:
        return channels.coefficients
    mean, invstd = channels.mean.numpy(), channels.invstd.numpy()
    with np.errstate(all="ignore"):
        rounded = mean.astype(np.float32).astype(np.float64)
        rounded = np.where(np.isfinite(rounded), rounded, mean)
        pivot = np.where(np.abs(mean * invstd) > max_mean_over_std, rounded, 0)
        scale = invstd if channels.weight is None else invstd * _float64(channels.weight)
        shift = (pivot - mean) * scale
        if channels.bias is not None:
            shift += _float64(channels.bias)
    return torch.from_numpy(np.stack([pivot, scale, shift]))


def grad_input_coefficients(channels: Channels, count: Tensor, sums: Tensor) -> tuple[Array, Array]:
    """Return `a`, (C,), and pivot, scale and shift, (3, C), of `grad_input = dy * a + (x - pivot) * scale + shift`."""
    pivot, scale, _ = coefficients_of(channels).numpy()
    sum_dy, sum_dy_xmu = sums.numpy().reshape(2, -1)
    factor = -scale / max(float(count), 1.0)
    slope = factor * np.square(channels.invstd.numpy()) * sum_dy_xmu
    return scale, np.stack([pivot, slope, factor * sum_dy + (pivot - channels.mean.numpy()) * slope])


def reduced_of(
    sum_dy: Array,
    sum_dy_xmu: Array,
    channels: Channels,
    dy: Tensor | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> Reduced:
    """Return both sums, (C,) float64, with the gradients of weight and bias."""
    tensors = (torch.from_numpy(sum_dy), torch.from_numpy(sum_dy_xmu))
    return reduced(*tensors, channels, dy, weight_dtype=weight_dtype, bias_dtype=bias_dtype)


def _prepared(channels: Channels) -> Channels:
    return channels._replace(coefficients=coefficients_of(channels))


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
        if (squares * count <= MAX_SQUARES * M2).all():
            break
    return mean, np.maximum(M2, 0)


class _Affine:
    """`(x - pivot) * scale + shift` of a part, in the accumulation dtype."""

    def __init__(self, x: Tensor, coefficients: Array, view: View) -> None:
        pivot, scale, shift = coefficients
        self.values = view.of(x)
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
        return aten.native_batch_norm.out(
            values, self.scale, self.shift, _constant(0, self.scale), _constant(1, self.scale), False, 0.0, 0.0,
            out=out, save_mean=_constants(0, 0, out.dtype), save_invstd=_constants(0, 0, out.dtype),
        )[0]  # fmt: skip


def _sums(dy: Tensor, x: Tensor, mean: Tensor) -> Array:
    """Return sum(dy) and sum(dy * (x - mean)) for each channel of a view, (2, K) float64."""
    _, product, total = aten.native_batch_norm_backward(
        dy, x, None, mean, _constant(1, mean), None, None, False, 0.0, [False, True, True]
    )
    return np.stack([total.numpy(), product.numpy()]).astype(np.float64)


def _constant(value: float, like: Tensor) -> Tensor:
    return _constants(value, like.shape[0], like.dtype)


@lru_cache
def _constants(value: float, size: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor that nobody writes to; made by NumPy, so that it is plain in whatever mode it is first needed."""
    return torch.from_numpy(np.full(size, value, np.float64 if dtype == torch.float64 else np.float32))


def divisors(number: int) -> list[int]:
    """Return all divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
