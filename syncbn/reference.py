"""The formulas, in NumPy float64 on the whole batch: what every other implementation in this repository must reproduce.

Shapes, unless a function says otherwise: x and grad_output (N, C) or (N, C, *S) with any number of spatial axes S;
weight (the paper's gamma), bias (its beta) and running statistics (C,). A weight of None means ones, a bias of None
zeros. `var` is the biased variance, the mean of squared deviations. Over no values at all (N = 0) means, variances and
sums are 0. Every function converts its arrays to float64 and writes to none of them. A shape that does not fit and a
number outside its range raise ValueError.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from syncbn.reference_basics import (
    Array,
    Parameter,
    all_but_channels,
    checked_grad_output,
    checked_input,
    filled,
    float64_array,
    in_groups,
    invstd_of,
    last_axes,
    per_channel,
    standardize,
    standardize_backward,
)
from syncbn.reference_basics import numerical_gradient as numerical_gradient
from syncbn.reference_basics import relative_error as relative_error


class BatchNormOutput(NamedTuple):
    """Output of shape (N, C, *S), and the batch statistics of shape (C,) over `count` = N*S values per channel."""

    output: Array
    mean: Array
    var: Array
    invstd: Array
    count: int  # type: ignore[assignment]  # hides tuple.count


class Gradients(NamedTuple):
    """Gradients of sum(output * grad_output); grad_weight is the paper's dgamma, grad_bias its dbeta."""

    grad_input: Array
    grad_weight: Array
    grad_bias: Array


class RunningStats(NamedTuple):
    """Running statistics of shape (C,), and the number of batches that went into them."""

    running_mean: Array
    running_var: Array
    num_batches_tracked: int = 0


class ScaleShift(NamedTuple):
    """Numbers of shape (C,) such that output = scale * x + shift."""

    scale: Array
    shift: Array


class DropoutOutput(NamedTuple):
    """Output, and the mask of the same shape that made it."""

    output: Array
    mask: Array


def batch_norm(x: ArrayLike, *, weight: Parameter = None, bias: Parameter = None, eps: float = 1e-5) -> BatchNormOutput:
    """Return x normalized per channel over its N*S values, scaled and shifted.

        output = weight * standardize(x over N and S) + bias

    A single value per channel gives output = bias; layers refuse to train on that.

    Source: Ioffe & Szegedy 2015, Algorithm 1; section 3.2 for one gamma and beta per feature map.
    """
    x = checked_input(x)
    normalized, mean, var, invstd, count = standardize(x, all_but_channels(x), eps=eps)
    output = per_channel("weight", weight, x, default=1) * normalized + per_channel("bias", bias, x, default=0)
    return BatchNormOutput(output, mean.ravel(), var.ravel(), invstd.ravel(), count)


def batch_norm_backward(
    grad_output: ArrayLike, x: ArrayLike, *, weight: Parameter = None, eps: float = 1e-5
) -> Gradients:
    """Return the gradients of `batch_norm` by the closed formula.

        grad_input  = standardize_backward(grad_output * weight)
        grad_weight = sum(grad_output * normalized)
        grad_bias   = sum(grad_output)                            both over N and S

    With sum_dy = sum(grad_output) and sum_dy_xmu = sum(grad_output * (x - mean)), grad_weight = sum_dy_xmu * invstd and
    grad_input = weight * invstd * (grad_output - sum_dy / count - (x - mean) * invstd^2 * sum_dy_xmu / count).

    Source: Ioffe & Szegedy 2015, section 3, the chain rule that follows Algorithm 1, simplified.
    """
    x = checked_input(x)
    grad_output, axes = checked_grad_output(grad_output, x), all_but_channels(x)
    normalized, _, _, invstd, _ = standardize(x, axes, eps=eps)
    grad_normalized = grad_output * per_channel("weight", weight, x, default=1)
    grad_input = standardize_backward(grad_normalized, normalized, invstd=invstd, axes=axes)
    return Gradients(grad_input, *_affine_backward(grad_output, normalized, axes))


def batch_norm_backward_stepwise(
    grad_output: ArrayLike, x: ArrayLike, *, weight: Parameter = None, eps: float = 1e-5
) -> Gradients:
    """Return the gradients of `batch_norm` step by step, from the last node of its computation graph to the first.

        x -> mean -> centered = x - mean -> squared = centered^2 -> var -> std = sqrt(var + eps)
          -> normalized = centered / std -> output = weight * normalized + bias

    Gradients add where a node is used twice: `centered` for squared and normalized, `x` for mean and centered.

    Source: Ioffe & Szegedy 2015, section 3, the chain rule that follows Algorithm 1.
    """
    x = checked_input(x)
    grad_output, axes = checked_grad_output(grad_output, x), all_but_channels(x)
    _, mean, var, _, count = standardize(x, axes, eps=eps)
    centered = x - mean
    std = np.sqrt(var + eps)
    normalized = centered / std

    grad_weight, grad_bias = _affine_backward(grad_output, normalized, axes)
    grad_normalized = grad_output * per_channel("weight", weight, x, default=1)
    grad_std = (grad_normalized * -centered / std**2).sum(axes, keepdims=True)
    grad_var = grad_std / (2 * std)
    grad_squared = grad_var / max(count, 1)
    grad_centered = grad_normalized / std + grad_squared * 2 * centered
    grad_mean = -grad_centered.sum(axes, keepdims=True)
    grad_input = grad_centered + grad_mean / max(count, 1)
    return Gradients(grad_input, grad_weight, grad_bias)


