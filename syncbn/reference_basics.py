"""What all formulas of the oracle in `reference` share: standardizing over any axes, argument and gradient checks."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Parameter = ArrayLike | None


class Standardized(NamedTuple):
    """Values of mean 0 and variance var / (var + eps), and their statistics with the reduced axes kept as size 1."""

    normalized: Array
    mean: Array
    var: Array
    invstd: Array
    count: int  # type: ignore[assignment]  # hides tuple.count


def standardize(x: ArrayLike, axes: Sequence[int], *, eps: float) -> Standardized:
    """Return x with mean 0 and, up to eps, variance 1 over `axes`.

        mean       = sum(x) / count
        var        = sum((x - mean)^2) / count
        invstd     = 1 / sqrt(var + eps)
        normalized = (x - mean) * invstd

    Args:
        x: any shape.
        axes: the axes, counted from the first, over which values share one mean.
        eps: at least 0; with 0, values that are all equal give NaN.

    Source: Ioffe & Szegedy 2015, Algorithm 1, lines 1-3; Wu & He 2018, equations 1 and 2, for any set of values.
    """
    x, axes = float64_array(x), tuple(axes)
    mean = _mean(x, axes)
    centered = x - mean
    # The sum of large values is rounded. The mean of what is left is that error: at mean/std 1e8 it would show in var.
    correction = _mean(centered, axes)
    centered -= correction
    var = _mean(centered**2, axes)
    invstd = invstd_of(var, eps)
    return Standardized(centered * invstd, mean + correction, var, invstd, _count(x, axes))


def standardize_backward(grad_normalized: Array, normalized: Array, *, invstd: Array, axes: Sequence[int]) -> Array:
    """Return the gradient with respect to the input of `standardize`, whose mean and var depend on that input.

        grad_input = invstd * (grad_normalized - mean(grad_normalized)
                               - normalized * mean(grad_normalized * normalized))

    Args:
        grad_normalized, normalized: the shape of x.
        invstd: as `standardize` returns it.
        axes: those given to `standardize`.

    Source: Ioffe & Szegedy 2015, section 3, the chain rule that follows Algorithm 1, simplified.
    """
    axes = tuple(axes)
    projection = _mean(grad_normalized * normalized, axes)
    return invstd * (grad_normalized - _mean(grad_normalized, axes) - normalized * projection)


def _count(x: Array, axes: tuple[int, ...]) -> int:
    return math.prod(x.shape[axis] for axis in axes)


def _mean(x: Array, axes: tuple[int, ...]) -> Array:
    return x.sum(axes, keepdims=True) / max(_count(x, axes), 1)


def invstd_of(var: Array, eps: float) -> Array:
    """Return 1 / sqrt(var + eps), inf where that is 0; raise ValueError for a negative eps."""
    if not eps >= 0:
        raise ValueError(f"expected eps >= 0, got {eps}: it is added to a variance; torch's default is 1e-5")
    with np.errstate(divide="ignore"):  # eps = 0 and no variance: there is no scale, and inf says so
        return 1 / np.sqrt(var + eps)


def numerical_gradient(
    f: Callable[[Array], ArrayLike], x: ArrayLike, grad_output: ArrayLike, *, h: float = 1e-5
) -> Array:
    """Return the gradient of sum(f(x) * grad_output) with respect to x by central differences, two calls per element.

        gradient[i] = sum((f(x + h * e_i) - f(x - h * e_i)) * grad_output) / (2 * h)

    Args:
        grad_output: the shape of f(x).
        h: truncation grows with h^2 and rounding with 1e-16 / h; both are small near the cube root of 1e-16.
    """
    x = float64_array(x)
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[index] += h
        below[index] -= h
        difference = float64_array(f(above)) - float64_array(f(below))
        gradient[index] = (difference * checked_grad_output(grad_output, difference)).sum() / (2 * h)
    return gradient


def relative_error(x: ArrayLike, y: ArrayLike) -> float:
    """Return max |x - y| / max(1e-8, |x| + |y|) over all elements: 0 for empty arrays, NaN where there is a NaN."""
    x, y = float64_array(x), float64_array(y)
    if x.shape != y.shape:
        raise ValueError(f"expected two arrays of one shape, got {x.shape} and {y.shape}")
    return float(np.max(np.abs(x - y) / np.maximum(1e-8, np.abs(x) + np.abs(y)), initial=0))


def float64_array(x: ArrayLike) -> Array:
    """Return x as a float64 array, itself if it is one."""
    return np.asarray(x, dtype=np.float64)


def checked_input(x: ArrayLike) -> Array:
    """Return x in float64; raise ValueError unless it is (N, C) or (N, C, *S)."""
    x = float64_array(x)
    if x.ndim < 2:
        raise ValueError(f"expected input of shape (N, C) or (N, C, *S), got {x.shape}: add the missing axes")
    return x


def checked_grad_output(grad_output: ArrayLike, x: Array) -> Array:
    """Return grad_output in float64; raise ValueError unless it has the shape of x."""
    grad_output = float64_array(grad_output)
    if grad_output.shape != x.shape:
        raise ValueError(f"expected grad_output of shape {x.shape}, that of the output, got {grad_output.shape}")
    return grad_output


def filled(name: str, value: Parameter, shape: tuple[int, ...], *, default: float | None = None) -> Array:
    """Return the value in float64, or the default; raise ValueError unless it has this shape."""
    if value is None:
        if default is None:
            raise ValueError(f"expected {name} of shape {shape}, got None")
        return np.full(shape, default, np.float64)
    array = float64_array(value)
    if array.shape != shape:
        raise ValueError(f"expected {name} of shape {shape}, got {array.shape}")
    return array


def per_channel(name: str, value: Parameter, x: Array, *, default: float | None = None) -> Array:
    """Return a (C,) value in the shape that broadcasts over x."""
    channels = x.shape[1]
    return filled(name, value, (channels,), default=default).reshape(channels, *(1,) * (x.ndim - 2))


def all_but_channels(x: Array) -> tuple[int, ...]:
    """Return every axis but 1."""
    return (0, *range(2, x.ndim))


def last_axes(x: Array, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the last axes of x; raise ValueError unless they have this shape."""
    if x.shape[-len(shape) :] != shape:
        raise ValueError(f"expected an input that ends in normalized_shape {shape}, got {x.shape}")
    return tuple(range(x.ndim - len(shape), x.ndim))


def in_groups(x: Array, num_groups: int) -> Array:
    """Return x as (N, num_groups, C / num_groups, *S); raise ValueError unless num_groups divides C."""
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"expected num_groups to divide the {channels} channels of the input, got {num_groups}")
    return x.reshape(x.shape[0], num_groups, channels // num_groups, *x.shape[2:])
