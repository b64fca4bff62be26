"""The verbs of batch normalization, and which implementation of them serves a tensor.

batch_norm_stats                count, mean and M2 of one rank                   one read of x
batch_norm_elemt                the output                                       one read of x, one write
batch_norm_activation_backward  the gradient in front of the activation          one read of x and dy, one write
batch_norm_backward_reduce      sum(dy) and sum(dy * (x - mean)) of one rank     one read of x and dy
batch_norm_backward_elemt       the gradient of x                                one read of x and dy, one write

Names and meanings are PyTorch's own. A backend sees one rank; it never communicates.
"""

from typing import Protocol

from torch import Tensor

from syncbn.backends import torch_ops
from syncbn.statistics import Channels


class Backend(Protocol):
    """Per-channel results are float64 of shape (C,), counts float64 of shape (); masks bool, (N, 1, *S) or broadcast.

    Masked positions (False) are as if absent: they enter no sum, and their output and gradient are 0.
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


def select(x: Tensor) -> Backend:
    """Return the backend that serves `x`."""
    return torch_ops
