"""The steps of a training pass, composed from the five verbs of a module such as `torch_ops`."""

from typing import Protocol

import torch
from torch import Tensor

from syncbn.statistics import Channels, Fused, Gradients, Reduced, Running, Wanted, invstd_of, pack, unpack


class Verbs(Protocol):
    """Per-channel results are float64 of shape (C,), counts float64 of shape (); names and meanings are PyTorch's own.

    Masks are bool, (N, 1, *S) or broadcast. Masked positions (False) are as if absent: they enter no sum, and their
    output and gradient are 0.
    """

    def batch_norm_stats(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and the sum of squared deviations from the mean."""

    def batch_norm_elemt(self, x: Tensor, channels: Channels, fused: Fused) -> Tensor:
        """Return `activation((x - mean) * invstd * weight + bias + residual)` in the dtype and layout of x."""

    def batch_norm_activation_backward(
        self, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused
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

    def pack_stats(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the vector of this rank for the all-reduce."""
        return pack(*self.stats(x, mask))

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
        if packed is None:
            count, mean, M2 = self.stats(x, fused.mask)
            var = M2 / count.clamp(min=1)
        else:
            count, mean, var = unpack(packed)
        channels = Channels(mean, invstd_of(var, eps), weight, bias)
        return self.verbs.batch_norm_elemt(x, channels, fused), count, var, channels

    def match_layout(self, tensor: Tensor, x: Tensor) -> Tensor:
        """Return the tensor as it is: the verbs take any layout."""
        return tensor

    def backward_reduce(
        self, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted
    ) -> Reduced:
        """Return both sums of this rank, the gradients of weight and bias, and dy."""
        dy = self.verbs.batch_norm_activation_backward(grad_output, x, channels, fused)
        sums = self.verbs.batch_norm_backward_reduce(dy, x, channels, mask=fused.mask)
        return reduced_of(*sums, channels, wanted, dy)

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
        assert reduced.dy is not None
        sum_dy, sum_dy_xmu = reduced.sums.chunk(2)
        return self.verbs.batch_norm_backward_elemt(
            reduced.dy, x, channels, mask=fused.mask, count=count, sum_dy=sum_dy, sum_dy_xmu=sum_dy_xmu
        )

    def backward(
        self, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted, *, count: Tensor
    ) -> Gradients:
        """Return the gradient of x and the others."""
        reduced = self.backward_reduce(grad_output, x, channels, fused, wanted)
        grad_input = self.backward_elemt(grad_output, x, channels, fused, wanted, reduced, count=count)
        return Gradients(grad_input, *reduced[1:])


def reduced_of(sum_dy: Tensor, sum_dy_xmu: Tensor, channels: Channels, wanted: Wanted, dy: Tensor | None) -> Reduced:
    """Return both sums, (C,) float64 of one rank, with the gradients of weight and bias that follow from them."""
    grad_weight = None if wanted.weight_dtype is None else (sum_dy_xmu * channels.invstd).to(wanted.weight_dtype)
    grad_bias = None if wanted.bias_dtype is None else sum_dy.to(wanted.bias_dtype, copy=True)
    return Reduced(torch.cat([sum_dy, sum_dy_xmu]), grad_weight, grad_bias, dy)
