"""Process groups: which ranks share statistics, how to make such groups, how an unpickled module recovers its group."""

import os
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

LOCAL: Literal["local"] = "local"  # instead of a group: this rank alone
Group = dist.ProcessGroup | None | Literal["local"]  # None: all ranks


class GroupReference(NamedTuple):
    """The name and ranks of a process group, kept by a pickled module: a process group cannot be pickled."""

    name: str
    ranks: tuple[int, ...]


def new_sync_groups(size: int | Literal["node"]) -> Any:
    """Split all ranks into groups of `size` consecutive ranks and return the group of this rank.

    Every rank must call it, with the same size. torchrun numbers the ranks of a node consecutively.

    Args:
        size: ranks per group, a divisor of the world size; "node" for the ranks that torchrun started on this host.

    Returns:
        The torch.distributed.ProcessGroup that this rank is a member of.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        ValueError: the size does not divide the world size or ranks differ in it, on every rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "expected an initialized process group, got none: call torch.distributed.init_process_group first"
        )
    world_size = dist.get_world_size()
    wanted = str(os.environ.get("LOCAL_WORLD_SIZE", world_size) if size == "node" else size)
    sizes: list[Any] = [None] * world_size
    dist.all_gather_object(sizes, wanted)
    if len(set(sizes)) > 1:
        raise ValueError(
            f"expected the same group size from every rank, got {', '.join(sizes)} from ranks 0 to {world_size - 1}"
        )
    if not wanted.isdecimal() or int(wanted) < 1 or world_size % int(wanted):
        divisors = [divisor for divisor in range(1, world_size + 1) if world_size % divisor == 0]
        raise ValueError(
            f"expected a group size that divides the world size {world_size}, got {wanted}: use {divisors}"
        )
    starts = range(0, world_size, int(wanted))
    groups = [dist.new_group(range(start, start + int(wanted))) for start in starts]
    return groups[dist.get_rank() // int(wanted)]


def checked(process_group: Any) -> Any:
    """Return the process group, that of a DeviceMesh, or None.

    Raises:
        TypeError: given neither of them; on this rank alone.
        ValueError: the DeviceMesh has several dimensions; on this rank alone.
    """
    if process_group is None or not dist.is_available():
        return process_group
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"expected a DeviceMesh with one dimension, got dimensions {process_group.mesh_dim_names or ''} of "
                f"sizes {tuple(process_group.shape)}: pass the one over which to synchronize, mesh['name']"
            )
        if process_group.get_coordinate() is None:
            return dist.GroupMember.NON_GROUP_MEMBER  # as `new_group` gives a rank that is not in it
        return process_group.get_group()
    if not isinstance(process_group, dist.ProcessGroup) and process_group != dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            f"expected a process group, got {type(process_group).__name__}: make one with "
            "torch.distributed.new_group(ranks), called by every rank"
        )
    return process_group


def group_size(process_group: Group) -> int:
    """Return the number of ranks that share statistics; 1 where torch.distributed is not initialized.

    Raises:
        ValueError: this rank is not a member of `process_group`; on this rank alone, its members are not affected.
    """
    if isinstance(process_group, str) or not dist.is_available() or not dist.is_initialized():
        return 1
    if isinstance(process_group, GroupReference):
        raise ValueError(
            f"expected a process group of ranks {list(process_group.ranks)}, which this module had when it was "
            "pickled, got none like it here: make one and give it to convert_sync_batchnorm(module, process_group)"
        )
    size = dist.get_world_size(process_group)
    if size < 1:
        raise ValueError(
            "expected a process group that this rank belongs to, got one without it: "
            "give every rank the group it is a member of"
        )
    return size


def default_device(process_group: Any) -> torch.device:
    """Return a device whose tensors the backend of the group can send."""
    return torch.device("cuda") if dist.get_backend(process_group) == "nccl" else torch.device("cpu")


def reference_to(process_group: Any) -> Any:
    """Return a `GroupReference` to a process group, and anything else as it is."""
    if dist.is_available() and isinstance(process_group, dist.ProcessGroup):
        return GroupReference(process_group.group_name, tuple(dist.get_process_group_ranks(process_group)))
    return process_group


def resolve(reference: Any) -> Any:
    """Return the process group that a `GroupReference` names, or the reference where this process has none like it.

    The group must have the same ranks. Of several, the one of the same name is taken.
    """
    if not isinstance(reference, GroupReference) or not dist.is_initialized():
        return reference
    groups = [
        group
        for group in dist.distributed_c10d._world.pg_map
        if tuple(dist.get_process_group_ranks(group)) == reference.ranks
    ]
    return next((g for g in groups if g.group_name == reference.name), groups[0] if groups else reference)
