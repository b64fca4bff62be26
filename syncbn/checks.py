"""Name a desynchronization instead of hanging: DesyncError, detect_desync, assert_replicas_equal.

Each call of a layer is announced in the key-value store of torch.distributed. Unlike in a collective, the other ranks
wait for a missing rank no longer than the time-out, and can read its last call.
"""

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from syncbn.errors import DesyncError
from syncbn.groups import Group, default_device, group_size

ENVIRONMENT_VARIABLE = "SYNCBN_DETECT_DESYNC"
POLL_S = 0.002
COLUMNS = ("layer", "pass", "channels", "dtype", "training", "needs_grad", "state")

Record = dict[str, Any]


@contextmanager
def detect_desync(timeout_s: float | None = None) -> Iterator[None]:
    """Raise DesyncError on every rank if ranks make different calls of synchronized layers in this block.

    Every rank must enter and leave the block. `SYNCBN_DETECT_DESYNC=1` in the environment does the same for a whole
    process. Each call of a layer then costs a few round trips to the store; without detection it costs nothing. Layers
    inside a compiled network are not observed.

    Args:
        timeout_s: seconds to wait for a rank; by default half the time-out of the group.

    Raises:
        DesyncError: a rank skips a layer, runs another one, runs it in evaluation, with another number of channels or
            another dtype, needs other gradients, or fails; on every rank that calls a layer or leaves the block.
    """
    global _detector
    outer, _detector = _detector, _Detector(timeout_s)
    handles = _detector.follow_modules()
    try:
        yield
        _detector.leave()
    except BaseException as error:
        _detector.fail(f"raised {type(error).__name__}: {error}".split("\n")[0])
        raise
    finally:
        for handle in handles:
            handle.remove()
        _detector = outer


def announce(x: Any, weight: Any, bias: Any, process_group: Group) -> Record | None:
    """Agree with the other ranks on the forward pass of a layer; return its record, or None without detection.

    x may be of any type, so that the table can show invalid input of one rank beside the input of the others.
    """
    if _detector is None or torch.compiler.is_compiling() or group_size(process_group) == 1:
        return None
    operands = {"input": x, "weight": weight, "bias": bias}
    is_tensor = isinstance(x, Tensor)
    record = {
        "layer": _detector.current_layer(),
        "pass": "forward",
        "channels": x.shape[1] if is_tensor and x.dim() > 1 else None,
        "dtype": str(x.dtype).removeprefix("torch.") if is_tensor else type(x).__name__,
        "training": True,
        "needs_grad": [name for name, t in operands.items() if torch.is_grad_enabled() and _needs_grad(t)],
    }
    _detector.agree(record, process_group)
    return record


def announce_failure(error: Exception) -> bool:
    """With detection, tell the other ranks that this one has failed; return whether detection is on."""
    if _detector is None:
        return False
    _detector.fail(f"raised {type(error).__name__}: {error}".split("\n")[0])
    return True