def update_running_stats(
    running: RunningStats,
    *,
    mean: ArrayLike,
    var: ArrayLike,
    count: int,
    momentum: float | None = 0.1,
    unbiased: bool = True,
) -> RunningStats:
    """Return the running statistics after one more batch.

        running_mean = (1 - momentum) * running_mean + momentum * mean
        running_var  = (1 - momentum) * running_var  + momentum * var * count / (count - 1)

    `momentum` is torch's, the share of the new batch. CS231n-style texts keep the reverse convention,

        running = decay * running + (1 - decay) * batch

    with the biased variance and call decay momentum: their 0.9 is `momentum=0.1, unbiased=False` here. A batch of no
    values changes nothing.

    Args:
        mean, var: (C,), mean and biased variance of the batch.
        count: values per channel in the batch.
        momentum: 0 to 1; None means 1 / num_batches_tracked, this batch counted: the plain average.
        unbiased: False averages var as it comes.

    Raises:
        ValueError: count is 1 and the variance is to be unbiased.

    Source: Ioffe & Szegedy 2015, Algorithm 2, line 10, for the unbiased variance; torch.nn.BatchNorm1d for the average.
    """
    running_mean, running_var = float64_array(running.running_mean), float64_array(running.running_var)
    mean, var = float64_array(mean), float64_array(var)
    if not running_mean.shape == running_var.shape == mean.shape == var.shape:
        raise ValueError(
            f"expected statistics of one shape (C,), got running_mean {running_mean.shape}, "
            f"running_var {running_var.shape}, mean {mean.shape}, var {var.shape}"
        )
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"expected momentum in [0, 1] or None, got {momentum}: it is the share of the new batch")
    if count == 0:
        return RunningStats(running_mean, running_var, running.num_batches_tracked)
    if unbiased and count == 1:
        raise ValueError(
            "expected more than 1 value per channel for an unbiased variance, got 1: "
            "take a larger batch or unbiased=False"
        )
    num_batches_tracked = running.num_batches_tracked + 1
    share = 1 / num_batches_tracked if momentum is None else momentum
    new_var = var * count / (count - 1) if unbiased else var
    return RunningStats(
        (1 - share) * running_mean + share * mean, (1 - share) * running_var + share * new_var, num_batches_tracked
    )


def batch_norm_eval(
    x: ArrayLike, running: RunningStats, *, weight: Parameter = None, bias: Parameter = None, eps: float = 1e-5
) -> Array:
    """Return x normalized per channel with running statistics, scaled and shifted.

        output = weight * (x - running_mean) / sqrt(running_var + eps) + bias

    Source: Ioffe & Szegedy 2015, Algorithm 2, line 11.
    """
    x = checked_input(x)
    normalized, _ = _normalize(x, running, eps)
    return per_channel("weight", weight, x, default=1) * normalized + per_channel("bias", bias, x, default=0)


def batch_norm_eval_backward(
    grad_output: ArrayLike, x: ArrayLike, *, running: RunningStats, weight: Parameter = None, eps: float = 1e-5
) -> Gradients:
    """Return the gradients of `batch_norm_eval`; none flows through the statistics.

        grad_input  = grad_output * weight / sqrt(running_var + eps)
        grad_weight = sum(grad_output * normalized)
        grad_bias   = sum(grad_output)                            both over N and S

    Source: the derivative of Ioffe & Szegedy 2015, Algorithm 2, line 11.
    """
    x = checked_input(x)
    grad_output = checked_grad_output(grad_output, x)
    normalized, invstd = _normalize(x, running, eps)
    grad_input = grad_output * per_channel("weight", weight, x, default=1) * invstd
    return Gradients(grad_input, *_affine_backward(grad_output, normalized, all_but_channels(x)))


def fold_batch_norm(
    running: RunningStats, *, weight: Parameter = None, bias: Parameter = None, eps: float = 1e-5
) -> ScaleShift:
    """Return the one scale and one shift per channel that `batch_norm_eval` amounts to.

        scale = weight / sqrt(running_var + eps)
        shift = bias - running_mean * scale

    Source: Ioffe & Szegedy 2015, Algorithm 2, line 11.
    """
    shape = np.shape(running.running_var)
    scale = filled("weight", weight, shape, default=1) * invstd_of(float64_array(running.running_var), eps)
    shift = filled("bias", bias, shape, default=0) - filled("running_mean", running.running_mean, shape) * scale
    return ScaleShift(scale, shift)


