"""The activations that the layer can fuse: for each one the function and its gradient."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAKY_RELU_SLOPE = 0.01  # the default of torch.nn.LeakyReLU


class Activation(NamedTuple):
    """`apply(z)`, `apply_(z)` in place, and `backward(dy, z)`: dy times the derivative at z."""

    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "identity": Activation(lambda z: z, lambda z: z, lambda dy, z: dy),
    "relu": Activation(F.relu, F.relu_, lambda dy, z: torch.ops.aten.threshold_backward(dy, z, 0)),
    "leaky_relu": Activation(
        lambda z: F.leaky_relu(z, LEAKY_RELU_SLOPE),
        lambda z: F.leaky_relu_(z, LEAKY_RELU_SLOPE),
        lambda dy, z: torch.ops.aten.leaky_relu_backward(dy, z, LEAKY_RELU_SLOPE, False),
    ),
    "silu": Activation(F.silu, lambda z: F.silu(z, inplace=True), torch.ops.aten.silu_backward),
    "relu6": Activation(
        F.relu6, lambda z: F.relu6(z, inplace=True), lambda dy, z: torch.ops.aten.hardtanh_backward(dy, z, 0, 6)
    ),
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_, torch.ops.aten.gelu_backward),
    "hardswish": Activation(F.hardswish, lambda z: F.hardswish(z, inplace=True), torch.ops.aten.hardswish_backward),
}

MODULES: dict[str, type[nn.Module]] = {  # that do the same with their default arguments
    "identity": nn.Identity, "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "relu6": nn.ReLU6,
    "gelu": nn.GELU, "hardswish": nn.Hardswish,
}  # fmt: skip


def name_of(module: nn.Module) -> str | None:
    """Return the name of the activation that a module is, in place or not; None if there is none."""
    name = next((name for name, kind in MODULES.items() if type(module) is kind), None)
    if isinstance(module, nn.LeakyReLU) and module.negative_slope != LEAKY_RELU_SLOPE:
        return None
    if isinstance(module, nn.GELU) and module.approximate != "none":
        return None
    return name


def check_activation(name: str) -> None:
    """Raise ValueError, on this rank alone, unless `name` is one of `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"expected activation to be one of {', '.join(ACTIVATIONS)}, got {name!r}")
