"""sync_batch_norm: argument checks that every rank survives, then the autograd Function."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from syncbn import backends, checks, collectives
from syncbn.activations import ACTIVATIONS, check_activation
from syncbn.backends.torch_ops import hide
from syncbn.function import SyncBatchNormFunction
from syncbn.groups import Group, group_size
from syncbn.statistics import Running, advance_


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
        running_mean: (C,), updated in place in training; used in place of batch statistics otherwise.
        running_var: (C,), likewise; the batch enters with its unbiased variance.
        weight: (C,) or None.
        bias: (C,) or None.
        training: normalize with the statistics of the batch and update the running ones.
        momentum: weight of the batch in the running statistics (torch's convention).
        eps: added to the variance.
        process_group: the ranks that share statistics; all of them by default.
        residual: like `input`, added in front of the activation.
        mask: bool, broadcastable to (N, 1, *S); where False, values count as absent and the output is 0.
        activation: identity, relu, leaky_relu (slope 0.01) or silu.

    Returns:
        `activation(bn(input) + residual)`, like `input` in shape, dtype and memory format.

    Raises:
        ValueError: an argument does not fit; in training on every rank of the group, so that none is left waiting.
        ValueError: one value per channel over all ranks in training, on every rank.

    Source: Ioffe & Szegedy 2015, Algorithms 1 and 2, with the mini-batch spread over ranks.
    """
    known = next((tensor for tensor in (weight, running_mean, bias) if tensor is not None), None)
    num_features = None if known is None else known.numel()

    def check() -> None:
        check_activation(activation)
        check_input(input, num_features=num_features, parameter=known, residual=residual, mask=mask)
        _check_per_channel(num_features, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)

    if not training:
        check()
        y = F.batch_norm(hide(input, mask), running_mean, running_var, weight, bias, False, momentum, eps)
        return finish(y, residual=residual, mask=mask, activation=activation)
    running = None
    if running_mean is not None and running_var is not None:
        running = Running(running_mean, running_var, None, momentum)
    return normalize(
        input,
        weight,
        bias,
        residual=residual,
        mask=mask,
        activation=activation,
        check=check,
        num_features=num_features,
        eps=eps,
        process_group=process_group,
        running=running,
    )


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None,
    mask: Tensor | None,
    activation: str,
    check: Callable[[], None],
    num_features: int | None,
    eps: float,
    process_group: Group,
    running: Running | None,
) -> Tensor:
    """Return x normalized over the group, and move the running statistics.

    Args:
        check: raises ValueError for arguments that do not fit; this rank then still releases its peers.
        num_features: C where it is known without x.
        running: moved in place, but not while a checkpoint recomputes.

    Raises:
        ValueError: as `sync_batch_norm`.
        DesyncError: with `detect_desync`, ranks differ; on every rank.
    """
    differentiable = torch.is_grad_enabled()
    needs_grad = [differentiable and tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)]
    record = checks.announce(x, needs_grad, process_group)
    try:
        check()
        updates_running = backends.select(x).updates_running
    except Exception:
        channels = num_features if num_features is not None else x.shape[1] if x.dim() > 1 else 0
        collectives.announce_refusal(channels, x.device if weight is None else weight.device, process_group)
        raise
    at_most_one = mask is None and x.numel() // x.shape[1] <= 1
    if at_most_one and x.numel() > 0 and group_size(process_group) == 1:
        _raise_on_every_rank(1, x, process_group)
    running = None if is_recomputing() else running
    is_fused = updates_running and running is not None and running.mean.is_contiguous() and running.var.is_contiguous()
    y, count, mean, var = SyncBatchNormFunction.apply(
        x, weight, bias, residual, mask, eps, activation, process_group, record, running if is_fused else None
    )
    if torch.compiler.is_compiling():
        count, mean, var = count.detach(), mean.detach(), var.detach()  # torch 2.11 takes them for differentiable
    if _may_read(count, needs_to=at_most_one):
        _raise_on_every_rank(float(count.cpu().numpy()), x, process_group)  # who records operations refuses item()
    if running is not None and not is_fused:
        advance_(running, count=count, mean=mean, var=var)
    return y


def finish(y: Tensor, *, residual: Tensor | None, mask: Tensor | None, activation: str) -> Tensor:
    """Return what follows normalization in evaluation, in operations that every exporter knows."""
    if residual is not None:
        y = y + hide(residual, mask)
    y = ACTIVATIONS[activation].apply(y)
    return hide(y, mask)


def is_recomputing() -> bool:
    """Return whether this forward pass runs inside a backward pass: activation checkpointing repeats it there."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def check_input(
    x: Tensor,
    *,
    num_features: int | None,
    parameter: Tensor | None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
) -> None:
    """Raise if x cannot be normalized.

    Args:
        num_features: C, or None where only x tells it.
        parameter: weight or running mean, whose device and dtype x has to fit.

    Raises:
        ValueError: on this rank alone; what must hold, what came and what to do.
    """
    if torch.jit.is_tracing():  # sizes are tensors there, and a branch on them would be frozen in
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


def _check_per_channel(num_features: int | None, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != (num_features,):
            raise ValueError(f"expected {name} of shape ({num_features},), got {tuple(tensor.shape)}")


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


def _may_read(count: Tensor, *, needs_to: bool) -> bool:
    """Return whether to look at the total count, which on an accelerator makes the host wait for it.

    A rank with two values per channel or more knows that the total is not 1; only the others have to look.
    """
    if torch.compiler.is_compiling():
        return False
    if count.device.type == "cpu":
        return type(count) is Tensor  # not one without data, as tracers use
    return needs_to and not (count.is_cuda and torch.cuda.is_current_stream_capturing())


def _raise_on_every_rank(count: float, x: Tensor, process_group: Group) -> None:
    if count != count:
        raise ValueError(
            "expected valid input on every rank, got a refusal from another rank of the group: its error says why"
        )
    if count == 1:
        raise ValueError(
            f"expected more than 1 value per channel when training, got 1 over all "
            f"{group_size(process_group)} ranks (here: input of shape {tuple(x.shape)}): "
            "use a larger batch, or call .eval()"
        )
