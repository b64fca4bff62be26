"""The only calls that communicate in a training step. A group of one rank never does.

A rank that raises before an all-reduce would leave the others waiting in it. Inside `release_peers` such a rank first
takes part with NaN, and the others raise too.
"""

import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn

from syncbn import checks, transforms
from syncbn.errors import DesyncError, PeerError, TooFewValuesError
from syncbn.groups import Group, default_device, group_size

ErrorT = TypeVar("ErrorT", bound=Exception)

MAX_GATHERED_RANKS = 8

_ANNOUNCED = "_syncbn_announced"  # attribute of an error that the other ranks know of


def all_reduce_(values: Tensor, process_group: Group) -> Tensor:
    """Sum `values` over the ranks of the group, in place, and return it."""
    if group_size(process_group) > 1:
        _start_all_reduce_(values, process_group, async_op=False)()
    return values


def _start_all_reduce_(values: Tensor, process_group: Any, *, async_op: bool) -> Callable[[], object]:
    """Start to sum `values` over the ranks of a group of several; return the function that waits and completes them."""
    if not _is_gathered(values, process_group):
        work = dist.all_reduce(values, group=process_group, async_op=async_op)
        return _nothing if work is None else work.wait
    parts = list(values.new_empty(group_size(process_group), *values.shape).unbind())
    work = dist.all_gather(parts, values, group=process_group, async_op=async_op)

    def complete() -> None:
        if work is not None:
            work.wait()
        total = parts[0]
        for part in parts[1:]:
            total += part
        values.copy_(total)

    return complete


def _nothing() -> None:
    pass


def _is_gathered(values: Tensor, process_group: Any) -> bool:
    """Return whether to gather the vectors of all ranks and add them up here, in the order of the ranks.

    gloo's all-reduce of a small vector takes two messages one after the other, its all-gather one.
    """
    if not values.is_cpu:
        return False
    return group_size(process_group) <= MAX_GATHERED_RANKS and "cpu:gloo" in dist.get_backend_config(process_group)


