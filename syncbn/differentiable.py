"""The layer in differentiable operations out of place, for derivatives of any order and in either mode.

`backward` is the backward pass under `create_graph=True`: the forward pass is computed again and differentiated. Every
rank takes part in two all-reduces, whether or not its x needs a gradient. `forward` is the forward pass inside a
transform of torch.func, and for tensors with a tangent.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from syncbn.activations import ACTIVATIONS
from syncbn.collectives import release_peers
from syncbn.convolution import Geometry, convolve
from syncbn.statistics import (
    Epilogue,
    Running,
    accumulation_dtype,
    apply_mask,
    invstd_of,
    local_count,
    pack,
    pack_sums,
    per_channel,
    pivot_of,
    reduced_dims,
    unpack,
    unpack_sums,
    update_running_stats_,
    without_rounding,
)
from syncbn.transforms import is_transform_active


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    *,
    eps: float,
    running: Running | None,
    peers: release_peers,
) -> Tensor:
    """Return y, and move the running statistics in place.

    Raises:
        ValueError: a vmap over x in a group of several ranks, one value per channel over all ranks, or one set of
            running statistics for all calls of a vmap; on every rank.
    """
    mask = epilogue.mask
    dims, count = reduced_dims(x), local_count(x, mask)
    divisor = count.clamp(min=1)
    local_pivot = pivot_of(apply_mask(x, mask).sum(dims, dtype=accumulation_dtype(x)).detach() / divisor, x)
    centred = apply_mask(x - per_channel(local_pivot, x), mask)
    offset = centred.sum(dims).double() / divisor
    M2 = centred.square().sum(dims).double() - count * offset.square()
    peers.check_sum = partial(peers.check_count, x=x, mask=mask)
    packed = peers.differentiable_all_reduce(pack(count, local_pivot.double() + offset, M2.clamp(min=0)))
    packed = torch.cat([packed[:1].detach(), packed[1:]])  # the count has no derivative
    if running is not None:
        _MoveRunning.apply(packed.detach(), *running, peers)
    _, mean, var = unpack(packed, peers.ranks)
    return normalize(x, mean, var, weight, bias, epilogue, eps=eps)


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    *,
    eps: float,
) -> Tensor:
    """Return y for the given mean and biased var, (C,) float64."""
    pivot = mean.detach().to(accumulation_dtype(x))
    centred = apply_mask(x - per_channel(pivot, x), epilogue.mask)
    return _apply(centred, mean - pivot, invstd_of(var, eps), weight, bias, epilogue).to(x.dtype)


def backward(
    grad_outputs: tuple[Tensor | None, ...],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    needs_grad: tuple[bool, ...],
    *,
    count: Tensor,
    mean: Tensor,
    eps: float,
    peers: release_peers,
    convolutions: tuple[Sequence[Geometry], tuple[Tensor | None, ...], torch.dtype] | None = None,
    needs_parameters: tuple[bool, ...] = (),
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias, residual and of the convolutions' parameters, None if not needed.

    Args:
        grad_outputs: like x, one; or with `convolutions`, one like the output of each, or None.
        needs_grad: of x, weight, bias and residual.
        count: () float64, of the group.
        mean: (C,) float64, of the group.
        peers: the block of this backward pass.
        convolutions: that read y, with their parameters and the dtype in which they compute.
        needs_parameters: whether these need a gradient.
    """
    needs_x, _, _, needs_residual = needs_grad
    second = release_peers(peers.process_group, x.shape[1], tensors=(x,))
    with second, torch.enable_grad():
        x = x if needs_x else nn.Parameter(x.detach())  # a leaf; torch.func forbids requires_grad_()
        residual = epilogue.residual
        if needs_residual and residual is None:
            residual = nn.Parameter(torch.zeros_like(x))
        if needs_grad[2] and bias is not None and not bias.requires_grad:
            bias = nn.Parameter(bias)
        # Views, so that differentiation stops there even if one input was computed from another; view_as changes the
        # stride of a dimension of size 1, which float64 convolutions take for another layout.
        x = x.expand_as(x)
        geometries, own_parameters, dtype = convolutions or ((), (), x.dtype)
        weight, bias, residual, *parameters = (
            t if t is None else t.expand_as(t) for t in (weight, bias, residual, *own_parameters)
        )
        # always with x: every rank has to take part in the second all-reduce
        needed = [True, *needs_grad[1:], *needs_parameters]
        tensors = [x, weight, bias, residual, *parameters]
        inputs = [t for t, needs in zip(tensors, needed, strict=True) if needs and t is not None]

        def forward_again(*inputs: Tensor) -> tuple[Tensor, ...]:
            given = iter(inputs)
            x, weight, bias, residual, *parameters = (
                next(given) if needs and t is not None else t for t, needs in zip(tensors, needed, strict=True)
            )
            assert x is not None
            own = epilogue._replace(residual=residual)
            y = _forward_again(x, weight, bias, own, count=count, pivot=mean, eps=eps, peers=peers, second=second)
            return (y,) if convolutions is None else convolve(y, geometries, parameters, dtype)

        if is_transform_active():  # torch.autograd.grad would not see through its wrappers
            outputs, pull_back, *_ = torch.func.vjp(forward_again, *inputs)
            found: Any = pull_back(_without_none(grad_outputs, outputs))
        else:
            outputs = forward_again(*inputs)
            found = torch.autograd.grad(outputs, inputs, _without_none(grad_outputs, outputs), create_graph=True)
        grads = iter(found)
    grad_input = next(grads)
    return grad_input if needs_x else None, *(next(grads) if needs else None for needs in needed[1:])


