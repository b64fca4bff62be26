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
    padding, dilation = convolution.padding, convolution.dilation
    if convolution.padding_mode != "zeros":
        return None
    if padding == "valid":
        padding = (0,) * len(dilation)
    if isinstance(padding, str):  # "same"
        totals = [step * (size - 1) for step, size in zip(dilation, convolution.kernel_size, strict=True)]
        if any(total % 2 for total in totals):
            return None
        padding = tuple(total // 2 for total in totals)
    return Geometry(convolution.stride, padding, dilation, convolution.groups)


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
