"""The steps on CPU as four kernels that torch.compile makes of the formulas in `torch_ops`: `SYNCBN_BACKEND=compiled`.

Each step reads and writes memory as often as it has to. The first call for a layout, dtype, activation and presence of
a residual compiles for all sizes, some seconds with a C++ compiler, and later runs find the result on disk
(`TORCHINDUCTOR_CACHE_DIR`). Where compiling fails, a warning says so once and the steps go on without.
"""

import types
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncbn.activations import ACTIVATIONS
from syncbn.backends import torch_ops
from syncbn.backends.cpu import (
    MAX_SQUARES,
    Array,
    Cpu,
    View,
    coefficients_of,
    grad_input_coefficients,
    like,
    reduced_of,
    view_of,
)
from syncbn.backends.torch_ops import Affine
from syncbn.statistics import Channels, Reduced

BLOCK_ROWS = 64  # rows of channels-last activations that one float32 accumulator adds up, from the first-level cache

is_available = True


class Compiled(Cpu):
    """The steps for CPU tensors, contiguous or channels last; what is small, masked or else goes to the verbs."""

    max_mean_over_std = 0.0  # a pivot costs nothing here

    def stats(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return count, mean and M2 of this rank, in one read of x where a guess of the mean is good enough."""
        view = view_of(x) if mask is None else None
        if view is None:
            return super().stats(x, mask)
        count = x.numel() // view.num_channels
        mean = view.guess_of_mean(x)
        for _ in range(3):
            pivot = mean.astype(view.spread(mean, x).numpy().dtype).astype(np.float64)
            total, square = _sums(_centred_sums, view, (x,), _across(view, pivot, x))
            offset = total / count
            mean, M2 = pivot + offset, square - total * offset
            if (offset**2 * count <= MAX_SQUARES * M2).all():
                break
        return torch_ops.local_count(x, None), torch.from_numpy(mean), torch.from_numpy(np.maximum(M2, 0))

    def elemt(
        self, x: Tensor, channels: Channels, *, residual: Tensor | None, mask: Tensor | None, activation: str
    ) -> Tensor:
        """Return the output."""
        view = view_of(x) if mask is None else None
        if view is None:
            return super().elemt(x, channels, residual=residual, mask=mask, activation=activation)
        return _elementwise(_output, view, (x, residual), _normalization(view, x, channels), activation)

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
        """Return both sums of this rank, the gradients of weight and bias, and dy only where it is needed."""
        view = view_of(x) if mask is None else None
        if view is None:
            return super().backward_reduce(
                grad_output,
                x,
                channels,
                residual=residual,
                mask=mask,
                activation=activation,
                weight_dtype=weight_dtype,
                bias_dtype=bias_dtype,
                needs_dy=needs_dy,
            )
        normalization = _normalization(view, x, channels)
        dy = grad_output if activation == "identity" else None
        if needs_dy and dy is None:
            dy = _elementwise(_dy, view, (x, grad_output, residual), normalization, activation)
        own, kind = (grad_output, activation) if dy is None else (dy, "identity")
        operands = (x, own, None if kind == "identity" else residual)
        sum_dy, sum_dy_xmu = _sums(_backward_sums, view, operands, normalization, kind)
        sum_dy_xmu += sum_dy * (coefficients_of(channels).numpy()[0] - channels.mean.numpy())
        return reduced_of(sum_dy, sum_dy_xmu, channels, dy, weight_dtype, bias_dtype)

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
        view = view_of(x) if mask is None else None
        if view is None:
            return super().backward_elemt(
                grad_output,
                x,
                channels,
                residual=residual,
                mask=mask,
                activation=activation,
                dy=dy,
                keeps_dy=keeps_dy,
                count=count,
                sums=sums,
            )
        own, kind = (grad_output, activation) if dy is None else (dy, "identity")
        operands = (x, own, None if kind == "identity" else residual)
        normalization = _normalization(view, x, channels)
        _, coefficients = grad_input_coefficients(channels, count, sums)
        linear = Affine(*(_across(view, values, x) for values in coefficients))
        return _elementwise(_grad_input, view, operands, normalization, kind, normalization.scale, linear)


# The kernels: operands in a common layout, then per-channel values that broadcast over them.


def _output(x: Tensor, residual: Tensor | None, normalization: Affine, activation: str) -> Tensor:
    return ACTIVATIONS[activation].apply_(torch_ops.preactivation(x, normalization, residual)).to(x.dtype)


def _dy(x: Tensor, grad_output: Tensor, residual: Tensor | None, normalization: Affine, activation: str) -> Tensor:
    if activation == "identity":
        return grad_output
    z = torch_ops.preactivation(x, normalization, residual)
    return torch_ops.activation_backward(grad_output, z, activation).to(x.dtype)


def _grad_input(
    x: Tensor,
    grad_output: Tensor,
    residual: Tensor | None,
    normalization: Affine,
    activation: str,
    scale: Tensor,
    linear: Affine,
) -> Tensor:
    dy = _dy(x, grad_output, residual, normalization, activation)
    return linear(x).add_(dy * scale).to(x.dtype)


def _centred_sums(x: Tensor, pivot: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    centred = x - pivot
    return _sum(centred, dim), _sum(centred.square(), dim)


def _backward_sums(
    x: Tensor, grad_output: Tensor, residual: Tensor | None, normalization: Affine, activation: str, dim: int
) -> tuple[Tensor, Tensor]:
    centred = x - normalization.pivot
    dy = _dy(x, grad_output, residual, normalization, activation).to(centred.dtype)
    return _sum(dy, dim), _sum(dy * centred, dim)


def _sum(values: Tensor, dim: int) -> Tensor:
    """Return the sum over `dim` in the accumulation dtype, short, then over the first dimension in float64."""
    return values.sum(dim).double().sum(0)


# How they are run.


def _elementwise(kernel: Callable[..., Tensor], view: View, operands: tuple[Tensor | None, ...], *rest: Any) -> Tensor:
    """Return the kernel's result in the layout of the first operand."""
    x = operands[0]
    assert x is not None
    flat = [None if t is None else _rows(view, like(t, x)) for t in operands]
    result: Tensor = _compiled(kernel, _variant(view, flat, rest))(*flat, *rest)
    # x is dense, and the result has its order; `data`: a view would refuse what works in place on it
    return result.as_strided(x.shape, x.stride()).data


def _sums(
    kernel: Callable[..., tuple[Tensor, Tensor]], view: View, operands: tuple[Tensor | None, ...], *rest: Any
) -> tuple[Array, Array]:
    """Return both sums of the kernel, (C,) float64."""
    x = operands[0]
    assert x is not None
    flat = [None if t is None else _rows(view, like(t, x)) for t in operands]
    num_rows = x.numel() // view.num_channels
    compiled = _compiled(kernel, _variant(view, flat, rest))
    if not view.is_channels_last:
        total, product = compiled(*flat, *rest, 2)
        return view.fold(total.numpy()), view.fold(product.numpy())
    whole = num_rows // BLOCK_ROWS * BLOCK_ROWS
    found = []
    if whole:
        blocks = [None if t is None else t[:whole].view(-1, BLOCK_ROWS, t.shape[1]) for t in flat]
        found.append(compiled(*blocks, *rest, 1))
    if whole < num_rows:
        found.append(kernel(*(None if t is None else t[whole:][None] for t in flat), *rest, 1))
    totals, products = zip(*found, strict=True)
    return sum(total.numpy() for total in totals), sum(product.numpy() for product in products)


def _rows(view: View, tensor: Tensor) -> Tensor:
    """Return a view of (N, C * repeats, S / repeats), channels last of (N * S, C), without a graph."""
    if view.is_channels_last:
        return tensor.movedim(1, -1).reshape(-1, view.num_channels).data
    return view.of(tensor).data  # `data`: what is a view is guarded by what it is a view of


def _across(view: View, values: Array, x: Tensor) -> Tensor:
    """Return (C,) values so that they broadcast over what `_rows` and its blocks are."""
    if view.is_channels_last:
        return torch.from_numpy(values.astype(np.float64 if x.dtype == torch.float64 else np.float32))
    return view.spread(values, x)[:, None]


def _normalization(view: View, x: Tensor, channels: Channels) -> Affine:
    return Affine(*(_across(view, values, x) for values in coefficients_of(channels).numpy()))


def _variant(view: View, flat: list[Tensor | None], rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what compiled code depends on besides sizes."""
    assert flat[0] is not None
    options = [value for value in rest if isinstance(value, str)]
    return view.is_channels_last, flat[0].dtype, *[t is None for t in flat], *options


@cache
def _compiled(kernel: Callable[..., Any], variant: tuple[Any, ...]) -> Callable[..., Any]:
    """Return a compiled copy of `kernel`, one for each variant: dynamo limits how many a function may have."""
    assert isinstance(kernel, types.FunctionType)
    copied = types.FunctionType(
        kernel.__code__.replace(co_name=f"{kernel.__name__}_{_compiled.cache_info().currsize}"),
        kernel.__globals__,
        kernel.__name__,
    )
    compiled = torch.compile(copied, dynamic=True, fullgraph=True)

    def run(*args: Any) -> Any:
        global is_available
        if is_available:
            try:
                with torch._dynamo.config.patch(recompile_limit=64):
                    return compiled(*args)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                is_available = False
                reason = " ".join(str(error).split("\n")[:2])
                warnings.warn(f"syncbn runs without compiled kernels: torch.compile failed, {reason}", stacklevel=2)
            except (torch._dynamo.exc.TorchDynamoException, RuntimeError):
                pass  # a mode or a stance under which nothing may be compiled: this call goes without
        return kernel(*args)

    return run