def _without_none(grads: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        torch.zeros_like(output) if grad is None else grad for grad, output in zip(grads, outputs, strict=True)
    )


def _forward_again(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epilogue: Epilogue,
    *,
    count: Tensor,
    pivot: Tensor,
    eps: float,
    peers: release_peers,
    second: release_peers,
) -> Tensor:
    """Return y; `pivot` is the mean of the group as a constant, subtracted first so that nothing cancels."""
    dims = reduced_dims(x)
    centred = apply_mask(x - per_channel(pivot, x), epilogue.mask)
    local = pack_sums(centred.sum(dims).double(), centred.square().sum(dims).double())
    sums = peers.differentiable_all_reduce(local, second)
    offset, square = unpack_sums(sums / count.clamp(min=1))
    invstd = invstd_of(without_rounding((square - offset.square()).clamp(min=0), pivot, peers.ranks), eps)
    return _apply(centred, offset, invstd, weight, bias, epilogue).to(x.dtype)


def _apply(
    centred: Tensor, offset: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None, epilogue: Epilogue
) -> Tensor:
    """Return y in the accumulation dtype, from x minus a pivot and the mean minus that pivot."""
    residual, mask, activation = epilogue
    z = (centred - per_channel(offset, centred)) * per_channel(invstd, centred)
    if weight is not None:
        z = z * per_channel(weight, centred)
    if bias is not None:
        z = z + per_channel(bias, centred)
    if residual is not None:
        z = z + apply_mask(residual, mask)
    return apply_mask(ACTIVATIONS[activation].apply(z), mask)


class _MoveRunning(torch.autograd.Function):
    """Moves running statistics from inside a transform of torch.func, which permits that to a Function alone."""

    @staticmethod
    def forward(
        packed: Tensor,
        mean: Tensor,
        var: Tensor,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        peers: release_peers,
    ) -> Tensor:
        """Return the count, because a Function returns a tensor."""
        count, batch_mean, batch_var = unpack(packed, peers.ranks)
        running = Running(mean, var, num_batches_tracked, momentum)
        update_running_stats_(running, count=count, mean=batch_mean, var=batch_var)
        return count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing: there is no derivative."""
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> None:
        """Return no tangent."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        """Move each set of running statistics.

        Raises:
            ValueError: there is one set for all calls; on every rank.
        """
        running, peers = args[1:4], args[-1]
        if any(own is not None and dim is None for own, dim in zip(running, in_dims[1:4], strict=True)):
            raise ValueError(
                f"expected running statistics for each call of {peers.name} under torch.func.vmap, got one for all: "
                "pass the buffers too (torch.func.stack_module_state), or use track_running_stats=False"
            )
        calls = (
            [a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True)]
            for i in range(info.batch_size)
        )
        return torch.stack([_MoveRunning.apply(*call) for call in calls]), 0
