"""The steps on CPU as kernels of torch.compile: `SYNCBN_BACKEND=compiled`.

A step is one call, and two for a group of one rank are one call too; each reads and writes memory as often as it has
to. The first one for a layout, dtype, activation and presence of a residual compiles for all sizes, some seconds with a
C++ compiler, and later runs find the result on disk (`TORCHINDUCTOR_CACHE_DIR`). Where compiling fails, a warning says
so once and the steps go on without.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from syncbn.backends import compiled_kernels as kernels
from syncbn.backends import torch_ops
from syncbn.backends.compiled_calls import run
from syncbn.backends.composed import Composed
from syncbn.backends.cpu_layout import GUESS_FROM, MAX_RUN, divisors, is_large, like
from syncbn.backends.torch_ops import accumulation_dtype
from syncbn.statistics import Channels, Fused, Reduced, Running, Wanted, advance_

STREAMS = 8  # places of channels-last activations that are read side by side and added up value by value
BLOCK_ROWS = 8  # of these sums one float32 accumulator adds up
ATTEMPTS = 3  # at a pivot near the mean: that of a few values, then the mean that was found


class View(NamedTuple):
    """How x and its like are read, channels in dimension 1: element by element, and in parts for sums."""

    elements: tuple[int, ...]  # (N, C, S), channels last (N * S, C)
    sums: tuple[int, ...]  # (1, N, C, S) or (1, N, C, repeats, run), channels last (STREAMS, blocks, BLOCK_ROWS, C)
    rest: int  # rows of channels-last activations that fill no block, a part of their own
    is_channels_last: bool

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of `tensor`, which has the layout of x; `data`: what is a view is guarded by its base."""
        return (tensor.movedim(1, -1) if self.is_channels_last else tensor).view(self.elements).data

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Return views of what `of` has returned, (streams, N, C, ..., run)."""
        if not self.is_channels_last:
            return [flat.view(self.sums)]
        whole = flat.shape[0] - self.rest
        parts = [flat[:whole].view(self.sums).movedim(-1, 2).data] if whole else []
        return [*parts, flat[whole:].T[None, None].data] if self.rest else parts

    def few(self, flat: Tensor) -> Tensor:
        """Return a few values of each channel, (C, k)."""
        return (flat[:GUESS_FROM].T if self.is_channels_last else flat[0, :, :GUESS_FROM]).data

    def back(self, flat: Tensor, x: Tensor) -> Tensor:
        """Return a new tensor of the shape of `of` in the shape of x."""
        # x is dense, and `flat` has its order; `data`: a view would refuse what works in place on it
        return flat.as_strided(x.shape, x.stride()).data


def view_of(x: Tensor, mask: Tensor | None) -> View | None:
    """Return how to read x; None where these kernels have no use for it."""
    if mask is not None or not is_large(x):
        return None
    is_channels_last = x.movedim(1, -1).is_contiguous()
    return _view(x.shape, is_channels_last) if is_channels_last or x.is_contiguous() else None


@lru_cache
def _view(shape: torch.Size, is_channels_last: bool) -> View | None:
    N, C, S = shape[0], shape[1], math.prod(shape[2:])
    if is_channels_last:
        blocks, rest = divmod(N * S, STREAMS * BLOCK_ROWS)
        return View((N * S, C), (STREAMS, blocks, BLOCK_ROWS, C), rest, True)
    repeats = next(d for d in divisors(S) if S // d <= MAX_RUN)
    if repeats == 1:
        return View((N, C, S), (1, N, C, S), 0, False)
    return View((N, C, S), (1, N, C, repeats, S // repeats), 0, False) if S // repeats >= 16 else None


class Compiled(Composed):
    """The steps for CPU tensors, contiguous or channels last; what is small, masked or else goes to the verbs."""

    updates_running = True

    def __init__(self) -> None:
        super().__init__(torch_ops)

    def pack_stats(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the vector of this rank for the all-reduce, in one read of x where a few values tell the mean."""
        view = view_of(x, mask)
        if view is None:
            return super().pack_stats(x, mask)
        flat = view.of(x)
        parts, few, count = view.parts(flat), view.few(flat), _count(x)
        for _ in range(ATTEMPTS):
            packed, mean, is_exact = run(kernels.packed, parts, few, count)
            if is_exact.numpy():
                break
            few = mean.to(accumulation_dtype(x))[:, None]
        return packed

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
        view = view_of(x, fused.mask)
        if view is None:
            y, count, var, channels = super().normalize(x, packed, weight, bias, fused, eps=eps, running=running)
            if running is not None:
                advance_(running, count=count, mean=channels.mean, var=var)
            return y, count, var, channels
        flat, residual = _operands(view, x, fused.residual)
        assert flat is not None
        values = (*_parameters(weight, bias), _scalar(eps), _scalars(running))
        if packed is None:
            parts, few = view.parts(flat), view.few(flat)
            for attempt in range(1, ATTEMPTS + 1):
                operands = (flat, residual, parts, few, _count(x), _scalar(attempt == ATTEMPTS), *values)
                *found, is_exact = run(kernels.normalized_alone, *operands, fused.activation)
                if is_exact.numpy():
                    break
                few = found[2].to(accumulation_dtype(x))[:, None]
        else:
            found = run(kernels.normalized, flat, residual, packed, *values, fused.activation)
        y, count, mean, var, invstd, coefficients = found
        return view.back(y, x), count, var, Channels(mean, invstd, weight, bias, coefficients)

    def match_layout(self, tensor: Tensor, x: Tensor) -> Tensor:
        """Return the tensor in the layout of x."""
        return like(tensor, x)

    def backward_reduce(
        self, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted
    ) -> Reduced:
        """Return both sums of this rank, the gradients of weight and bias, and dy only where it is wanted."""
        view = _view_with_coefficients(x, channels, fused)
        if view is None:
            return super().backward_reduce(grad_output, x, channels, fused, wanted)
        grad_output, fused, dy = self._with_dy(view, grad_output, x, channels, fused, wanted)
        flat = _operands(view, x, grad_output, fused.residual)
        options = (fused.activation, *wanted[:2])
        sums, grad_weight, grad_bias = run(kernels.backward_sums, _parts(view, flat), *_rows(channels), *options)
        return Reduced(sums, grad_weight, grad_bias, dy)

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
        view = _view_with_coefficients(x, channels, fused)
        if view is None:
            return super().backward_elemt(grad_output, x, channels, fused, wanted, reduced, count=count)
        if reduced.dy is not None:
            grad_output, fused = reduced.dy, Fused()
        flat = _operands(view, x, grad_output, fused.residual)
        operands = (*flat, *_rows(channels), count, reduced.sums)
        return view.back(run(kernels.grad_input, *operands, fused.activation), x)

    def backward(
        self, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted, *, count: Tensor
    ) -> tuple[Tensor, Reduced]:
        """Return the gradient of x and the others, in one call."""
        view = _view_with_coefficients(x, channels, fused)
        if view is None:
            return super().backward(grad_output, x, channels, fused, wanted, count=count)
        grad_output, fused, dy = self._with_dy(view, grad_output, x, channels, fused, wanted)
        flat = _operands(view, x, grad_output, fused.residual)
        operands = (*flat, _parts(view, flat), *_rows(channels), count)
        grad_input, sums, grad_weight, grad_bias = run(kernels.backward_alone, *operands, fused.activation, *wanted[:2])
        return view.back(grad_input, x), Reduced(sums, grad_weight, grad_bias, dy)

    def _with_dy(
        self, view: View, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted
    ) -> tuple[Tensor, Fused, Tensor | None]:
        """Return the gradient to go on from, what is still to be done to it, and dy where it is wanted."""
        if fused.activation == "identity":
            return grad_output, Fused(), grad_output
        if not wanted.dy:
            return grad_output, fused, None
        operands = (*_operands(view, x, grad_output, fused.residual), *_rows(channels)[:3])
        dy = view.back(run(kernels.dy, *operands, fused.activation), x)
        return dy, Fused(), dy


