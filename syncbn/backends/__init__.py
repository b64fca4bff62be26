"""The four verbs of batch normalization, and which implementation of them serves a tensor.

batch_norm_stats            count, mean and M2 of one rank                    one read of x
batch_norm_elemt            the normalized output                             one read of x, one write
batch_norm_backward_reduce  sum(dy) and sum(dy * (x - mean)) of one rank      one read of x and dy
batch_norm_backward_elemt   the gradient of x                                 one read of x and dy, one write

Names and meanings are PyTorch's own. A backend sees one rank; it never communicates.
"""

from typing import Protocol

from torch import Tensor

from syncbn.backends import torch_ops


class Backend(Protocol):
    """Per-channel arguments and results are float64 of shape (C,), counts are float64 of shape ()."""

    def batch_norm_stats(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and the sum of squared deviations from the mean."""

    def batch_norm_elemt(
        self, x: Tensor, *, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Return `(x - mean) * invstd * weight + bias` in the dtype and layout of x."""

    def batch_norm_backward_reduce(self, grad_output: Tensor, x: Tensor, *, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return `sum(dy)` and `sum(dy * (x - mean))` per channel."""

    def batch_norm_backward_elemt(
        self,
        grad_output: Tensor,
        x: Tensor,
        *,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        count: Tensor,
        sum_dy: Tensor,
        sum_dy_xmu: Tensor,
    ) -> Tensor:
        """Return the gradient of x in its dtype and layout; count and sums are those of the whole group."""


def select(x: Tensor) -> Backend:
    """Return the backend that serves `x`."""
    return torch_ops