def _needs_grad(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.requires_grad


def announce_backward(record: Record | None, process_group: Group) -> None:
    """Agree with the other ranks on the backward pass of the forward pass that `announce` returned `record` for."""
    if record is not None and _detector is not None:
        _detector.agree({**record, "pass": "backward"}, process_group)


def note_evaluation(process_group: Group) -> None:
    """Record an evaluation call without waiting for peers."""
    if _detector is None or torch.compiler.is_compiling() or group_size(process_group) == 1:
        return
    _detector.note({"layer": _detector.current_layer(), "pass": "forward", "training": False}, process_group)


def assert_replicas_equal(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> None:
    """Check that every rank holds the same parameters and buffers, bit for bit; every rank must call it.

    For a sharded tensor (a DTensor), dtype, shape and placements are compared.

    Raises:
        AssertionError: parameters or buffers differ in value, shape or dtype, or are missing on some ranks; on every
            rank. The message names them and the ranks on either side.
    """
    if group_size(process_group) == 1:
        return
    own = {name: _digest(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    gathered: list[Any] = [None] * group_size(process_group)
    dist.all_gather_object(gathered, own, group=process_group)
    ranks = dist.get_process_group_ranks(dist.group.WORLD if process_group is None else process_group)
    lines = []
    for name in dict.fromkeys(name for digests in gathered for name in digests):
        sides: dict[str, list[int]] = defaultdict(list)
        for rank, digests in zip(ranks, gathered, strict=True):
            sides[digests.get(name, "missing")].append(rank)
        if len(sides) > 1:
            missing = f"; missing on ranks {sides['missing']}" if "missing" in sides else ""
            parts = " against ".join(f"ranks {side}" for value, side in sides.items() if value != "missing")
            lines.append(f"  {name}: {parts}{missing}")
    if lines:
        raise AssertionError("expected equal replicas, got differences in:\n" + "\n".join(lines))


class _Detector:
    """The calls that this rank has announced so far."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self.number = next(_numbers)
        self.names: dict[int, str] = {}
        self.stack: list[nn.Module] = []
        self.calls: dict[Any, int] = defaultdict(int)  # per group
        self.evaluated: list[str] = []  # layers, since the last call that was agreed on

    def follow_modules(self) -> list[Any]:
        """Register global hooks that track which module runs, for its qualified name; return their handles."""

        def enter(module: nn.Module, args: Any) -> None:
            if torch.compiler.is_compiling():
                return
            if not self.stack:
                self.names = {id(m): name.removeprefix("module.") for name, m in module.named_modules()}
            self.stack.append(module)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not torch.compiler.is_compiling() and self.stack:
                self.stack.pop()

        return [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]

    def current_layer(self) -> str:
        """Return the name of the running module, qualified from the outermost one."""
        if not self.stack:
            return "sync_batch_norm"
        return self.names.get(id(self.stack[-1])) or type(self.stack[-1]).__name__

    def agree(self, record: Record, process_group: Group) -> None:
        """Announce the call of this rank, wait for those of its peers, and raise DesyncError if they differ."""
        group, store = self._group_and_store(process_group)
        ranks, number = dist.get_process_group_ranks(group), self.calls[group]
        self.calls[group] += 1
        own = dist.get_rank()
        state = f"after evaluating {', '.join(self.evaluated)}" if self.evaluated else ""
        store.set(f"last/{own}", json.dumps({**record, "state": state}))
        store.set(f"{number}/{own}", json.dumps({**record, "state": state}))
        self.evaluated.clear()
        if number > 1:  # every rank has read it, since every rank has announced the next call
            store.delete_key(f"{number - 2}/{own}")
        found, failed = self._wait_for_peers(store, number, ranks, time.monotonic() + self._timeout_s(group))
        if not failed and len(found) == len(ranks) and all(_same_call(record, other) for other in found.values()):
            return
        store.set(f"failed/{own}", "raised DesyncError")
        for rank in ranks:
            if rank not in found:
                last = json.loads(store.get(f"last/{rank}")) if store.check([f"last/{rank}"]) else {}
                found[rank] = {**last, "state": failed.get(rank) or "not here, its last call is shown"}
        raise DesyncError(_describe(number, found))

    def note(self, record: Record, process_group: Group) -> None:
        """Announce an evaluation call, which needs no agreement."""
        self.evaluated.append(record["layer"])
        self._group_and_store(process_group)[1].set(f"last/{dist.get_rank()}", json.dumps(record))

    def leave(self) -> None:
        """Agree with the other ranks that the block ends here."""
        if dist.is_available() and dist.is_initialized():
            for group in dict.fromkeys((*self.calls, dist.group.WORLD)):
                if group_size(group) > 1:
                    self.agree({"layer": "(end of detect_desync)"}, group)

    def fail(self, reason: str) -> None:
        """Tell the other ranks that this one has failed, so that they do not wait for it."""
        if dist.is_available() and dist.is_initialized():
            for group in dict.fromkeys((*self.calls, dist.group.WORLD)):
                if group_size(group) > 1:
                    self._group_and_store(group)[1].set(f"failed/{dist.get_rank()}", reason)

    def _wait_for_peers(
        self, store: Any, number: int, ranks: list[int], deadline: float
    ) -> tuple[dict[int, Record], dict[int, str]]:
        """Return the records of this call by rank, and the reasons of failed ranks, which will not announce it."""
        found: dict[int, Record] = {}
        failed: dict[int, str] = {}
        while True:
            for rank in ranks:
                if rank not in found and store.check([f"{number}/{rank}"]):
                    found[rank] = json.loads(store.get(f"{number}/{rank}"))
                if store.check([f"failed/{rank}"]):  # also a rank that announced this call and gave up waiting
                    failed[rank] = store.get(f"failed/{rank}").decode()
            if len({*found, *failed}) == len(ranks) or time.monotonic() > deadline:
                return found, failed
            time.sleep(POLL_S)

    def _group_and_store(self, process_group: Any) -> tuple[Any, Any]:
        group: Any = dist.group.WORLD if process_group is None else process_group
        prefix = f"syncbn/{self.number}/{group.group_name}"
        return group, dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())

    def _timeout_s(self, group: Any) -> float:
        if self.timeout_s is not None:
            return self.timeout_s
        return group._get_backend(default_device(group)).options._timeout.total_seconds() / 2


def _same_call(record: Record, other: Record) -> bool:
    return {**record, "state": ""} == {**other, "state": ""}


def _describe(number: int, found: dict[int, Record]) -> str:
    """Return the error message: what must hold, and a table of each rank's call."""
    rows: list[tuple[str, ...]] = [("rank", *COLUMNS)]
    for rank, record in sorted(found.items()):
        values = [record.get(column, "") for column in COLUMNS]
        rows.append((str(rank), *(" ".join(v) if isinstance(v, list) else str(v) for v in values)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return (
        f"expected every rank of the group to make the same call of a synchronized layer, got at call {number + 1}:\n"
        + "\n".join(lines)
        + "\nmake every rank run the same layers in the same order and mode, one without samples with an empty batch"
    )


def _digest(tensor: Any) -> str:
    """Return a digest of the tensor, or why it cannot be read: the other ranks wait for an answer."""
    try:
        if hasattr(tensor, "placements"):
            if not all(placement.is_replicate() for placement in tensor.placements):
                return f"{tensor.dtype} {tuple(tensor.shape)} {tensor.placements}"
            tensor = tensor.to_local()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        plain = tensor.detach().resolve_conj().resolve_neg().to("cpu", copy=True)  # FSDP resizes what it shards
        content = plain.contiguous().reshape(-1).view(torch.uint8)
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.blake2b(content.numpy().tobytes()).hexdigest()}"
    except Exception as error:
        return f"cannot be read: {error}"


_numbers = count()  # numbers detectors, which all ranks make in the same order: none reads the keys of another
_detector: _Detector | None = None
if os.environ.get(ENVIRONMENT_VARIABLE, "0") not in ("", "0"):
    _detector = _Detector(timeout_s=None)
    _detector.follow_modules()