class release_peers:
    """A block that ends with an all-reduce: an exception before it raises on every rank of the group.

    On CPU the other ranks raise PeerError at once. On an accelerator they go on with NaN, because reading a value
    would make the host wait for the device.

        with release_peers(process_group, num_features, tensors=(x, weight)) as peers:
            peers.announce(x, weight, bias)
            vector = ...  # an exception here raises on every rank
            peers.all_reduce_(vector)
        ...  # an exception here raises on this rank alone

    A nested block of the same `layer` joins the outer one: the forward of a subclass opens one before ours does.

    Args:
        process_group: the ranks that enter the block.
        num_features: C; the vector has 2C + 1 numbers. None if unknown: peers are not released then.
        tensors: where the vector will be, in the order in which to try their devices.
        layer: the calling module; the devices of its parameters and buffers are tried as well.

    Raises:
        ValueError: this rank is not a member of `process_group`; on this rank alone. Also raised in place of any other
            Exception that leaves the block, in a group of several ranks.
        DesyncError: with `detect_desync`, the ranks make different calls; on every rank.
    """

    def __init__(
        self,
        process_group: Group,
        num_features: int | None,
        *,
        tensors: tuple[Any, ...] = (),
        layer: nn.Module | None = None,
    ) -> None:
        self.process_group = process_group
        self.ranks = group_size(process_group)
        self.num_features = num_features
        self.tensors = tensors
        self.layer = layer
        self.are_waiting = self.ranks > 1
        self.outer: release_peers | None = None
        self.is_open = False
        self.record: checks.Record | None = None
        self.check_sum: Callable[[Tensor], None] | None = None  # called with the sum over ranks, outside of transforms

    def __enter__(self) -> "release_peers":
        if self.ranks == 1 or torch.compiler.is_compiling():
            return self
        blocks = _blocks.open
        same = (block for block in blocks if self.layer is not None and block.layer is self.layer and block.are_waiting)
        self.outer = next(same, None)
        blocks.append(self)
        self.is_open = True
        return self if self.outer is None else self.outer

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if self.is_open:
            _blocks.open.remove(self)
            self.is_open = False
        if not isinstance(error, Exception) or not self.are_waiting or self.outer is not None:
            return
        # every rank has a DesyncError, and an error that another block has announced or received
        if isinstance(error, DesyncError) or getattr(error, _ANNOUNCED, False):
            return
        raised = error
        if not isinstance(error, ValueError):
            raised = ValueError(
                f"expected every rank of the group to reach the all-reduce of {self.name}, got on this one "
                f"{type(error).__name__}: {error}"
            )
        _announced(raised)
        if not (self.record is None and checks.announce_failure(error)):
            self._refuse(raised)
        if raised is not error:
            raise raised from error

    @property
    def name(self) -> str:
        """What the caller is named in messages."""
        return "sync_batch_norm" if self.layer is None else type(self.layer).__name__

    def announce(self, x: Any, weight: Any, bias: Any) -> None:
        """With `detect_desync`, agree with the other ranks on this forward pass."""
        if self.record is None:
            self.record = checks.announce(x, weight, bias, self.process_group)

    def all_reduce_(self, values: Tensor) -> Tensor:
        """Sum `values`, (2C + 1,) float64, over the ranks of the group, in place, and return it.

        Raises:
            PeerError: another rank has raised, and the values are on CPU.
        """
        self.are_waiting = False
        if self.ranks > 1:
            all_reduce_(values, self.process_group)
            self.check_for_refusal(values)
        return values

    def start_all_reduce_(self, values: Tensor) -> Callable[[], None]:
        """Start to sum `values`, (2C + 1,) float64, in place; return the function that waits for the sum.

        It makes the host wait with gloo, and the current stream with NCCL. Whatever happens in between, it must be
        called; it raises PeerError if another rank has raised, and the values are on CPU.
        """
        self.are_waiting = False
        if self.ranks == 1:
            return _nothing
        complete = _start_all_reduce_(values, self.process_group, async_op=True)

        def wait() -> None:
            complete()
            self.check_for_refusal(values)

        return wait

    def differentiable_all_reduce(self, values: Tensor, second: "release_peers | None" = None) -> Tensor:
        """Return the sum as a differentiable function of `values`, which are not changed.

        Args:
            second: the block that ends with the all-reduce of the first derivative.

        Raises:
            ValueError: as `all_reduce_`; and in a group of several ranks under vmap over `values`, on every rank.
        """
        total: Tensor = _AllReduceOfStatistics.apply(values, self.process_group, self, second)
        return total

    def check_for_refusal(self, values: Tensor) -> None:
        """Raise PeerError if another rank has raised, and the values, (*B, 2C + 1), are on CPU."""
        if self.ranks > 1 and is_readable(values) and numpy.isnan(values.numpy()[..., 0]).any():
            raise _refusal()

    def check_count(self, packed: Tensor, x: Tensor, mask: Tensor | None) -> None:
        """Raise TooFewValuesError, on every rank, if `packed` counts one value per channel over all ranks.

        On an accelerator, reading the count makes the host wait. A rank with two values or more knows that it is not 1,
        so only the other ranks read it.
        """
        is_single = x.numel() // x.shape[1] == 1
        if self.ranks > 1 or mask is not None:
            may_be_single = x.numel() <= x.shape[1] and mask is None
            if not is_readable(packed) and not (may_be_single and _may_wait_for(packed)):
                return
            is_single = (packed.detach().cpu().numpy()[..., 0] == 1).any()  # .item() fails under tracing
        if is_single:
            over = f" over all {self.ranks} ranks, here" if self.ranks > 1 else ""
            raise TooFewValuesError(
                f"expected more than 1 value per channel when training, got 1{over} in input of shape "
                f"{tuple(x.shape)}: use a larger batch, or evaluate with running statistics"
            )

    def _refuse(self, error: Exception) -> None:
        """Take part in the all-reduce with NaN; if that fails, say so in a note to the error."""
        self.are_waiting = False
        reasons = []
        try:
            devices = self._devices() if self.num_features is not None else []
        except Exception:  # a tensor that fails when asked for its device
            devices = [default_device(self.process_group)]
        for device in devices:
            try:
                size = 2 * self.num_features + 1  # type: ignore[operator]
                vector = torch.full((size,), torch.nan, dtype=torch.float64, device=device)
                _AllReduce.apply(vector, self.process_group, None, None)
                return
            except Exception as failure:
                reasons.append(f"on {device}: {failure}")
        reason = "; ".join(reasons) or "the number of channels is not known"
        error.add_note(f"The other ranks of the group were not told and may wait for this one ({reason}).")

    def _devices(self) -> list[torch.device]:
        """Return the devices to try: accelerators first, because a tensor on CPU may be one that was not moved."""
        tensors: list[Any] = list(self.tensors)
        if self.layer is not None:
            tensors += [*self.layer.parameters(), *self.layer.buffers()]
        devices = [tensor.device for tensor in tensors if isinstance(tensor, Tensor) and not tensor.is_meta]
        devices = list(dict.fromkeys([*devices, default_device(self.process_group)]))
        return sorted(devices, key=lambda device: device.type == "cpu")


def is_readable(values: Tensor) -> bool:
    """Return whether the host can read the values without waiting for a device, and they are not traced."""
    is_plain = type(values) is Tensor and not torch.compiler.is_compiling()
    return is_plain and values.is_cpu and not transforms.is_wrapped(values)


