"""The autograd Functions: the order of events in forward and backward, and nothing else."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn import backends, checks, differentiable
from syncbn.collectives import release_peers
from syncbn.convolution import Geometry, convolve, grad_of_input, grads_of_parameters
from syncbn.recomputation import is_recomputing
from syncbn.statistics import Channels, Epilogue, OutputMask, Running, match_layout
from syncbn.transforms import is_batched, is_transformed

_Saved = tuple[Tensor | None, ...]  # x, weight, bias, residual, mask, count, mean, invstd, coefficients


class SyncBatchNormFunction(torch.autograd.Function):
    """Normalize over the batch of all ranks: one all-reduce forward, one backward.

    A backward pass always communicates, whichever gradients this rank needs, so that ranks with different needs stay in
    step. Kept for backward: x, per-channel values, the mask, and the residual if an activation follows it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
        activation: str,
        peers: release_peers,
    ) -> Tensor:
        """Return y like x, and move the running statistics in place."""
        moved = running_mean, running_var, num_batches_tracked, momentum
        y, saved = _normalize(ctx, x, weight, bias, residual, mask, *moved, eps, activation, peers)
        if activation == "identity":  # backward reads neither bias nor residual
            saved = *saved[:2], None, None, *saved[4:]
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias and residual; weight's and bias's are sums over this rank alone."""
        needs_x, *needs = ctx.needs_input_grad[:4]
        with release_peers(ctx.process_group, ctx.num_features, tensors=(grad_output,)) as peers:
            checks.announce_backward(ctx.record, ctx.process_group)
            x, channels, epilogue, count = _restore(ctx, ctx.saved_tensors)
            is_compiling = torch.compiler.is_compiling()  # gradients may be enabled there without create_graph
            if not is_compiling and _is_differentiable(grad_output):
                grads = differentiable.backward(
                    (grad_output,), x, channels.weight, channels.bias, epilogue, ctx.needs_input_grad[:4],
                    count=count, mean=channels.mean, eps=ctx.eps, peers=peers,
                )  # fmt: skip
                return *grads, *[None] * 8
            if not is_compiling:
                grad_output = match_layout(grad_output, x)
            reduced = ctx.backend.backward_reduce(grad_output, x, channels, epilogue, OutputMask(*needs))
            peers.all_reduce_(reduced.sums)
        grad_input = None
        if needs_x:
            grad_input = ctx.backend.backward_elemt(grad_output, x, channels, epilogue, reduced, count=count)
        return grad_input, reduced.grad_weight, reduced.grad_bias, reduced.dy if needs[2] else None, *[None] * 8


class NormActConvFunction(torch.autograd.Function):
    """Normalize over the batch of all ranks, activate, and convolve: backward's all-reduce runs beside convolutions.

    Kept for backward: what `SyncBatchNormFunction` keeps, and the parameters of the convolutions. The activated tensor
    is computed again with the sums over this rank. The gradients of the weights, which read it, do not need the sums
    over all ranks: they are computed between the start of that all-reduce and the wait for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
        activation: str,
        peers: release_peers,
        geometries: Sequence[Geometry],
        dtype: torch.dtype,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Return the output of each convolution, and move the running statistics in place.

        Args:
            dtype: in which the convolutions compute.
            parameters: weight and bias of each convolution.
        """
        moved = running_mean, running_var, num_batches_tracked, momentum
        y, saved = _normalize(ctx, x, weight, bias, residual, mask, *moved, eps, activation, peers)
        ctx.geometries, ctx.dtype, ctx.num_saved = geometries, dtype, len(saved)
        ctx.save_for_backward(*saved, *parameters)
        ctx.set_materialize_grads(False)
        return convolve(y, geometries, parameters, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias, residual and the convolutions; each parameter's over this rank."""
        needs_norm, needs_parameters = ctx.needs_input_grad[:4], ctx.needs_input_grad[14:]
        with release_peers(ctx.process_group, ctx.num_features, tensors=grad_outputs) as peers:
            checks.announce_backward(ctx.record, ctx.process_group)
            tensors = ctx.saved_tensors
            x, channels, epilogue, count = _restore(ctx, tensors[: ctx.num_saved])
            convolutions = ctx.geometries, tensors[ctx.num_saved :], ctx.dtype
            if _is_differentiable(*grad_outputs):
                grads = differentiable.backward(
                    grad_outputs, x, channels.weight, channels.bias, epilogue, needs_norm,
                    count=count, mean=channels.mean, eps=ctx.eps, peers=peers,
                    convolutions=convolutions, needs_parameters=needs_parameters,
                )  # fmt: skip
                return *grads[:4], *[None] * 10, *grads[4:]
            dy = match_layout(grad_of_input(grad_outputs, x, *convolutions), x)
            selected = OutputMask(weight=needs_norm[1], bias=needs_norm[2], dy=needs_norm[3], y=any(needs_parameters))
            reduced = ctx.backend.backward_reduce(dy, x, channels, epilogue, selected)
            wait = peers.start_all_reduce_(reduced.sums)
        try:
            grad_parameters = grads_of_parameters(grad_outputs, reduced.y, *convolutions, needs_parameters)
            reduced = reduced._replace(y=None)
        finally:
            wait()
        grad_input = None
        if needs_norm[0]:
            grad_input = ctx.backend.backward_elemt(dy, x, channels, epilogue, reduced, count=count)
        grad_residual = reduced.dy if needs_norm[3] else None
        return grad_input, reduced.grad_weight, reduced.grad_bias, grad_residual, *[None] * 10, *grad_parameters


