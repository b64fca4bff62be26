"""The only calls that communicate in a training step. A group of one rank never does."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.groups import Group, group_size


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