def _may_wait_for(values: Tensor) -> bool:
    return values.is_cuda and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()


class _AllReduce(torch.autograd.Function):
    """Sum over ranks of (2C + 1,) float64 vectors. Its derivative, in either mode, is the sum of the derivatives.

    Under vmap, derivatives travel together, (B, 2C + 1), if all ranks have equally many; if not, every rank raises.
    """

    @staticmethod
    def forward(
        values: Tensor, process_group: Group, block: release_peers | None, second: release_peers | None
    ) -> Tensor:
        """Return the sum over the ranks of the group.

        Args:
            block: ends with this all-reduce.
            second: ends with the all-reduce of the first derivative.
        """
        return _sum_over_ranks(values, process_group, block)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the derivative needs: no tensor."""
        _, ctx.process_group, _, ctx.second = inputs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the sum over the ranks of `grad_output`."""
        second, ctx.second = ctx.second, None
        if not transforms.is_batched_gradient(grad_output):
            return _AllReduce.apply(grad_output, ctx.process_group, second, None), None, None, None
        # out of its batch outside of the Function, whose result would otherwise have no history under create_graph
        values, level = transforms.unbatched_gradient(grad_output)
        total = _AllReduce.apply(values, ctx.process_group, second, None)
        return transforms.batched_gradient(total, level), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        """Return the sum over the ranks of `tangent`."""
        total: Tensor = _AllReduce.apply(tangent, ctx.process_group, None, None)
        return total

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        values: Tensor,
        process_group: Group,
        block: release_peers | None,
        second: release_peers | None,
    ) -> tuple[Tensor, int]:
        """Sum all vectors at once."""
        total: Tensor = _AllReduce.apply(values.movedim(in_dims[0] or 0, 0), process_group, block, second)
        return total, 0


class _AllReduceOfStatistics(_AllReduce):
    """The same for the statistics of a batch, of which a group of several ranks has one."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        values: Tensor,
        process_group: Group,
        block: release_peers | None,
        second: release_peers | None,
    ) -> tuple[Tensor, int]:
        """Sum all vectors at once in a group of one rank.

        Raises:
            ValueError: in a group of several ranks; `release_peers` makes every rank raise.
        """
        if block is not None and block.ranks > 1:
            raise ValueError(
                f"expected one batch in each call of {block.name} on {block.ranks} ranks, got torch.func.vmap over its "
                "input: loop instead, or give the layer a group of one rank (syncbn.revert_sync_batchnorm)"
            )
        return _AllReduce.vmap(info, in_dims, values, process_group, block, second)


def _sum_over_ranks(values: Tensor, process_group: Group, block: release_peers | None) -> Tensor:
    """Return the sum over ranks of (*B, 2C + 1) vectors, in which B are the sizes of vmaps.

    Raises:
        ValueError: the ranks have different B; on every rank.
        PeerError: another rank has raised, and the values are on CPU.
    """
    if block is not None:
        block.are_waiting = False
    values = values.clone(memory_format=torch.contiguous_format)
    if group_size(process_group) > 1:
        if values.dim() > 1:
            _check_batch_sizes(values[..., 0].numel(), values.new_zeros(values.shape[-1]), process_group)
        all_reduce_(values, process_group)
    if block is not None:
        block.check_for_refusal(values)
        if block.check_sum is not None:
            block.check_sum(values)
    return values


def _check_batch_sizes(size: int, vector: Tensor, process_group: Group) -> None:
    """Raise ValueError on every rank unless all have the same `size`; the vector is like those in other collectives."""
    vector[1], vector[2] = size, size * size
    refusal, total, squares = all_reduce_(vector, process_group)[:3].tolist()
    if math.isnan(refusal):
        raise _refusal()
    ranks = group_size(process_group)
    if total * total != ranks * squares:  # they are equal for equal sizes alone
        raise _announced(
            ValueError(
                f"expected vmap over equally many derivatives on all {ranks} ranks of the group, got {size} here and "
                f"{total:.0f} in all: each is a sum over the ranks, so give every rank the same number"
            )
        )


def _refusal() -> PeerError:
    return _announced(
        PeerError(
            "expected valid input on every rank, got a refusal from another rank of the group: its error says why"
        )
    )


def _announced(error: ErrorT) -> ErrorT:
    """Return the error, marked as one that every rank of the group raises or knows of."""
    setattr(error, _ANNOUNCED, True)
    return error


class _Blocks(threading.local):
    """The open blocks of this thread, the innermost last."""

    def __init__(self) -> None:
        self.open: list[release_peers] = []


_blocks = _Blocks()