def _normalize(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: str,
    peers: release_peers,
) -> tuple[Tensor, _Saved]:
    """Return y and the tensors to save for `_restore`; move the running statistics in place."""
    backend = backends.select(x, mask)
    packed = peers.all_reduce_(backend.pack_stats(x, mask))
    peers.check_count(packed, x, mask)
    running = None
    # plain operations repeat each one, for selective checkpointing, and `update_running_stats_` then moves nothing
    is_repetition = backend is not backends.PLAIN and is_recomputing()
    if running_mean is not None and running_var is not None and not is_repetition:
        running = Running(running_mean, running_var, num_batches_tracked, momentum)
    epilogue = Epilogue(residual, mask, activation)
    y, count, channels = backend.normalize(
        x, packed, weight, bias, epilogue, eps=eps, ranks=peers.ranks, running=running
    )
    ctx.backend, ctx.eps, ctx.activation = backend, eps, activation
    ctx.process_group, ctx.record, ctx.num_features = peers.process_group, peers.record, x.shape[1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    return y, (x, weight, bias, residual, mask, count, channels.mean, channels.invstd, channels.coefficients)


def _restore(ctx: Any, saved: _Saved) -> tuple[Tensor, Channels, Epilogue, Tensor]:
    """Return x, the per-channel values, the epilogue and the count from what `_normalize` returned."""
    x, weight, bias, residual, mask, count, mean, invstd, coefficients = saved
    assert x is not None
    assert count is not None
    assert mean is not None
    assert invstd is not None
    if bias is None and ctx.bias_dtype is not None:
        bias = torch.zeros_like(mean, dtype=ctx.bias_dtype)
    return x, Channels(mean, invstd, weight, bias, coefficients), Epilogue(residual, mask, ctx.activation), count


def _is_differentiable(*grad_outputs: Tensor | None) -> bool:
    """Return whether backward is to be recorded, or runs under a transform."""
    known = [grad for grad in grad_outputs if grad is not None]
    return torch.is_grad_enabled() or any(is_batched(grad) for grad in known) or is_transformed(*known)


class MatchGradientLayout(torch.autograd.Function):
    """The identity, whose gradient has the strides of a meta tensor; a batched gradient stays as it is."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, layout: Tensor) -> Tensor:
        """Return y."""
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(y)  # neither a copy nor a view, so that an activation in place may follow
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, None]:
        """Return the gradient in the layout."""
        if grad_output is None or is_batched(grad_output):
            return grad_output, None
        return match_layout(grad_output, ctx.layout), None
