"""The four ops of a training pass on one rank, and which backend runs them.

op               returns                                                              Triton launches
pack_stats       the vector for the all-reduce: n, sum(x), sum(x^2)                   2, one read of x
normalize        the output; moves the running statistics                             2, one read of x, one write
backward_reduce  sum(dy), sum(dy * (x - mean)), gradients of weight and bias          2, one read of x and grad_output
backward_elemt   the gradient of x                                                    1, the same, one write

`torch_ops` are plain operations for every device, dtype and layout, `cpu` ATen's kernels for contiguous tensors on CPU,
`triton_launch` Triton kernels on CUDA. A backend sees one rank; it never communicates.
"""

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from syncbn.backends import cpu, torch_ops
from syncbn.statistics import Channels, Epilogue, OutputMask, Reduced, Running

ENVIRONMENT_VARIABLE = "SYNCBN_BACKEND"
CHOICES = ("auto", "torch", "triton")


class Backend(Protocol):
    """A module with these four functions. Masks are bool, (N, 1, *S) or broadcast.

    Masked positions (False) count as absent: they enter no sum, and their output and gradient are 0.
    `Channels.coefficients` have a format of their own in each backend.
    """

    def pack_stats(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the vector of this rank for the all-reduce, (2C + 1,) float64, as `statistics.pack` makes it."""

    def normalize(
        self,
        x: Tensor,
        packed: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        epilogue: Epilogue,
        *,
        eps: float,
        ranks: int,
        running: Running | None,
    ) -> tuple[Tensor, Tensor, Channels]:
        """Return y like x, the count of the group, () float64, and the per-channel values that backward needs.

        Args:
            packed: the sum of the vectors of all ranks.
            ranks: how many these are.
            running: moved in place if the count is above 1; None leaves them alone.
        """

    def backward_reduce(
        self, grad_output: Tensor, x: Tensor, channels: Channels, epilogue: Epilogue, output_mask: OutputMask
    ) -> Reduced:
        """Return the sums over this rank, and the gradients and y, once more, if `output_mask` selects them.

        dy is the gradient in front of the activation, whose input is computed again from x. `grad_output` has the
        strides of x.
        """

    def backward_elemt(
        self, grad_output: Tensor, x: Tensor, channels: Channels, epilogue: Epilogue, reduced: Reduced, *, count: Tensor
    ) -> Tensor:
        """Return the gradient of x, like x; count and `reduced.sums` are those of the whole group."""


PLAIN: Backend = torch_ops
CPU: Backend = cpu


def select(x: Tensor, mask: Tensor | None = None) -> Backend:
    """Return the backend for `x`: once per forward pass, kept for its backward pass.

    Plain operations are chosen for tensors that no other backend supports, and always under `torch.compile` (which
    fuses them), `torch.jit.trace`, and dispatch modes such as those of `make_fx` and `FlopCounterMode`.

    `SYNCBN_BACKEND` in the environment: `auto`, the default, for ATen's kernels on CPU and Triton on CUDA; `torch` for
    plain operations everywhere; `triton` for an error where Triton cannot run.

    Raises:
        ValueError: the variable has another value, or asks for Triton where it is not installed or for tensors that are
            not on CUDA. On CPU it runs under its interpreter, `TRITON_INTERPRET=1`.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return PLAIN
    choice = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"expected {ENVIRONMENT_VARIABLE} to be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "triton":
        _check_triton_runs(x)
    if choice == "torch" or torch._C._len_torch_dispatch_stack():
        return PLAIN
    if x.is_cuda or choice == "triton":
        return _triton_for(x, is_known_to_run=choice == "triton") or PLAIN
    return CPU if x.is_cpu and cpu.supports(x, mask) else PLAIN


def _check_triton_runs(x: Tensor) -> None:
    if not is_triton_installed():
        raise ValueError(
            f"expected Triton to be installed, got none: install triton, or unset {ENVIRONMENT_VARIABLE}=triton"
        )
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"expected tensors on CUDA with {ENVIRONMENT_VARIABLE}=triton, got {x.device}: move the model there, or "
            "set TRITON_INTERPRET=1 before triton is imported (slow, for tests)"
        )


def _triton_for(x: Tensor, *, is_known_to_run: bool) -> Backend | None:
    """Return the Triton backend if it serves x. It is imported when it is first needed."""
    if not is_triton_installed():
        return None
    from syncbn.backends import triton_launch

    return triton_launch if triton_launch.supports(x) and (is_known_to_run or triton_launch.can_run(x.device)) else None


@lru_cache
def is_triton_installed() -> bool:
    """Return whether Triton can be imported; looked up once."""
    return find_spec("triton") is not None
