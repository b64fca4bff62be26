"""run_ranks(world_size, fn, *args): run fn in fresh gloo processes, one per rank, and return every rank's result."""

import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT_S = 20  # a rank that waits longer for its peers fails instead of hanging
GRACE_S = 3  # time for the other ranks to end by themselves after one has failed

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(  # the modules that ranks use, imported once
    ["numpy", "pytest", "torch._inductor.config", "syncbn", "train.run"]
)


class RankError(AssertionError):
    """A rank failed; the message holds the traceback of the one that failed first."""


def run_ranks(
    world_size: int, fn, *args, timeout_s: float = 120, collective_timeout_s: float = COLLECTIVE_TIMEOUT_S
) -> list[Any]:
    """Return `[fn(*args) on rank 0, ..., on rank world_size - 1]`.

    Args:
        fn: a module-level function; its rank is `torch.distributed.get_rank()`.
        timeout_s: seconds after which ranks that still run are killed.
        collective_timeout_s: seconds that a collective waits for a rank, which may be compiling.

    Raises:
        RankError: a rank raised, died, or was still running after `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = pickle.dumps((fn, args))
        ranks = []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_run_rank,
                args=(rank, world_size, f"{folder}/store", collective_timeout_s, task, sender),
                daemon=True,
            )
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            return _collect(ranks, time.monotonic() + timeout_s)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _run_rank(
    rank: int, world_size: int, store: str, collective_timeout_s: float, task: bytes, sender: Connection
) -> None:
    gc.freeze()  # a full collection would copy and search all imports of the fork server
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=collective_timeout_s),
        )
        fn, args = pickle.loads(task)
        answer = ("result", fn(*args))
        dist.barrier()  # no rank exits while another still communicates with it
        dist.destroy_process_group()
        message = pickle.dumps(answer)
    except BaseException:
        message = pickle.dumps(("error", traceback.format_exc()))
    sender.send_bytes(message)


def _collect(ranks: list, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    first_error = None
    while len(results) < len(ranks):
        waiting = {receiver: rank for rank, (_, receiver) in enumerate(ranks) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for receiver in ready:
            rank = waiting[receiver]
            try:
                kind, value = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ranks[rank][0].join()
                kind, value = "error", f"exit code {ranks[rank][0].exitcode} without a message"
            results[rank] = value
            if kind == "error" and first_error is None:
                first_error = f"rank {rank} of {len(ranks)} failed first:\n{value}"
                deadline = min(deadline, time.monotonic() + GRACE_S)
    if first_error is not None:
        raise RankError(first_error)
    if len(results) < len(ranks):
        missing = sorted(set(range(len(ranks))) - set(results))
        raise RankError(f"ranks {missing} of {len(ranks)} had not ended in time")
    return [results[rank] for rank in range(len(ranks))]
