"""The steps on CPU as kernels of torch.compile: `SYNCBN_BACKEND=compiled`.

A step is one call, and two for a group of one rank are one call too; each reads and writes memory as often as it has
to. The first one for a layout, dtype, activation and presence of a residual compiles for all sizes, some seconds with a
C++ compiler, and later runs find the result on disk (`TORCHINDUCTOR_CACHE_DIR`). Where compiling fails, a warning says
so once and the steps go on without.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from syncbn.backends import compiled_kernels as kernels
from syncbn.backends.compiled_calls import run
from syncbn.backends.cpu import Cpu
from syncbn.backends.cpu_layout import GUESS_FROM, is_dense, is_large, like, parts_of_run
from syncbn.backends.torch_ops import accumulation_dtype
from syncbn.statistics import Channels, Fused, Gradients, Reduced, Running, Wanted

STREAMS = 8  # places of channels-last activations that are read side by side and added up value by value
BLOCK_ROWS = 8  # of these sums one float32 accumulator adds up
ATTEMPTS = 3  # at a pivot near the mean: that of a few values, then the mean that was found


class Strided(NamedTuple):
    """A view of activations, whatever their shape."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """Return the view of `tensor`, which has the layout of x."""
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


class View(NamedTuple):
    """How x and its like are read, channels in dimension 1: element by element, in parts for sums, a few values."""

    elements: Strided  # (N, C, S), channels last (N * S, C)
    parts: tuple[Strided, ...]  # (streams, N, C, ..., run) each
    few: Strided  # (C, k)

    def back(self, flat: Tensor, x: Tensor) -> Tensor:
        """Return a new tensor of the shape of `elements` in the shape of x."""
        # x is dense, and `flat` has its order; `data`: a view would refuse what works in place on it
        return flat.as_strided(x.shape, x.stride()).data


def view_of(x: Tensor, mask: Tensor | None) -> View | None:
    """Return how to read x; None where these kernels have no use for it."""
    return _view(x.shape, x.stride()) if mask is None and is_large(x) else None


@lru_cache
def _view(shape: torch.Size, stride: tuple[int, ...]) -> View | None:
    N, C, S = shape[0], shape[1], math.prod(shape[2:])
    if is_dense(shape, stride, channels_last=True):
        return _channels_last_view(N * S, C)
    repeats = parts_of_run(S)
    if not is_dense(shape, stride, channels_last=False) or repeats == 0:
        return None
    run = S // repeats
    elements = Strided((N, C, S), (C * S, S, 1))
    whole = Strided((1, N, C, S), (N * C * S, C * S, S, 1))
    runs = Strided((1, N, C, repeats, run), (N * C * S, C * S, S, run, 1))
    return View(elements, (whole if repeats == 1 else runs,), Strided((C, min(S, GUESS_FROM)), (S, 1)))


def _channels_last_view(rows: int, C: int) -> View:
    blocks, rest = divmod(rows, STREAMS * BLOCK_ROWS)
    block = BLOCK_ROWS * C
    streams = Strided((STREAMS, blocks, C, BLOCK_ROWS), (blocks * block, block, 1, C))
    remaining = Strided((1, 1, C, rest), (C, C, 1, C), (rows - rest) * C)
    parts = (*([streams] if blocks else []), *([remaining] if rest else []))
    return View(Strided((rows, C), (C, 1)), parts, Strided((C, min(rows, GUESS_FROM)), (1, C)))


class Compiled(Cpu):
    """The steps for CPU tensors, contiguous or channels last; what is small, masked or else is left to `Cpu`."""

    def pack_stats(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the vector of this rank for the all-reduce, in one read of x where a few values tell the mean."""
        view = view_of(x, mask)
        if view is None:
            return super().pack_stats(x, mask)
        parts, few, count = [part.of(x) for part in view.parts], view.few.of(x), _count(x)
        for _ in range(ATTEMPTS):
            packed, mean, is_exact = run(kernels.packed, parts, few, count, given=(x, few.shape[1]))
            if is_exact.item():
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
            return super().normalize(x, packed, weight, bias, fused, eps=eps, running=running)
        tensors = x, None if fused.residual is None else like(fused.residual, x)
        elements = _elements(view, tensors)
        values = (_resolved(weight), _resolved(bias), _scalar(eps), _scalars(running), fused.activation)
        moved = None if running is None else (*running[:3], running.momentum is None)
        given = (*tensors, weight, bias, moved, fused.activation)
        if packed is None:
            parts, few = [part.of(x) for part in view.parts], view.few.of(x)
            for attempt in range(1, ATTEMPTS + 1):
                operands = (*elements, parts, few, _count(x), _scalar(attempt == ATTEMPTS), *values)
                *found, is_exact = run(kernels.normalized_alone, *operands, given=(*given, few.shape[1]))
                if is_exact.item():
                    break
                few = found[2].to(accumulation_dtype(x))[:, None]
        else:
            found = run(kernels.normalized, *elements, packed, *values, given=given)
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
        tensors, rows, given = _operands(x, grad_output, fused, channels)
        options = (fused.activation, *wanted[:2])
        parts = _parts(view, tensors)
        sums, grad_weight, grad_bias = run(kernels.backward_sums, parts, *rows, *options, given=(*given, *options))
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
        tensors, rows, given = _operands(x, grad_output, fused, channels)
        operands = (*_elements(view, tensors), *rows, count, reduced.sums, fused.activation)
        return view.back(run(kernels.grad_input, *operands, given=(*given, fused.activation)), x)

    def backward(
        self, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted, *, count: Tensor
    ) -> Gradients:
        """Return the gradient of x and the others, in one call."""
        view = _view_with_coefficients(x, channels, fused)
        if view is None:
            return super().backward(grad_output, x, channels, fused, wanted, count=count)
        grad_output, fused, dy = self._with_dy(view, grad_output, x, channels, fused, wanted)
        tensors, rows, given = _operands(x, grad_output, fused, channels)
        options = (fused.activation, *wanted[:2])
        operands = (*_elements(view, tensors), _parts(view, tensors), *rows, count, *options)
        grad_input, grad_weight, grad_bias = run(kernels.backward_alone, *operands, given=(*given, *options))
        return Gradients(view.back(grad_input, x), grad_weight, grad_bias, dy)

    def _with_dy(
        self, view: View, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted
    ) -> tuple[Tensor, Fused, Tensor | None]:
        """Return the gradient to go on from, what is still to be done to it, and dy where it is wanted."""
        if fused.activation == "identity":
            return grad_output, Fused(), grad_output
        if not wanted.dy:
            return grad_output, fused, None
        tensors, rows, given = _operands(x, grad_output, fused, channels)
        operands = (*_elements(view, tensors), *rows[:3], fused.activation)
        dy = view.back(run(kernels.dy, *operands, given=(*given, fused.activation)), x)
        return dy, Fused(), dy


