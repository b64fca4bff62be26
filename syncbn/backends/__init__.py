"""The steps of a training pass on one rank, and which implementation of them serves a tensor.

step             returns                                                        launches of Triton
pack_stats       the vector for the all-reduce: n, sum(x), sum(x^2)             2, one read of x
normalize        the output and the group's statistics; moves the running ones  2, one read of x, one write
backward_reduce  sum(dy), sum(dy * (x - mean)), gradients of weight and bias    2, one read of x and grad_output
backward_elemt   the gradient of x                                              1, the same, one write

For a group of one rank `normalize` takes the statistics itself, and `backward` is both of its steps.

`composed` makes them of PyTorch's verbs, of which `torch_ops` is the implementation in plain operations for every
device and dtype; `cpu_contiguous`, `cpu`, `compiled` and `triton_launch` fuse them. A backend sees one rank; it never
communicates.
"""

import os
from functools import lru_cache
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor

from syncbn.backends import compiled_calls, torch_ops
from syncbn.backends.compiled import Compiled
from syncbn.backends.composed import Composed
from syncbn.backends.cpu import Cpu
from syncbn.statistics import Channels, Fused, Gradients, Reduced, Running, Wanted

ENVIRONMENT_VARIABLE = "SYNCBN_BACKEND"
CHOICES = ("auto", "torch", "compiled", "triton")


class Backend(Protocol):
    """Per-channel results are float64 of shape (C,), counts float64 of shape (); masks bool, (N, 1, *S) or broadcast.

    Masked positions (False) are as if absent: they enter no sum, and their output and gradient are 0.
    """

    @property
    def updates_running(self) -> bool:
        """Whether `normalize` moves the running statistics that it is given."""

    def pack_stats(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the vector of this rank for the all-reduce, (2C + 1,) float64, as `statistics.pack` makes it."""

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
        """Return y like x, count, biased var and what the backward steps need.

        `packed` is the sum of the vectors of all ranks. None stands for a group of one rank, whose statistics are taken
        from x, without the rounding of the wire.
        """

    def match_layout(self, tensor: Tensor, x: Tensor) -> Tensor:
        """Return the tensor in a layout that the backward steps take beside x, so that it is copied once at most."""

    def backward_reduce(
        self, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted
    ) -> Reduced:
        """Return the sums over this rank, and those gradients that are wanted.

        dy is the gradient in front of the activation, whose derivative is computed again from x: nothing was stored.
        """

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
        """Return the gradient of x, like x; count and `reduced.sums` are those of the whole group.

        Where dy is not wanted, its memory may become that of the result.
        """

    def backward(
        self, grad_output: Tensor, x: Tensor, channels: Channels, fused: Fused, wanted: Wanted, *, count: Tensor
    ) -> Gradients:
        """Return what both steps return but for the sums, for a group of one rank."""


PLAIN = Composed(torch_ops)
CPU = Cpu()
COMPILED = Compiled()


def select(x: Tensor) -> Backend:
    """Return the backend that serves `x` outside of torch.compile, which fuses the plain one by itself.

    Plain operations also serve whoever follows them one by one: `torch.jit.trace`, and on CPU dispatch modes such as
    those of `make_fx` and `FlopCounterMode`.

    `SYNCBN_BACKEND` in the environment: `auto`, the default, for ATen's kernels on CPU and Triton on CUDA; `compiled`
    for kernels of torch.compile on CPU; `torch` for plain operations everywhere; `triton` to be told where Triton
    cannot run rather than fall back. Triton takes float32 and half precision, contiguous or channels last; the rest is
    left to plain PyTorch.

    Raises:
        ValueError: the variable has another value, or asks for Triton where it is not installed or for tensors that it
            cannot run on. On the CPU it runs under its interpreter, `TRITON_INTERPRET=1`.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return PLAIN
    choice = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if choice not in CHOICES:
        raise ValueError(f"expected {ENVIRONMENT_VARIABLE} to be one of {', '.join(CHOICES)}, got {choice!r}")
    if choice == "torch":
        return PLAIN
    if x.is_cpu and choice != "triton":
        if torch._C._len_torch_dispatch_stack():
            return PLAIN
        return COMPILED if choice == "compiled" and compiled_calls.is_available else CPU
    if not x.is_cuda and choice != "triton":
        return PLAIN
    if choice == "triton":
        _check_triton_runs(x)
    triton_launch = _triton_launch()
    if triton_launch is None or type(x) not in (Tensor, torch.nn.Parameter) or not triton_launch.supports(x):
        return PLAIN
    if choice != "triton" and not triton_launch.can_run(x.device):
        return PLAIN
    return cast(Backend, triton_launch)


def _check_triton_runs(x: Tensor) -> None:
    if _triton_launch() is None:
        raise ValueError(
            f"expected Triton to be installed, got none: install triton, or unset {ENVIRONMENT_VARIABLE}=triton"
        )
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"expected tensors on CUDA with {ENVIRONMENT_VARIABLE}=triton, got {x.device}: move the model there, or "
            "set TRITON_INTERPRET=1 before triton is imported (slow, for tests)"
        )


@lru_cache
def _triton_launch():  # type: ignore[no-untyped-def]  # a module, or None
    """Import the Triton backend when it is first asked for."""
    if find_spec("triton") is None:
        return None
    from syncbn.backends import triton_launch

    return triton_launch
