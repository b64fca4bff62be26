"""Which transformation of torch.func, or of autograd, a tensor is under. Private names of torch stand here alone.

If one of them goes, `test_func.py` fails. What they answer can also be found out by trying: a `torch.autograd.Function`
without `setup_context` fails under torch.func.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed(*tensors: Tensor | None) -> bool:
    """Return whether a transform of torch.func is active, or one of the tensors has a tangent (forward-mode AD)."""
    if torch.compiler.is_compiling():  # torch.func inside torch.compile is not supported
        return False
    if is_transform_active():
        return True
    if forward_ad._current_level < 0:  # no tangent exists
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def is_transform_active() -> bool:
    """Return whether this code runs inside a transform of torch.func."""
    return torch._C._are_functorch_transforms_active()


def is_batched(tensor: Tensor) -> bool:
    """Return whether vmap has batched the tensor: under `is_grads_batched`, or vmap over `torch.autograd.grad`."""
    return torch._C._functorch.is_batchedtensor(tensor) or is_batched_gradient(tensor)


def is_wrapped(tensor: Tensor) -> bool:
    """Return whether the tensor is a wrapper of torch.func, whose values the host cannot read."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_batched_gradient(tensor: Tensor) -> bool:
    """Return whether `is_grads_batched` has batched the tensor, by a vmap of its own that asks no Function."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def unbatched_gradient(tensor: Tensor) -> tuple[Tensor, int]:
    """Return what `is_grads_batched` has batched, (B, ...), and the level for `batched_gradient`."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return torch._remove_batch_dim(tensor, level, 1, 0), level


def batched_gradient(tensor: Tensor, level: int) -> Tensor:
    """Return the inverse of `unbatched_gradient`."""
    return torch._add_batch_dim(tensor, 0, level)
