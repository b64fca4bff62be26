"""The autograd Function: the order of events in forward and backward, and nothing else."""

from typing import Any

import torch
from torch import Tensor

from syncbn import backends, checks, differentiable
from syncbn.collectives import release_peers
from syncbn.recomputation import is_recomputing
from syncbn.statistics import Channels, Epilogue, OutputMask, Running, match_layout
from syncbn.transforms import is_batched, is_transformed


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
        ctx.process_group, ctx.record = peers.process_group, peers.record
        ctx.bias_dtype = None if bias is None else bias.dtype
        kept = (None, None) if activation == "identity" else (bias, residual)  # backward does not read their values
        ctx.save_for_backward(x, weight, *kept, mask, count, channels.mean, channels.invstd, channels.coefficients)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight, bias and residual; weight's and bias's are sums over this rank alone."""
        needs_x, *needs = ctx.needs_input_grad[:4]
        with release_peers(ctx.process_group, grad_output.shape[1], tensors=(grad_output,)) as peers:
            checks.announce_backward(ctx.record, ctx.process_group)
            x, weight, bias, residual, mask, count, mean, invstd, coefficients = ctx.saved_tensors
            epilogue = Epilogue(residual, mask, ctx.activation)
            if bias is None and ctx.bias_dtype is not None:
                bias = torch.zeros_like(mean, dtype=ctx.bias_dtype)
            is_compiling = torch.compiler.is_compiling()  # gradients may be enabled there without create_graph
            if not is_compiling and (torch.is_grad_enabled() or is_batched(grad_output) or is_transformed(grad_output)):
                grads = differentiable.backward(
                    grad_output, x, weight, bias, epilogue, ctx.needs_input_grad[:4],
                    count=count, mean=mean, eps=ctx.eps, peers=peers,
                )  # fmt: skip
                return *grads, *[None] * 8
            channels = Channels(mean, invstd, weight, bias, coefficients)
            if not is_compiling:
                grad_output = match_layout(grad_output, x)
            reduced = ctx.backend.backward_reduce(grad_output, x, channels, epilogue, OutputMask(*needs))
            peers.all_reduce_(reduced.sums)
        grad_input = None
        if needs_x:
            grad_input = ctx.backend.backward_elemt(grad_output, x, channels, epilogue, reduced, count=count)
        return grad_input, reduced.grad_weight, reduced.grad_bias, reduced.dy if needs[2] else None, *[None] * 8


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