def _view_with_coefficients(x: Tensor, channels: Channels, fused: Fused) -> View | None:
    """Return how to read x where a forward pass of these kernels has left what they need."""
    return None if channels.coefficients is None else view_of(x, fused.mask)


def _operands(view: View, x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    return view.of(x), *(None if t is None else view.of(like(t, x)) for t in others)


def _parts(view: View, flat: Sequence[Tensor | None]) -> list[tuple[Tensor | None, ...]]:
    """Return the parts of all operands, part by part."""
    parts = [None if t is None else view.parts(t) for t in flat]
    return list(zip(*([None] * len(parts[0] or ()) if part is None else part for part in parts), strict=True))


def _rows(channels: Channels) -> tuple[Tensor, ...]:
    """Return pivot, scale, shift, mean and invstd; `data`: the number of rows would be taken for an equal size of x."""
    assert channels.coefficients is not None
    return *(row.data for row in channels.coefficients), channels.mean, channels.invstd


def _parameters(*parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return plain tensors: sizes of a parameter are compiled in, and kernels read the memory of a negative view."""
    return tuple(None if t is None else t.detach().resolve_neg() for t in parameters)


def _scalars(running: Running | None) -> tuple[Tensor | None, ...] | None:
    """Return the running statistics with the momentum as a tensor: its value is not compiled in."""
    if running is None:
        return None
    return *running[:3], None if running.momentum is None else _scalar(running.momentum)


def _count(x: Tensor) -> Tensor:
    return _scalar(float(x.numel() // x.shape[1]))


@lru_cache(typed=True)  # True is not the momentum 1.0
def _scalar(value: float) -> Tensor:
    """Return a tensor that nobody writes to; made on the CPU and plain in whatever mode it is first needed."""
    return torch.from_numpy(np.array(value))