def _view_with_coefficients(x: Tensor, channels: Channels, fused: Fused) -> View | None:
    """Return how to read x where a forward pass of these kernels has left what they need."""
    return None if channels.coefficients is None else view_of(x, fused.mask)


def _operands(
    x: Tensor, grad_output: Tensor, fused: Fused, channels: Channels
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor, ...], tuple[Any, ...]]:
    """Return x and its like; pivot, scale, shift, mean and invstd; and what code for both depends on."""
    assert channels.coefficients is not None
    tensors = x, like(grad_output, x), None if fused.residual is None else like(fused.residual, x)
    prepared = channels.mean, channels.invstd, channels.coefficients
    return tensors, (*channels.coefficients.unbind(), *prepared[:2]), (*tensors, *prepared)


def _elements(view: View, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return views of x and its like, element by element."""
    return [None if tensor is None else view.elements.of(tensor) for tensor in tensors]


def _parts(view: View, tensors: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    """Return the parts of x and its like, part by part."""
    return [[None if tensor is None else part.of(tensor) for tensor in tensors] for part in view.parts]


def _resolved(parameter: Tensor | None) -> Tensor | None:
    """Return a tensor whose memory holds its values; kernels would read that of a negative view."""
    return None if parameter is None else parameter.resolve_neg()


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
