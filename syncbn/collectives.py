"""The only calls that communicate. A group of one rank never does."""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

LOCAL: Literal["local"] = "local"  # in place of a group: this rank alone
Group = dist.ProcessGroup | None | Literal["local"]  # None: all ranks


def check_process_group(process_group: Any) -> None:
    """Raise TypeError, on this rank alone, unless given None or what `torch.distributed.new_group` returns."""
    if process_group is None or not dist.is_available():
        return
    if not isinstance(process_group, dist.ProcessGroup) and process_group != dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            f"expected a process group, got {type(process_group).__name__}: make one with "
            "torch.distributed.new_group(ranks), called by every rank"
        )


def group_size(process_group: Group) -> int:
    """Return the number of ranks that share statistics; 1 where torch.distributed is not initialized.

    Raises:
        ValueError: this rank is not a member of `process_group`; on this rank alone, its members are not affected.
    """
    if isinstance(process_group, str) or not dist.is_available() or not dist.is_initialized():
        return 1
    size = dist.get_world_size(process_group)
    if size < 1:
        raise ValueError(
            "expected a process group that this rank belongs to, got one without it: "
            "give every rank the group it is a member of"
        )
    return size


def all_reduce_(values: Tensor, process_group: Group) -> Tensor:
    """Sum `values` over the ranks of the group, in place, and return it."""
    if not isinstance(process_group, str) and group_size(process_group) > 1:
        dist.all_reduce(values, group=process_group)
    return values


def announce_refusal(num_channels: int, device: torch.device, process_group: Group) -> None:
    """Take part in the forward all-reduce with NaN in place of statistics, so that no peer waits for this rank."""
    all_reduce_(torch.full((2 * num_channels + 1,), torch.nan, dtype=torch.float64, device=device), process_group)


class AllReduce(torch.autograd.Function):
    """Differentiable sum over ranks; its backward is the sum over ranks of the gradients, itself differentiable."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, process_group: Group) -> Tensor:
        """Return the sum over the ranks of the group."""
        ctx.process_group = process_group
        return all_reduce_(values.clone(), process_group)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """Return the sum over the ranks of `grad_output`."""
        return AllReduce.apply(grad_output, ctx.process_group), None
