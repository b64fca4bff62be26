"""The autograd Function: the order of events in forward and backward, and nothing else."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import backends, collectives
from syncbn.backends import torch_ops
from syncbn.statistics import invstd_of, pack, unpack


class SyncBatchNormFunction(torch.autograd.Function):
    """Normalize over the batch of all ranks: one all-reduce forward, one backward.

    A backward pass always communicates, whatever gradients this rank needs: ranks that differ in that stay in step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        process_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y like x, then count (), mean (C,) and biased var (C,) of the whole group, float64."""
        backend = backends.select(x)
        packed = pack(*backend.batch_norm_stats(x))
        collectives.all_reduce_(packed, process_group)
        count, mean, var = unpack(packed)
        y = backend.batch_norm_elemt(x, mean=mean, invstd=invstd_of(var, eps), weight=weight, bias=bias)

        ctx.eps, ctx.process_group = eps, process_group
        ctx.save_for_backward(x, weight, bias, count, mean, var)
        ctx.mark_non_differentiable(count, mean, var)
        ctx.set_materialize_grads(False)
        return y, count, mean, var

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias; those of weight and bias are sums over this rank alone."""
        x, weight, bias, count, mean, var = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(x)
        if torch.is_grad_enabled():  # create_graph=True
            return _differentiable_backward(ctx, grad_output)

        backend = backends.select(x)
        invstd = invstd_of(var, ctx.eps)
        sum_dy, sum_dy_xmu = backend.batch_norm_backward_reduce(grad_output, x, mean=mean)
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_weight = (sum_dy_xmu * invstd).to(weight.dtype) if needs_weight else None
        grad_bias = sum_dy.to(bias.dtype) if needs_bias else None

        sums = collectives.all_reduce_(torch.cat([sum_dy, sum_dy_xmu]), ctx.process_group)
        sum_dy, sum_dy_xmu = sums.chunk(2)
        grad_input = None
        if needs_x:
            grad_input = backend.batch_norm_backward_elemt(
                grad_output,
                x,
                mean=mean,
                invstd=invstd,
                weight=weight,
                count=count,
                sum_dy=sum_dy,
                sum_dy_xmu=sum_dy_xmu,
            )
        return grad_input, grad_weight, grad_bias, None, None


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """Return the same gradients as a graph of differentiable operations, so that derivatives of any order exist.

    The forward pass is written once more in such operations and differentiated; two all-reduces on every rank,
    whether or not its x needs a gradient.
    """
    x, weight, bias, count, mean, _ = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    inputs = {"x": x if needs_x else x.detach().requires_grad_()}
    if needs_weight:
        inputs["weight"] = weight
    if needs_bias:
        inputs["bias"] = bias
    y = _differentiable_forward(inputs["x"], weight, bias, ctx.eps, count, mean, ctx.process_group)
    grads = dict(
        zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad_output, create_graph=True), strict=True)
    )
    return grads["x"] if needs_x else None, grads.get("weight"), grads.get("bias"), None, None


def _differentiable_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    count: Tensor,
    pivot: Tensor,
    process_group: dist.ProcessGroup | None,
) -> Tensor:
    """Return y; `pivot` is the mean of the group as a constant, about which nothing cancels."""
    dims = torch_ops.reduced_dims(x)
    centred = x - torch_ops.per_channel(pivot, x)
    sums = torch.cat([centred.sum(dims), centred.square().sum(dims)]).double()
    offset, square = (collectives.AllReduce.apply(sums, process_group) / count.clamp(min=1)).chunk(2)
    invstd = invstd_of((square - offset.square()).clamp(min=0), eps)
    y = (centred - torch_ops.per_channel(offset, x)) * torch_ops.per_channel(invstd, x)
    if weight is not None:
        y = y * torch_ops.per_channel(weight, x)
    if bias is not None:
        y = y + torch_ops.per_channel(bias, x)
    return y.to(x.dtype)
