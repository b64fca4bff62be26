"""The autograd Function: the order of events in forward and backward, and nothing else."""

from typing import Any

import torch
from torch import Tensor

from syncbn import backends, checks, collectives
from syncbn.activations import ACTIVATIONS
from syncbn.backends import torch_ops
from syncbn.backends.torch_ops import hide
from syncbn.groups import Group, group_size
from syncbn.statistics import Channels, Fused, Gradients, Running, Wanted, invstd_of


class SyncBatchNormFunction(torch.autograd.Function):
    """Normalize over the batch of all ranks: one all-reduce forward, one backward.

    A backward pass always communicates, whatever gradients this rank needs: ranks that differ in that stay in step.
    It keeps x, per-channel values and, where they are given, the mask and (for an activation) the residual.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        eps: float,
        activation: str,
        process_group: Group,
        record: checks.Record | None,
        running: Running | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y like x, then count (), mean (C,) and biased var (C,) of the whole group, float64.

        `running` is moved, in place, where the backend does that; the caller gives None otherwise.
        """
        backend, packed = backends.select(x), None
        if group_size(process_group) > 1:
            packed = collectives.all_reduce_(backend.pack_stats(x, mask), process_group)
        fused = Fused(residual, mask, activation)
        y, count, var, channels = backend.normalize(x, packed, weight, bias, fused, eps=eps, running=running)

        ctx.eps, ctx.activation, ctx.process_group, ctx.record = eps, activation, process_group, record
        ctx.bias_dtype = None if bias is None else bias.dtype
        kept = (None, None) if activation == "identity" else (bias, residual)  # their values do not matter there
        mean, invstd, coefficients = channels.mean, channels.invstd, channels.coefficients
        ctx.save_for_backward(x, weight, *kept, mask, count, mean, invstd, coefficients)
        ctx.mark_non_differentiable(count, mean, var)
        ctx.set_materialize_grads(False)  # zeros for these three
        return y, count, mean, var

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias and residual; weight's and bias's are sums over this rank alone."""
        saved = ctx.saved_tensors  # once: a checkpoint unpacks them a single time
        x, weight, bias, residual, mask, count, mean, invstd, coefficients = saved
        needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
        checks.announce_backward(ctx.record, ctx.process_group)
        if grad_output is None:
            grad_output = torch.zeros_like(x)
        # create_graph=True; a tracer may have gradients enabled as well, and has no use for them
        is_compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not is_compiling:
            return _differentiable_backward(ctx, saved[:7], grad_output)

        if not is_compiling and _is_batched(grad_output):
            with torch.enable_grad():
                return _differentiable_backward(ctx, saved[:7], grad_output)

        backend = backends.select(x)
        channels, fused = Channels(mean, invstd, weight, bias, coefficients), Fused(residual, mask, ctx.activation)
        wanted = Wanted(
            weight.dtype if needs_weight else None, ctx.bias_dtype if needs_bias else None, dy=needs_residual
        )
        grad_output = backend.match_layout(grad_output, x)
        if needs_x and group_size(ctx.process_group) == 1:
            grads = backend.backward(grad_output, x, channels, fused, wanted, count=count)
        else:
            reduced, grad_input = backend.backward_reduce(grad_output, x, channels, fused, wanted), None
            collectives.all_reduce_(reduced.sums, ctx.process_group)
            if needs_x:
                grad_input = backend.backward_elemt(grad_output, x, channels, fused, wanted, reduced, count=count)
            grads = Gradients(grad_input, *reduced[1:])
        return *grads[:3], grads.dy if needs_residual else None, *[None] * 6


def _is_batched(tensor: Tensor) -> bool:
    """Return whether it stands for several tensors: `is_grads_batched`, or vmap over `torch.autograd.grad`."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor) or torch._C._functorch.is_batchedtensor(tensor)


def _differentiable_backward(
    ctx: Any, saved: tuple[Tensor | None, ...], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the same gradients as a graph of differentiable operations, so that derivatives of any order exist.

    The forward pass is written once more in such operations and differentiated; two all-reduces on every rank,
    whether or not its x needs a gradient.
    """
    x, weight, bias, residual, mask, count, mean = saved
    assert x is not None
    assert count is not None
    assert mean is not None
    needs_x, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    x = x if needs_x else x.detach().requires_grad_()
    if needs_bias and bias is None:
        bias = torch.zeros_like(mean, dtype=ctx.bias_dtype, requires_grad=True)
    if needs_residual and residual is None:
        residual = torch.zeros_like(x, requires_grad=True)
    # Views: differentiation stops there, although one input may have been computed from another.
    x = x.view_as(x)
    weight, bias, residual = (t if t is None else t.view_as(t) for t in (weight, bias, residual))
    y = _differentiable_forward(
        x,
        weight,
        bias,
        residual=residual,
        mask=mask,
        count=count,
        pivot=mean,
        eps=ctx.eps,
        activation=ctx.activation,
        process_group=ctx.process_group,
    )
    wanted: dict[str, Any] = {"x": x}
    wanted |= {"weight": weight} if needs_weight else {}
    wanted |= {"bias": bias} if needs_bias else {}
    wanted |= {"residual": residual} if needs_residual else {}
    grads = dict(zip(wanted, torch.autograd.grad(y, [*wanted.values()], grad_output, create_graph=True), strict=True))
    grad_input = grads["x"] if needs_x else None
    return grad_input, grads.get("weight"), grads.get("bias"), grads.get("residual"), *[None] * 6


def _differentiable_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    residual: Tensor | None,
    mask: Tensor | None,
    count: Tensor,
    pivot: Tensor,
    eps: float,
    activation: str,
    process_group: Group,
) -> Tensor:
    """Return y; `pivot` is the mean of the group as a constant, about which nothing cancels."""

    dims = torch_ops.reduced_dims(x)
    centred = hide(x - torch_ops.per_channel(pivot, x), mask)
    sums = torch.cat([centred.sum(dims), centred.square().sum(dims)]).double()
    offset, square = (collectives.AllReduce.apply(sums, process_group) / count.clamp(min=1)).chunk(2)
    invstd = invstd_of((square - offset.square()).clamp(min=0), eps)
    z = (centred - torch_ops.per_channel(offset, x)) * torch_ops.per_channel(invstd, x)
    if weight is not None:
        z = z * torch_ops.per_channel(weight, x)
    if bias is not None:
        z = z + torch_ops.per_channel(bias, x)
    if residual is not None:
        z = z + hide(residual, mask)
    return hide(ACTIVATIONS[activation].apply(z), mask).to(x.dtype)
