"""The backward pass as a graph of differentiable operations, so that derivatives of any order exist.

The forward pass is computed again in such operations and differentiated. Every rank takes part in two all-reduces,
whether or not its x needs a gradient.
"""

import torch
from torch import Tensor

from syncbn.activations import ACTIVATIONS
from syncbn.collectives import release_peers
from syncbn.statistics import (
    Epilogue,
    apply_mask,
    invstd_of,
    pack_sums,
    per_channel,
    reduced_dims,
    unpack_sums,
    without_rounding,
)


def is_batched(tensor: Tensor) -> bool:
    """Return whether vmap has batched the tensor: under `is_grads_batched`, or vmap over `torch.autograd.grad`."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor) or torch._C._functorch.is_batchedtensor(tensor)


def backward(
    grad_output: Tensor,
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
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and residual, None where they are not needed.

    Args:
        grad_output: like x.
        needs_grad: of x, weight, bias and residual.
        count: () float64, of the group.
        mean: (C,) float64, of the group.
        peers: the block of this backward pass.
    """
    needs_x, _, _, needs_residual = needs_grad
    second = release_peers(peers.process_group, x.shape[1], tensors=(x,))
    with second, torch.enable_grad():
        x = x if needs_x else x.detach().requires_grad_()
        residual = epilogue.residual
        if needs_residual and residual is None:
            residual = torch.zeros_like(x, requires_grad=True)
        if needs_grad[2] and bias is not None and not bias.requires_grad:
            bias = bias.requires_grad_()
        # Views, so that differentiation stops there even if one input was computed from another.
        x = x.view_as(x)
        weight, bias, residual = (t if t is None else t.view_as(t) for t in (weight, bias, residual))
        epilogue = epilogue._replace(residual=residual)
        y = _forward(x, weight, bias, epilogue, count=count, pivot=mean, eps=eps, peers=peers, second=second)
        inputs = [x, *(t for t, needs in zip((weight, bias, residual), needs_grad[1:], strict=True) if needs)]
        # always with x: every rank has to take part in the second all-reduce
        grads = iter(torch.autograd.grad(y, inputs, grad_output, create_graph=True))  # type: ignore[arg-type]
    grad_input = next(grads)
    return grad_input if needs_x else None, *(next(grads) if needs else None for needs in needs_grad[1:])


def _forward(
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
    residual, mask, activation = epilogue
    dims = reduced_dims(x)
    centred = apply_mask(x - per_channel(pivot, x), mask)
    local = pack_sums(centred.sum(dims).double(), centred.square().sum(dims).double())
    sums = peers.differentiable_all_reduce(local, second)
    offset, square = unpack_sums(sums / count.clamp(min=1))
    invstd = invstd_of(without_rounding((square - offset.square()).clamp(min=0), pivot, peers.ranks), eps)
    z = (centred - per_channel(offset, x)) * per_channel(invstd, x)
    if weight is not None:
        z = z * per_channel(weight, x)
    if bias is not None:
        z = z + per_channel(bias, x)
    if residual is not None:
        z = z + apply_mask(residual, mask)
    return apply_mask(ACTIVATIONS[activation].apply(z), mask).to(x.dtype)
