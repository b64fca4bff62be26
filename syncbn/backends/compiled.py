"""The steps on CPU as kernels that torch.compile makes of the formulas in `torch_ops`: `SYNCBN_BACKEND=compiled`.

Each step reads and writes memory as often as it has to, and works on per-channel values in the same call. The first one
for a layout, dtype, activation and presence of a residual compiles for all sizes, some seconds with a C++ compiler, and
later runs find the result on disk (`TORCHINDUCTOR_CACHE_DIR`). Where compiling fails, a warning says so once and the
steps go on without.
"""

import math
import types
import warnings
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from syncbn.activations import ACTIVATIONS
from syncbn.backends import torch_ops
from syncbn.backends.composed import Composed
from syncbn.backends.cpu import (
    GUESS_FROM,
    MAX_RUN,
    MAX_SQUARES,
    coefficients_of,
    divisors,
    grad_input_coefficients,
    is_large,
    like,
)
from syncbn.backends.torch_ops import Affine, accumulation_dtype, per_channel
from syncbn.statistics import Channels, Reduced, Running, advance_, invstd_of, pack, unpack

BLOCK_ROWS = 32  # rows of channels-last activations that one float32 accumulator adds up, from the first-level cache

# What two sums share, dy, is computed for each of them: written to memory it would cost more than the reads it saves.
INDUCTOR_OPTIONS: Any = {"realize_reads_threshold": 64, "realize_opcount_threshold": 1000}

is_available = True


