"""Convolutions of one tensor, and their gradients with respect to the input and to the parameters apart.

`dtype` is that in which they compute: input and weights are converted by hand, because autocast would keep converted
weights that have no gradient.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

aten = torch.ops.aten
CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Geometry(NamedTuple):
    """The arguments of a convolution besides its tensors, one number for each spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def geometry_of(convolution: nn.Module) -> Geometry | None:
    """Return the geometry, or None if the padding is not with equally many zeros on both sides."""
    assert isinstance(convolution, CLASSES)
    if convolution.padding_mode != "zeros":
        return None
    sizes = convolution.stride, convolution.padding, convolution.dilation
    return resolve(convolution.weight.shape[2:], *sizes, convolution.groups)


def resolve(
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> Geometry | None:
    """Return the geometry of these arguments, or None for the padding "same" with more zeros on one side."""
    dims = len(kernel_size)
    stride, dilation = _of_each_dim(stride, dims), _of_each_dim(dilation, dims)
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, kernel_size, strict=True)]
        if any(total % 2 for total in totals):
            return None
        padding = [total // 2 for total in totals]
    elif padding == "valid":
        padding = 0
    if isinstance(padding, str):
        raise ValueError(f"expected padding of numbers, 'same' or 'valid', got {padding!r}")
    return Geometry(stride, _of_each_dim(padding, dims), dilation, groups)


def _of_each_dim(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def dtype_of(x: Tensor) -> tuple[torch.dtype, bool]:
    """Return the dtype in which convolutions of x compute, and whether autocast converts their operands to it."""
    device = x.device.type
    is_casting = device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return (torch.get_autocast_dtype(device), True) if is_casting else (x.dtype, False)


def check_operands(x: Tensor, geometries: Sequence[Geometry], parameters: Sequence[Tensor | None]) -> None:
    """Raise ValueError if one of the convolutions cannot be applied to a tensor like x."""
    dtype, is_casting = dtype_of(x)
    for geometry, weight, bias in _each(geometries, parameters):
        kernel, of_weight = tuple(weight.shape[2:]), f"a convolution with weight {tuple(weight.shape)}"
        if any(len(sizes) != len(kernel) for sizes in geometry[:3]):
            raise ValueError(f"expected {len(kernel)} numbers of stride, padding and dilation, got {geometry[:3]}")
        if x.dim() != weight.dim() or x.shape[1] != weight.shape[1] * geometry.groups:
            expected = f"(N, {weight.shape[1] * geometry.groups}{', size' * len(kernel)})"
            raise ValueError(f"expected input of shape {expected} for {of_weight}, got {tuple(x.shape)}")
        for operand in (weight, bias):
            if operand is None:
                continue
            own = dtype if is_casting and operand.dtype != torch.float64 else operand.dtype
            if own != dtype or operand.device != x.device:
                raise ValueError(
                    f"expected parameters in {dtype} on {x.device}, like the input of {of_weight}, got "
                    f"{operand.dtype} on {operand.device}: move or convert the convolution"
                )
        for size, extent, padding, step in zip(x.shape[2:], kernel, geometry.padding, geometry.dilation, strict=True):
            if size + 2 * padding < step * (extent - 1) + 1:
                raise ValueError(
                    f"expected input at least as large as the kernel of {of_weight}, padding {geometry.padding} and "
                    f"dilation {geometry.dilation}, got {tuple(x.shape)}"
                )


def convolve(
    x: Tensor, geometries: Sequence[Geometry], parameters: Sequence[Tensor | None], dtype: torch.dtype | None
) -> tuple[Tensor, ...]:
    """Return the output of each convolution of x.

    Args:
        parameters: weight and bias of each convolution in turn, the bias may be None.
        dtype: None to convert nothing by hand.
    """
    outputs = []
    for geometry, *operands in _each(geometries, parameters):
        own = (t if t is None or dtype is None else t.to(dtype) for t in (x, *operands))
        outputs.append(aten.convolution(*own, *_arguments(geometry)))
    return tuple(outputs)


def grad_of_input(
    grad_outputs: Sequence[Tensor | None],
    x: Tensor,
    geometries: Sequence[Geometry],
    parameters: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient of the input of the convolutions, of which shape, dtype and layout of x are known alone."""
    stand_in = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    total: Tensor | None = None
    for grad_output, (geometry, weight, _) in zip(grad_outputs, _each(geometries, parameters), strict=True):
        if grad_output is not None:
            own = _backward(grad_output, stand_in, weight.to(dtype), geometry, (True, False, False))[0]
            total = own if total is None else total.add_(own)
    return torch.zeros_like(x) if total is None else total.to(x.dtype)


def grads_of_parameters(
    grad_outputs: Sequence[Tensor | None],
    x: Tensor | None,
    geometries: Sequence[Geometry],
    parameters: Sequence[Tensor | None],
    dtype: torch.dtype,
    needs_grad: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of weight and bias of each convolution, in their dtypes, None where they are not needed.

    Args:
        x: the input of the convolutions; None if none is needed.
    """
    if x is None:
        return [None] * len(needs_grad)
    x = x.to(dtype)
    grads: list[Tensor | None] = []
    needs = zip(needs_grad[::2], needs_grad[1::2], strict=True)
    for grad_output, own, (geometry, weight, bias) in zip(
        grad_outputs, needs, _each(geometries, parameters), strict=True
    ):
        if grad_output is None or not any(own):
            grads += [None, None]
            continue
        _, grad_weight, grad_bias = _backward(grad_output, x, weight.to(dtype), geometry, (False, *own))
        grads += [
            grad_weight.to(weight.dtype) if own[0] else None,
            grad_bias.to(bias.dtype) if own[1] and bias is not None else None,
        ]
    return grads


def _each(
    geometries: Sequence[Geometry], parameters: Sequence[Tensor | None]
) -> list[tuple[Geometry, Tensor, Tensor | None]]:
    return list(zip(geometries, parameters[::2], parameters[1::2], strict=True))  # type: ignore[arg-type]


def _backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, output_mask: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    bias_sizes = [weight.shape[0]] if output_mask[2] else None
    found: tuple[Tensor, Tensor, Tensor] = aten.convolution_backward(
        grad_output, x, weight, bias_sizes, *_arguments(geometry), output_mask
    )
    return found


def _arguments(geometry: Geometry) -> tuple[Any, ...]:
    """Return stride, padding, dilation, whether it is transposed, the padding of the output, and groups."""
    return *geometry[:3], False, (0,) * len(geometry.stride), geometry.groups
