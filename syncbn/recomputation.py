"""Whether a forward pass is a repetition by activation checkpointing, which must not move running statistics again.

Private names of torch stand here alone; `test_checkpointing.py` fails if one of them goes.
"""

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

# autograd Functions around which a hook may run a forward pass, and which run none themselves
_NOT_CHECKPOINTS = (
    "BackwardHookFunctionBackward",
    "CompiledFunctionBackward",
    "SyncBatchNormFunctionBackward",
    "NormActConvFunctionBackward",
)


def is_recomputing() -> bool:
    """Return whether this forward pass runs inside a backward pass and repeats an earlier one.

    Inside a backward pass, checkpointing runs under hooks for saved tensors, or in the backward of a Function written
    in Python. Other forward passes come from hooks of tensors and modules, at nodes written in C++. A hook at a
    Function written in Python cannot be told from a repetition.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return True
    node = torch._C._current_autograd_node()
    return isinstance(node, BackwardCFunction) and type(node).__name__ not in _NOT_CHECKPOINTS


def may_be_checkpointed() -> bool:
    """Return whether this forward pass is a repetition, or one that checkpointing may repeat."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None or is_recomputing()


def unless_recomputing(new: Tensor, old: Tensor) -> Tensor:
    """Return `old` in a repetition and otherwise `new`; a compiled network decides whenever it runs."""
    if torch.compiler.is_dynamo_compiling():  # not in torch.export, whose graphs are to hold torch's operations alone
        return torch.where(_is_recomputing(old), old, new)
    return old if is_recomputing() else new


@torch.library.custom_op("syncbn::is_recomputing", mutates_args=())
def _is_recomputing(like: Tensor) -> Tensor:
    """Return the answer of `is_recomputing`, () bool, on the device of `like`; a CUDA graph records it as False."""
    is_recorded = like.is_cuda and torch.cuda.is_current_stream_capturing()
    return torch.full((), not is_recorded and is_recomputing(), device=like.device)


@_is_recomputing.register_fake
def _(like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool, device=like.device)