class View(NamedTuple):
    """How x and its like are read, channels in dimension 1: element by element, and for sums over all others.

    Sums are over the last dimension in the accumulation dtype, then over the rest in float64. Rows of channels-last
    activations that fill no block are left over.
    """

    elements: tuple[int, ...]  # (N, C, S), channels last (N * S, C)
    sums: tuple[int, ...]  # (N, C, S) or (N, C, repeats, run), channels last (blocks, BLOCK_ROWS, C)
    rest: int
    is_channels_last: bool

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of `tensor`, which has the layout of x; `data`: what is a view is guarded by its base."""
        return (tensor.movedim(1, -1) if self.is_channels_last else tensor).view(self.elements).data

    def for_sums(self, flat: Tensor) -> Tensor:
        """Return a view of what `of` has returned, without the rows left over."""
        if not self.is_channels_last:
            return flat.view(self.sums)
        whole = flat[: flat.shape[0] - self.rest] if self.rest else flat
        return whole.view(self.sums).movedim(-1, 1).data

    def guess_of_mean(self, flat: Tensor) -> Tensor:
        """Return the mean of a few values of each channel, (C,) in the accumulation dtype."""
        few = flat[:GUESS_FROM].T if self.is_channels_last else flat[0, :, :GUESS_FROM]
        return few.mean(-1, dtype=accumulation_dtype(flat))

    def left_over(self, flat: Tensor) -> Tensor:
        """Return the other rows, (1, C, rest)."""
        return flat[flat.shape[0] - self.rest :].T[None]

    def back(self, flat: Tensor, x: Tensor) -> Tensor:
        """Return a new tensor of the shape of `of` in the shape of x."""
        # x is dense, and `flat` has its order; `data`: a view would refuse what works in place on it
        return flat.as_strided(x.shape, x.stride()).data


def view_of(x: Tensor) -> View | None:
    """Return how to read x; None where these kernels have no use for it."""
    if not is_large(x):
        return None
    is_channels_last = x.movedim(1, -1).is_contiguous()
    return _view(x.shape, is_channels_last) if is_channels_last or x.is_contiguous() else None


@lru_cache
def _view(shape: torch.Size, is_channels_last: bool) -> View | None:
    N, C, S = shape[0], shape[1], math.prod(shape[2:])
    if is_channels_last:
        rows = min(BLOCK_ROWS, N * S)
        blocks, rest = divmod(N * S, rows)
        return View((N * S, C), (blocks, rows, C), rest, True)
    repeats = next(d for d in divisors(S) if S // d <= MAX_RUN)
    if repeats == 1:
        return View((N, C, S), (N, C, S), 0, False)
    return View((N, C, S), (N, C, repeats, S // repeats), 0, False) if S // repeats >= 16 else None


class Compiled(Composed):
    """The steps for CPU tensors, contiguous or channels last; what is small, masked or else goes to the verbs."""

    updates_running = True

    def __init__(self) -> None:
        super().__init__(torch_ops)

    def stats(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and M2 of this rank, in one read of x where a guess of the mean is good enough."""
        view = view_of(x) if mask is None else None
        if view is None:
            return super().stats(x, mask)
        return _stats(view, x)[:3]

    def pack_stats(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the vector of this rank for the all-reduce."""
        view = view_of(x) if mask is None else None
        return super().pack_stats(x, mask) if view is None else _stats(view, x)[3]

    def gather_stats(
        self, packed: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, running: Running | None
    ) -> tuple[Tensor, Tensor, Channels]:
        """Return count, var and what the elementwise steps need, from the summed vector; move running statistics."""
        values = _values(weight, bias, eps, running)
        count, mean, var, invstd, coefficients = _compiled(_gathered, _variant(values))(packed, *values)
        return count, var, Channels(mean, invstd, weight, bias, coefficients)

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
        """Return the same for this rank alone, without the rounding of the wire."""
        count, mean, M2 = self.stats(x, mask)
        values = _values(weight, bias, eps, running)
        var, invstd, coefficients = _compiled(_own, _variant(values))(count, mean, M2, *values)
        return count, var, Channels(mean, invstd, weight, bias, coefficients)

    def elemt(
        self, x: Tensor, channels: Channels, *, residual: Tensor | None, mask: Tensor | None, activation: str
    ) -> Tensor:
        """Return the output."""
        view = view_of(x) if mask is None else None
        if view is None:
            return super().elemt(x, channels, residual=residual, mask=mask, activation=activation)
        operands = (*_operands(view, x, residual), *_normalization(x, channels))
        kernel = _compiled(_output, _variant(operands, view.is_channels_last, activation))
        return view.back(kernel(*operands, activation), x)

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
        """Return both sums of this rank, the gradients of weight and bias, and dy only where it is needed."""
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
        values = _normalization(x, channels)
        dy = grad_output if activation == "identity" else None
        if needs_dy and dy is None:
            operands = (*_operands(view, x, grad_output, residual), *values)
            kernel = _compiled(_dy, _variant(operands, view.is_channels_last, activation))
            dy = view.back(kernel(*operands, activation), x)
        own, kind = (grad_output, activation) if dy is None else (dy, "identity")
        flat = _operands(view, x, own, None if kind == "identity" else residual)
        more = None
        if view.rest:
            arguments: list[Any] = [None if t is None else view.left_over(t) for t in flat]
            arguments += [*values, channels.mean, channels.invstd, None, kind, None, None]
            more, *_ = _backward_sums(*arguments)
        blocks = (None if t is None else view.for_sums(t) for t in flat)
        operands = (*blocks, *values, channels.mean, channels.invstd, more)
        options = (kind, weight_dtype, bias_dtype)
        kernel = _compiled(_backward_sums, _variant(operands, view.is_channels_last, *options))
        sums, grad_weight, grad_bias = kernel(*operands, *options)
        return Reduced(sums, grad_weight, grad_bias, dy)

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
        """Return the gradient of x."""
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
        own, kind = (grad_output, activation) if dy is None else (dy, "identity")
        flat = _operands(view, x, own, None if kind == "identity" else residual)
        _, linear = grad_input_coefficients(channels, count, sums)
        operands = (*flat, *_normalization(x, channels), *_rows(torch.from_numpy(linear[1:]), x))
        kernel = _compiled(_grad_input, _variant(operands, view.is_channels_last, kind))
        return view.back(kernel(*operands, kind), x)


# The kernels: operands in a common view, then per-channel values.


def _measured(x: Tensor, pivot: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean and M2 (C,), the vector for the all-reduce, and whether these are exact: near a pivot."""
    centred = x - per_channel(pivot, x)
    total, square = _sum(centred), _sum(centred.square())
    offset = total / count
    mean, M2 = pivot + offset, (square - total * offset).clamp(min=0)
    return mean, M2, pack(count, mean, M2), (offset.square() * count <= MAX_SQUARES * M2).all()


def _own(
    count: Tensor, mean: Tensor, M2: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Any, *running: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return var, invstd and the coefficients, (3, C) float64, and move the running statistics."""
    return _finished(count, mean, M2 / count.clamp(min=1), weight, bias, eps, *running)


def _gathered(
    packed: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Any, *running: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return count and mean as well."""
    count, mean, var = unpack(packed)
    return count, mean, *_finished(count, mean, var, weight, bias, eps, *running)


def _finished(
    count: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Any, *running: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if running:
        advance_(Running(*running), count=count, mean=mean, var=var)
    invstd = invstd_of(var, eps)
    scale, shift = torch_ops.forward_coefficients(Channels(mean, invstd, weight, bias))
    pivot = mean.float().double()
    pivot = torch.where(pivot.isfinite(), pivot, mean)
    return var, invstd, torch.stack([pivot, scale, shift + (pivot - mean) * scale])


def _output(x: Tensor, residual: Tensor | None, pivot: Tensor, scale: Tensor, shift: Tensor, activation: str) -> Tensor:
    z = torch_ops.preactivation(x, _affine(x, pivot, scale, shift), residual)
    return ACTIVATIONS[activation].apply_(z).to(x.dtype)


def _dy(
    x: Tensor,
    grad_output: Tensor,
    residual: Tensor | None,
    pivot: Tensor,
    scale: Tensor,
    shift: Tensor,
    activation: str,
) -> Tensor:
    if activation == "identity":
        return grad_output
    z = torch_ops.preactivation(x, _affine(x, pivot, scale, shift), residual)
    return torch_ops.activation_backward(grad_output, z, activation).to(x.dtype)


def _backward_sums(
    x: Tensor,
    grad_output: Tensor,
    residual: Tensor | None,
    pivot: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    invstd: Tensor,
    more: Tensor | None,
    activation: str,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return sum(dy) and sum(dy * (x - mean)), (2C,), plus `more`, and the gradients of weight and bias."""
    centred = x - per_channel(pivot, x)
    dy = _dy(x, grad_output, residual, pivot, scale, shift, activation).to(centred.dtype)
    sum_dy = _sum(dy)
    sums = torch.cat([sum_dy, _sum(dy * centred) + sum_dy * (pivot - mean)])
    if more is not None:
        sums = sums + more
    sum_dy, sum_dy_xmu = sums.chunk(2)
    grad_weight = None if weight_dtype is None else (sum_dy_xmu * invstd).to(weight_dtype)
    grad_bias = None if bias_dtype is None else sum_dy.to(bias_dtype, copy=True)
    return sums, grad_weight, grad_bias


def _grad_input(
    x: Tensor,
    grad_output: Tensor,
    residual: Tensor | None,
    pivot: Tensor,
    scale: Tensor,
    shift: Tensor,
    slope: Tensor,
    offset: Tensor,
    activation: str,
) -> Tensor:
    dy = _dy(x, grad_output, residual, pivot, scale, shift, activation)
    return _affine(x, pivot, slope, offset)(x).add_(dy * per_channel(scale, x)).to(x.dtype)


def _affine(x: Tensor, *values: Tensor) -> Affine:
    return Affine(*(per_channel(value, x) for value in values))


def _sum(values: Tensor) -> Tensor:
    """Return the sums, (C,) float64: short ones over the last dimension in the accumulation dtype."""
    return values.sum(-1).double().sum([0, *range(2, values.dim() - 1)])


# How they are run.


def _stats(view: View, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return count, mean, M2 and the vector for the all-reduce."""
    flat = view.of(x)
    count = torch_ops.local_count(flat, None)
    blocks, mean = view.for_sums(flat), view.guess_of_mean(flat)
    own_count = count - view.rest if view.rest else count
    kernel = _compiled(_measured, _variant((blocks,), view.is_channels_last))
    for _ in range(3):
        mean, M2, packed, is_exact = kernel(blocks, mean.to(accumulation_dtype(x)), own_count)
        if is_exact.numpy():
            break
    if view.rest:
        rest_count, rest_mean, rest_M2 = torch_ops.batch_norm_stats(view.left_over(flat), None)
        difference, share = rest_mean - mean, rest_count / count
        mean = mean + difference * share
        M2 = M2 + rest_M2 + difference.square() * (share * own_count)  # Chan et al. 1983, equation 2.1
        packed = pack(count, mean, M2)
    return count, mean, M2, packed


def _operands(view: View, x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    return view.of(x), *(None if t is None else view.of(like(t, x)) for t in others)


def _normalization(x: Tensor, channels: Channels) -> tuple[Tensor, ...]:
    """Return pivot, scale and shift, each (C,) in the accumulation dtype of x."""
    return _rows(coefficients_of(channels, max_mean_over_std=0), x)


def _rows(values: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Return the rows in the accumulation dtype of x; `data`: their number would be taken for an equal size of x."""
    return tuple(row.data for row in values.to(accumulation_dtype(x)))


def _values(
    weight: Tensor | None, bias: Tensor | None, eps: float, running: Running | None
) -> tuple[Tensor | None, ...]:
    weight, bias = (None if t is None else t.detach() for t in (weight, bias))  # sizes of a parameter are compiled in
    if running is None:
        return weight, bias, _scalar(eps)
    momentum = None if running.momentum is None else _scalar(running.momentum)
    return weight, bias, _scalar(eps), *running[:3], momentum


@lru_cache
def _scalar(value: float) -> Tensor:
    """Return a tensor that nobody writes to; made on the CPU and plain in whatever mode it is first needed."""
    return torch.from_numpy(np.array(value))


def _variant(operands: Sequence[Tensor | None], *options: Any) -> tuple[Any, ...]:
    """Return what compiled code depends on besides sizes."""
    return *[None if t is None else (t.dtype, t.dim()) for t in operands], *options


@cache
def _compiled(kernel: Callable[..., Any], variant: tuple[Any, ...]) -> Callable[..., Any]:
    """Return a compiled copy of `kernel`, one for each variant: dynamo limits how many a function may have."""
    assert isinstance(kernel, types.FunctionType)
    copied = types.FunctionType(
        kernel.__code__.replace(co_name=f"{kernel.__name__}_{_compiled.cache_info().currsize}"),
        kernel.__globals__,
        kernel.__name__,
    )
    compiled = torch.compile(copied, dynamic=True, fullgraph=True, options=INDUCTOR_OPTIONS)

    def run(*args: Any) -> Any:
        global is_available
        if is_available:
            try:
                try:
                    return compiled(*args)
                except torch._dynamo.exc.FailOnRecompileLimitHit:
                    with torch._dynamo.config.patch(recompile_limit=64):
                        return compiled(*args)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                is_available = False
                reason = " ".join(str(error).split("\n")[:2])
                warnings.warn(f"syncbn runs without compiled kernels: torch.compile failed, {reason}", stacklevel=2)
            except (torch._dynamo.exc.TorchDynamoException, RuntimeError):
                pass  # a mode or a stance under which nothing may be compiled: this call goes without
        return kernel(*args)

    return run
