"""The launcher's environment variables, and what all ranks agree on before there is a process group."""

import os
import sys
import time
import uuid
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple, NoReturn

from omegaconf import OmegaConf

STORE_TIMEOUT = timedelta(seconds=60)
RANK_ZERO_SPEAKS_FIRST_S = 5  # head start of rank 0 in reporting an error that occurs on all ranks


class Refusal(RuntimeError):
    """The request cannot be carried out; the message says why and what to do, and no traceback is shown."""


def rank() -> int:
    """Return the global rank of this process, 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of ranks, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Return the number of ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def num_nodes() -> int:
    """Return the number of nodes: torchrun starts the same number of ranks on every node."""
    return world_size() // local_world_size()


def accelerator() -> str:
    """Return "gpu" if this node has a GPU for each of its ranks, otherwise "cpu"."""
    import torch

    return "gpu" if torch.cuda.device_count() >= local_world_size() else "cpu"


def run_stamp() -> str:
    """Return the time the run started: the same string on every rank and after an elastic restart.

    Ranks start in different seconds and there is no process group yet, so the first rank to arrive writes its time to
    the store that torchrun's agent keeps for the whole job.

    Raises:
        Refusal: there are several ranks and no agent store; on every rank.
    """
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]
    if world_size() == 1:
        return now
    if not has_agent_store():
        raise Refusal(
            "the ranks must agree on one run directory, and this launcher provides no shared store: "
            "start with torchrun, or name the directory with run_name=..."
        )
    return agent_store().compare_set("train/run_stamp", "", now).decode()


def agreed(key: str, value: str) -> str:
    """Return rank 0's value on every rank, before there is a process group.

    Without torchrun's store every rank returns its own value. Each life of the ranks has separate values.
    """
    if world_size() == 1 or not has_agent_store():
        return value
    store, key = agent_store(), f"train/{life().name}/{key}"
    if rank() == 0:
        store.set(key, value)
    return store.get(key).decode()


class Life(NamedTuple):
    """The time between two restarts of all ranks by torchrun."""

    name: str  # the same on every rank, different in every life
    is_restart: bool


@cache
def life() -> Life:
    """Return the life that this process belongs to; every rank calls it.

    `TORCHELASTIC_RESTART_COUNT` does not identify it: the count does not grow on a node whose own ranks did not fail.
    """
    if world_size() == 1 or not has_agent_store():
        count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return Life(count, count != "0")
    return meet(agent_store(), rank(), world_size())


def meet(store: Any, rank: int, world_size: int) -> Life:
    """Return rank 0's new life on every rank, through a store that still has keys from earlier lives.

    Every other rank writes a greeting with a unique name. Rank 0 answers each greeting until every rank has confirmed
    an answer. An answer to a greeting from an earlier life is never read.

    Raises:
        Refusal: not all ranks arrived within a minute; on those that did.
    """
    own = uuid.uuid4().hex
    deadline = time.monotonic() + STORE_TIMEOUT.total_seconds()
    if rank > 0:
        store.set(f"train/greeting/{rank}", own)
        _wait(store, f"train/answer/{own}", deadline)
        name, is_restart = store.get(f"train/answer/{own}").decode().split()
        store.set(f"train/confirmed/{name}/{rank}", "")
        return Life(name, is_restart == "True")
    is_restart = store.check(["train/has_lived"])
    store.set("train/has_lived", "")
    for peer in range(1, world_size):
        while not store.check([f"train/confirmed/{own}/{peer}"]):
            if store.check([f"train/greeting/{peer}"]):
                greeting = store.get(f"train/greeting/{peer}").decode()
                store.set(f"train/answer/{greeting}", f"{own} {is_restart}")
            _pause(deadline)
    return Life(own, is_restart)


def _wait(store: Any, key: str, deadline: float) -> None:
    while not store.check([key]):
        _pause(deadline)


def _pause(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise Refusal("the ranks did not meet within a minute: check why the others ended, and restart all ranks")
    time.sleep(0.02)


def has_agent_store() -> bool:
    """Return whether torchrun keeps a store for the whole job, including restarts."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agent_store() -> Any:
    """Return a new connection to torchrun's store."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=STORE_TIMEOUT)


def register_resolvers() -> None:
    """Register `${run_stamp:}`, `${accelerator:}`, `${local_world_size:}`, `${num_nodes:}` and `${world_size:}`."""
    for resolver in (accelerator, local_world_size, num_nodes, world_size):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
    OmegaConf.register_new_resolver("run_stamp", run_stamp, use_cache=True, replace=True)


def torchrun(ranks: int, nodes: int = 1, module: str = "train") -> str:
    """Return the start of the command that runs a module on so many ranks of each node."""
    where = "--standalone" if nodes == 1 else f"--nnodes={nodes} --rdzv-backend=c10d --rdzv-endpoint=HOST:29500"
    return f"torchrun {where} --nproc-per-node={ranks} -m {module}"


def refuse_multirun(arguments: list[str]) -> None:
    """Exit if Hydra's multirun is requested on several ranks: each rank would run the whole sweep."""
    if world_size() > 1 and {"-m", "--multirun"} & set(arguments):
        overrides = " ".join(argument for argument in arguments if argument not in {"-m", "--multirun"})
        leave(
            f"multirun (-m) needs a single process, and there are {world_size()} ranks: sweep with "
            f"`python -m train -m {overrides}`, or start one torchrun for each job of the sweep"
        )


def refuse_slurm_tasks() -> None:
    """Exit if SLURM starts several tasks without torchrun: each would train as a single process."""
    tasks = int(os.environ.get("SLURM_NTASKS") or 1)
    is_interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "RANK" not in os.environ and tasks > 1 and not is_interactive:
        leave(
            f"SLURM has {tasks} tasks in this job, and each would train separately: start one torchrun for each node "
            "(--ntasks-per-node=1), as scripts/slurm.sbatch does"
        )


def leave(message: str) -> NoReturn:
    """Print one message for all ranks and exit with code 1.

    torchrun ends the other ranks as soon as rank 0 has exited. A rank still alive after the wait was the only one to
    fail, and reports the error itself.
    """
    if rank() != 0:
        time.sleep(RANK_ZERO_SPEAKS_FIRST_S)
    sys.exit(f"error: {message}")
