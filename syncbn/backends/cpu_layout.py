"""How activations on CPU are read by ATen's kernels: contiguous or channels last, a part of the batch at a time."""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from syncbn.backends.torch_ops import accumulation_dtype

MIN_ELEMENTS = 2**18  # channels last or compiled; below, calls cost more than the work
PART_ELEMENTS = 2**20  # 4 MB of float32; smaller parts pay more for calls than they gain in the cache
MAX_RUN = 1024  # values of a contiguous run; 16 accumulators side by side share it
MIN_RUN = 16
MAX_ROWS = 64  # values that one accumulator adds up: below 5e-7 relative error of a sum of squares in float32
MAX_SPREAD_CHANNELS = 2**14  # accumulators side by side; as many as make a part of `MAX_ROWS` rows
GUESS_FROM = 17  # values: their mean is rarely off by more than a standard deviation; no usual number of channels

Array = npt.NDArray[Any]


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


def cost_little(squares: Any, M2: Any) -> Any:
    """Return whether squares of pivots that were added up with M2 have cost it no more than some bits."""
    return (squares <= 4.0 * M2).all()  # written here: torch.compile would hand over a named number as a tensor


def is_plain(x: Tensor) -> bool:
    """Return whether the memory of x holds its values, floating ones."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.is_floating_point() and not x.is_neg()


def is_large(x: Tensor) -> bool:
    """Return whether x is a plain tensor of some size, for which kernels other than plain operations are worth it."""
    return is_plain(x) and x.numel() >= max(MIN_ELEMENTS, 1)


def has_runs(x: Tensor, mask: Tensor | None) -> bool:
    """Return whether positions of a channel are next to each other, and all of x is worked on at once.

    Not much of it in half precision, of which every step would make a copy.
    """
    if mask is not None or not is_plain(x) or x.dim() < 3 or x.numel() == 0 or not x.is_contiguous():
        return False
    positions = x.numel() // (x.shape[0] * x.shape[1])
    is_half = x.dtype in (torch.float16, torch.bfloat16)
    return positions > 1 and parts_of_run(positions) > 0 and not (is_half and x.numel() >= MIN_ELEMENTS)


@lru_cache
def parts_of_run(length: int) -> int:
    """Return into how many parts of `MAX_RUN` values at most a run divides; 0 where they would be too short."""
    parts = next(d for d in divisors(length) if length // d <= MAX_RUN)
    return parts if parts == 1 or length // parts >= MIN_RUN else 0


def view_of(x: Tensor) -> View | None:
    """Return how to read x; None where these kernels have no use for it."""
    return _view(x.shape, x.stride()) if is_large(x) and not has_runs(x, None) else None


@lru_cache
def _view(shape: torch.Size, stride: tuple[int, ...]) -> View | None:
    num_channels, spatial = shape[1], math.prod(shape[2:])
    if is_dense(shape, stride, channels_last=True):
        rows = shape[0] * spatial
        repeats = max(d for d in divisors(rows) if d == 1 or d * num_channels <= MAX_SPREAD_CHANNELS)
        return View((rows // repeats, repeats * num_channels), num_channels, repeats, True)
    if not is_dense(shape, stride, channels_last=False):
        return None
    repeats = parts_of_run(spatial)
    if repeats == 0:
        return None
    return View((shape[0], num_channels * repeats, spatial // repeats), num_channels, repeats, False)


def is_dense(shape: Sequence[int], stride: Sequence[int], *, channels_last: bool) -> bool:
    """Return whether memory holds the elements one after the other, dimension 1 innermost or in its place."""
    order = [0, *range(2, len(shape)), 1] if channels_last else range(len(shape))
    expected = 1
    for dim in reversed(order):
        if shape[dim] != 1 and stride[dim] != expected:
            return False
        expected *= shape[dim]
    return True


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """Return the tensor in the layout of x."""
    return tensor if tensor.stride() == x.stride() and not tensor.is_neg() else torch.empty_like(x).copy_(tensor)


def divisors(number: int) -> list[int]:
    """Return all divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


@lru_cache
def constants(value: float, size: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor that nobody writes to; made by NumPy, so that it is plain in whatever mode it is first needed."""
    return torch.from_numpy(np.full(size, value, np.float64 if dtype == torch.float64 else np.float32))
