"""sync_batch_norm: argument checks, then the autograd Function, in a block where an error reaches every rank."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from syncbn import backends, differentiable
from syncbn.activations import ACTIVATIONS, check_activation
from syncbn.collectives import release_peers
from syncbn.function import MatchGradientLayout, SyncBatchNormFunction
from syncbn.groups import Group, checked
from syncbn.statistics import Epilogue, Running, apply_mask
from syncbn.transforms import is_transformed


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    process_group: Group = None,
    *,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "identity",
) -> Tensor:
    """Normalize over the batch of all ranks: `torch.nn.functional.batch_norm` with statistics of the whole group.

    In training every rank of the group must call it, one with an empty batch too. Otherwise nothing communicates.

    Args:
        input: (N, C) to (N, C, D, H, W), floating point, on any device; N and the spatial size may differ by rank.
        running_mean: (C,), updated in place in training; replaces the batch mean otherwise.
        running_var: (C,), likewise; updated with the unbiased variance of the batch.
        weight: (C,) or None.
        bias: (C,) or None.
        training: normalize with the statistics of the batch and update the running statistics.
        momentum: weight of the batch in the running statistics (torch's convention).
        eps: added to the variance.
        process_group: the ranks that share statistics, or a DeviceMesh with one dimension; all ranks by default.
        residual: like `input`, added in front of the activation.
        mask: bool, broadcastable to (N, 1, *S); where False, values count as absent and the output is 0.
        activation: identity, relu, leaky_relu (slope 0.01), silu, relu6, gelu or hardswish.

    Returns:
        `activation(bn(input) + residual)`, like `input` in shape, dtype and memory format.

    Raises:
        ValueError: an argument is invalid. In training, every rank of the group raises, so that none waits for a rank
            that has failed; so it does for any other error before the all-reduce.
        TooFewValuesError: in training, one value per channel over all ranks; on every rank.
        PeerError: another rank of the group has raised, and the values are on CPU; on this rank.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2, with the mini-batch spread over ranks.
    """
    process_group = process_group if isinstance(process_group, str) else checked(process_group)
    tensors = {"weight": weight, "running_mean": running_mean, "bias": bias, "running_var": running_var}
    known = next((tensor for tensor in tensors.values() if isinstance(tensor, Tensor)), None)
    size = most_common_size(input, list(tensors.values()))
    epilogue = Epilogue(residual, mask, activation)
    if not training:
        check_activation(activation)
        check_per_channel(input, tensors)
        return evaluate(input, weight, bias, epilogue, running_mean, running_var, num_features=None, eps=eps)
    with release_peers(process_group, size, tensors=(known, input)) as peers:
        peers.announce(input, weight, bias)
        check_activation(activation)
        check_per_channel(input, tensors)
        running = running_of(running_mean, running_var, None, momentum)
        y: Tensor = normalize_over_group(
            peers, input, weight, bias, epilogue, num_features=None, eps=eps, running=running
        )
        return y


def normalize_over_group(
    peers: release_peers,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    *,
    num_features: int | None,
    eps: float,
    running: Running | None,
    temperature: float = 1.0,
    apply: Callable[..., Any] = SyncBatchNormFunction.apply,
) -> Any:
    """Return `activation(temperature * bn(x) + residual)` over the group of `peers`; move the running statistics.

    Args:
        peers: the block that surrounds this call.
        num_features: C if it is known without x.
        running: moved in place, but not while a checkpoint recomputes.
        apply: takes the arguments of `SyncBatchNormFunction`; what it returns is returned, except under transforms.

    Raises:
        ValueError: as `sync_batch_norm`.
    """
    residual, mask, activation = epilogue
    if eps < 0:
        raise ValueError(f"expected eps of at least 0, got {eps}")
    parameter = _first(weight, None if running is None else running.mean, bias)
    check_input(x, epilogue, num_features=num_features, parameter=parameter)
    if not torch.jit.is_tracing():
        own = {} if running is None else {"running_mean": running.mean, "running_var": running.var}
        check_per_channel(x, {"weight": weight, "bias": bias, **own})
    weight, bias = _scaled(weight, bias, temperature, x if parameter is None else parameter, x.shape[1])
    if is_transformed(x, weight, bias, residual):
        return differentiable.forward(x, weight, bias, epilogue, eps=eps, running=running, peers=peers)
    if torch.jit.is_tracing() and peers.ranks == 1:
        # it would record in-place operations of the Function twice; without the Function they are differentiable too
        packed = backends.PLAIN.pack_stats(x, mask)
        return backends.PLAIN.normalize(x, packed, weight, bias, epilogue, eps=eps, ranks=1, running=running)[0]
    moved = (None, None, None, None) if running is None else running
    return apply(x, weight, bias, residual, mask, *moved, eps, activation, peers)


def evaluate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    num_features: int | None,
    eps: float,
    temperature: float = 1.0,
) -> Tensor:
    """Return `activation(temperature * bn(x) + residual)` with running statistics; nothing communicates.

    All operations are supported by exporters.

    Raises:
        ValueError: an argument does not fit; on this rank alone.
    """
    residual, mask, activation = epilogue
    running_of(running_mean, running_var, None, None)
    parameter = _first(weight, running_mean, bias)
    check_input(x, epilogue, num_features=num_features, parameter=parameter)
    weight, bias = _scaled(weight, bias, temperature, x if parameter is None else parameter, x.shape[1])
    if running_mean is not None:  # FSDP casts parameters and not buffers; torch requires one dtype
        weight, bias = (p if p is None else p.to(running_mean.dtype) for p in (weight, bias))
    if running_mean is not None and running_var is not None and is_transformed(x, weight, bias, residual):
        mean, var = running_mean.double(), running_var.double()
        return differentiable.normalize(x, mean, var, weight, bias, epilogue, eps=eps)
    x = apply_mask(x, mask)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    if y.requires_grad and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        # torch 2.14 on CPU: gradients of weight and bias are wrong for some pairs of layouts of x and the gradient
        y = MatchGradientLayout.apply(y, torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))
    if residual is not None:
        y = y + apply_mask(residual, mask)
    return apply_mask(ACTIVATIONS[activation].apply(y), mask)


def running_of(
    mean: Tensor | None, var: Tensor | None, num_batches_tracked: Tensor | None, momentum: float | None
) -> Running | None:
    """Return the running statistics, None if there are none.

    Raises:
        ValueError: there is one of mean and var; on this rank alone.
    """
    if mean is None and var is None:
        return None
    if mean is None or var is None:
        names = ("running_var", "running_mean") if mean is None else ("running_mean", "running_var")
        raise ValueError(f"expected running_mean and running_var, or neither, got {names[0]} and {names[1]}=None")
    return Running(mean, var, num_batches_tracked, momentum)


def check_input(x: Tensor, epilogue: Epilogue, *, num_features: int | None, parameter: Tensor | None) -> None:
    """Raise if x cannot be normalized, or the epilogue does not fit x.

    Args:
        num_features: C, or None if only x defines it.
        parameter: weight, running mean or bias; x must be on its device and have a compatible dtype.

    Raises:
        ValueError: on this rank alone; says what must hold, what came and what to do.
    """
    residual, mask, _ = epilogue
    for name, tensor in (("input", x), ("residual", residual), ("mask", mask)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "input"):
            raise ValueError(f"expected {name} to be a torch.Tensor, got {type(tensor).__name__}: pass one tensor")
        if tensor is not None and (tensor.layout != torch.strided or tensor.is_nested):
            kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
            raise ValueError(f"expected {name} to be a dense tensor, got {kind}: convert it, or pad it and pass a mask")
    if torch.jit.is_tracing():  # sizes are tensors there, and the trace would fix the outcome of a branch
        return
    channels = "C" if num_features is None else num_features
    if x.dim() < 2:
        raise ValueError(
            f"expected input of shape (N, {channels}) or (N, {channels}, ...), got {tuple(x.shape)}: "
            "add the batch dimension"
        )
    if not x.is_floating_point():
        raise ValueError(f"expected input of a floating dtype, got {x.dtype}: convert it, for example with .float()")
    if num_features is not None and x.shape[1] != num_features:
        raise ValueError(
            f"expected input of shape (N, {num_features}, ...), got {tuple(x.shape)}: num_features is {num_features}, "
            f"make it {x.shape[1]} or move the channels to dimension 1"
        )
    if x.shape[1] == 0:
        raise ValueError(f"expected at least one channel, got input of shape {tuple(x.shape)}")
    if parameter is not None:
        _check_device_and_dtype(x, parameter)
    for name, tensor in (("residual", residual), ("mask", mask)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"expected a {name} on {x.device} like the input, got {tensor.device}: move it with .to(input.device)"
            )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"expected a residual like the input, {tuple(x.shape)} of {x.dtype}, got {tuple(residual.shape)} of "
            f"{residual.dtype}: expand or convert it"
        )
    if mask is not None:
        _check_mask(mask, x)


def _first(*tensors: Tensor | None) -> Tensor | None:
    return next((tensor for tensor in tensors if tensor is not None), None)


def check_per_channel(x: Any, tensors: dict[str, Any]) -> None:
    """Raise ValueError, on this rank alone, unless each of the named tensors is None or (C,), C being that of x."""
    has_channels = isinstance(x, Tensor) and x.dim() > 1  # if not, `check_input` raises
    size = x.shape[1] if has_channels else most_common_size(x, list(tensors.values()))
    reason = f": one value per channel of the input, {tuple(x.shape)}" if has_channels else ""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ValueError(f"expected {name} to be a torch.Tensor or None, got {type(tensor).__name__}")
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(f"expected {name} of shape ({size},), got {tuple(tensor.shape)}{reason}")


def _check_device_and_dtype(x: Tensor, parameter: Tensor) -> None:
    if parameter.device != x.device:
        raise ValueError(
            f"expected input on {parameter.device} like the parameters, got {x.device}: move one to the other's device"
        )
    half = x.dtype in (torch.float16, torch.bfloat16)
    if parameter.dtype != x.dtype and not (half and parameter.dtype == torch.float32):
        raise ValueError(
            f"expected input of {parameter.dtype} like the parameters (or of half precision for float32 parameters), "
            f"got {x.dtype}: convert one of them"
        )


def _check_mask(mask: Tensor, x: Tensor) -> None:
    target = (x.shape[0], 1, *x.shape[2:])
    fits = mask.dim() <= x.dim() and all(
        size in (1, wanted) for size, wanted in zip(reversed(mask.shape), reversed(target), strict=False)
    )
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"expected a mask of torch.bool that broadcasts to {target}, got {tuple(mask.shape)} of {mask.dtype}: "
            "True marks valid positions, the same for all channels"
        )


def _scaled(
    weight: Tensor | None, bias: Tensor | None, temperature: float, like: Tensor, num_channels: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias times the temperature, so that bn(x) is scaled by it with 2C multiplications."""
    if temperature == 1:
        return weight, bias
    if weight is None and bias is None:
        return like.new_full((num_channels,), temperature), None
    weight = like.new_full((num_channels,), temperature) if weight is None else weight * temperature
    return weight, None if bias is None else bias * temperature


def most_common_size(x: Any, tensors: list[Any]) -> int | None:
    """Return C as most of the arguments have it, an invalid one among them; of two equally common sizes, the first."""
    sizes = [len(tensor) for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim() == 1]
    try:
        shape = tuple(getattr(x, "shape", ()))
    except Exception:  # an input that fails when asked for it
        shape = ()
    sizes += shape[1:2] or shape[:1]
    return max(sizes, key=sizes.count) if sizes else None
