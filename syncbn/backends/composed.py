"""The steps of a training pass, composed from the five verbs of a module such as `torch_ops`."""

from typing import Protocol

import torch
from torch import Tensor

from syncbn.statistics import Channels, Reduced, Running, invstd_of, pack, unpack


class Verbs(Protocol):
    """Per-channel results are float64 of shape (C,), counts float64 of shape (); names and meanings are PyTorch's own.

    Masks are bool, (N, 1, *S) or broadcast. Masked positions (False) are as if absent: they enter no sum, and their
    output and gradient are 0.
    """

    def batch_norm_stats(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and the sum of squared deviations from the mean."""

    def batch_norm_elemt(
        self, x: Tensor, channels: Channels, *, residual: Tensor | None, mask: Tensor | None, activation: str
    ) -> Tensor:
        """Return `activation((x - mean) * invstd * weight + bias + residual)` in the dtype and layout of x."""

    def batch_norm_activation_backward(
        self,
        grad_output: Tensor,
        x: Tensor,
        channels: Channels,
        *,
        residual: Tensor | None,
        mask: Tensor | None,
        activation: str,
    ) -> Tensor:
        """Return dy, the gradient of what went into the activation; computed again from x, nothing was stored."""

    def batch_norm_backward_reduce(
        self, dy: Tensor, x: Tensor, channels: Channels, *, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return sum(dy) and sum(dy * (x - mean))."""

    def batch_norm_backward_elemt(
        self,
        dy: Tensor,
        x: Tensor,
        channels: Channels,
        *,
        mask: Tensor | None,
        count: Tensor,
        sum_dy: Tensor,
        sum_dy_xmu: Tensor,
    ) -> Tensor:
        """Return the gradient of x in its dtype and layout; count and sums are those of the whole group."""


class Composed:
    """A backend made of verbs. It leaves the running statistics to the caller and writes dy between its two halves."""

    updates_running = False

    def __init__(self, verbs: Verbs) -> None:
        self.verbs = verbs

    def stats(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and M2 of this rank."""
        return self.verbs.batch_norm_stats(x, mask)

    def channels(self, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Channels:
        """Return what the elementwise steps need."""
        return Channels(mean, invstd, weight, bias)

    def pack_stats(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the vector of this rank for the all-reduce."""
        return pack(*self.stats(x, mask))

    def gather_stats(
        self, packed: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, running: Running | None
    ) -> tuple[Tensor, Tensor, Channels]:
        """Return count, var and what the elementwise steps need, from the summed vector."""
        count, mean, var = unpack(packed)
        return count, var, self.channels(mean, invstd_of(var, eps), weight, bias)

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
        var = M2 / count.clamp(min=1)
        return count, var, self.channels(mean, invstd_of(var, eps), weight, bias)

    def elemt(
        self, x: Tensor, channels: Channels, *, residual: Tensor | None, mask: Tensor | None, activation: str
    ) -> Tensor:
        """Return the output."""
        return self.verbs.batch_norm_elemt(x, channels, residual=residual, mask=mask, activation=activation)

    def match_layout(self, tensor: Tensor, x: Tensor) -> Tensor:
        """Return the tensor as it is: the verbs take any layout."""
        return tensor

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
        dy = self.verbs.batch_norm_activation_backward(
            grad_output, x, channels, residual=residual, mask=mask, activation=activation
        )
        sums = self.verbs.batch_norm_backward_reduce(dy, x, channels, mask=mask)
        return reduced(*sums, channels, dy, weight_dtype=weight_dtype, bias_dtype=bias_dtype)

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
        assert dy is not None
        sum_dy, sum_dy_xmu = sums.chunk(2)
        return self.verbs.batch_norm_backward_elemt(
            dy, x, channels, mask=mask, count=count, sum_dy=sum_dy, sum_dy_xmu=sum_dy_xmu
        )


def reduced(
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    channels: Channels,
    dy: Tensor | None,
    *,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> Reduced:
    """Return both sums, (C,) float64 of one rank, and the gradients of weight and bias that follow from them."""
    grad_weight = None if weight_dtype is None else (sum_dy_xmu * channels.invstd).to(weight_dtype)
    grad_bias = None if bias_dtype is None else sum_dy.to(bias_dtype, copy=True)
    return Reduced(torch.cat([sum_dy, sum_dy_xmu]), grad_weight, grad_bias, dy)