def layer_norm(
    x: ArrayLike,
    normalized_shape: Sequence[int],
    *,
    weight: Parameter = None,
    bias: Parameter = None,
    eps: float = 1e-5,
) -> Array:
    """Return x normalized per sample over its last axes, scaled and shifted per element.

        output = weight * standardize(x over the last axes) + bias

    Args:
        x: (*, *normalized_shape), for instance (N, D) with normalized_shape (D,).
        weight, bias: normalized_shape.

    Source: Ba et al. 2016, equation 3, for the statistics.
    """
    x, shape = float64_array(x), tuple(normalized_shape)
    normalized = standardize(x, last_axes(x, shape), eps=eps).normalized
    return filled("weight", weight, shape, default=1) * normalized + filled("bias", bias, shape, default=0)


def layer_norm_backward(
    grad_output: ArrayLike,
    x: ArrayLike,
    *,
    normalized_shape: Sequence[int],
    weight: Parameter = None,
    eps: float = 1e-5,
) -> Gradients:
    """Return the gradients of `layer_norm`.

        grad_input  = standardize_backward(grad_output * weight)
        grad_weight = sum(grad_output * normalized)
        grad_bias   = sum(grad_output)                            both over the first axes

    Args: shapes as in `layer_norm`.
    """
    x, shape = float64_array(x), tuple(normalized_shape)
    grad_output, axes = checked_grad_output(grad_output, x), last_axes(x, shape)
    normalized, _, _, invstd, _ = standardize(x, axes, eps=eps)
    grad_normalized = grad_output * filled("weight", weight, shape, default=1)
    grad_input = standardize_backward(grad_normalized, normalized, invstd=invstd, axes=axes)
    return Gradients(grad_input, *_affine_backward(grad_output, normalized, range(x.ndim - len(shape))))


def group_norm(
    x: ArrayLike, num_groups: int, *, weight: Parameter = None, bias: Parameter = None, eps: float = 1e-5
) -> Array:
    """Return x normalized per sample and group of neighbouring channels, scaled and shifted per channel.

        output = weight * standardize(x over the C / num_groups channels of a group and S) + bias

    Source: Wu & He 2018, equations 1, 2, 6 and 7.
    """
    x = checked_input(x)
    grouped = in_groups(x, num_groups)
    normalized = standardize(grouped, range(2, grouped.ndim), eps=eps).normalized.reshape(x.shape)
    return per_channel("weight", weight, x, default=1) * normalized + per_channel("bias", bias, x, default=0)


def group_norm_backward(
    grad_output: ArrayLike, x: ArrayLike, *, num_groups: int, weight: Parameter = None, eps: float = 1e-5
) -> Gradients:
    """Return the gradients of `group_norm`.

    grad_input  = standardize_backward(grad_output * weight)
    grad_weight = sum(grad_output * normalized)
    grad_bias   = sum(grad_output)                            both over N and S
    """
    x = checked_input(x)
    grad_output, grouped = checked_grad_output(grad_output, x), in_groups(x, num_groups)
    axes = range(2, grouped.ndim)
    normalized, _, _, invstd, _ = standardize(grouped, axes, eps=eps)
    grad_normalized = grad_output * per_channel("weight", weight, x, default=1)
    gradgrouped = standardize_backward(grad_normalized.reshape(grouped.shape), normalized, invstd=invstd, axes=axes)
    affine_gradients = _affine_backward(grad_output, normalized.reshape(x.shape), all_but_channels(x))
    return Gradients(gradgrouped.reshape(x.shape), *affine_gradients)


def dropout(x: ArrayLike, p: float, *, generator: np.random.Generator) -> DropoutOutput:
    """Return x with some values dropped and the others scaled up, so that the expected output is x (inverted dropout).

        output = x * mask,    mask = 0 with probability p, else 1 / (1 - p)

    In evaluation dropout is the identity. `p` is torch's, the probability to drop, from 0 up to but not 1; the p of the
    paper and of CS231n is the probability to keep.

    Source: Srivastava et al. 2014, section 4, with the scaling moved from test time to training time as in section 10.
    """
    if not 0 <= p < 1:
        raise ValueError(f"expected p in [0, 1), got {p}: it is the probability to drop, and something has to be kept")
    x = float64_array(x)
    mask = (generator.random(x.shape) >= p) / (1 - p)
    return DropoutOutput(x * mask, mask)


def dropout_backward(grad_output: ArrayLike, mask: ArrayLike) -> Array:
    """Return grad_input = grad_output * mask, with the mask that `dropout` returned."""
    mask = float64_array(mask)
    return checked_grad_output(grad_output, mask) * mask


def _normalize(x: Array, running: RunningStats, eps: float) -> tuple[Array, Array]:
    mean = per_channel("running_mean", running.running_mean, x)
    invstd = invstd_of(per_channel("running_var", running.running_var, x), eps)
    return (x - mean) * invstd, invstd


def _affine_backward(grad_output: Array, normalized: Array, axes: Sequence[int]) -> tuple[Array, Array]:
    return (grad_output * normalized).sum(tuple(axes)), grad_output.sum(tuple(axes))
