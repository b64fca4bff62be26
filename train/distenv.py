"""What the launcher says about this process, and what all its ranks agree on before they can talk."""

import os
import sys
import time
import uuid
from datetime import datetime, timedelta
from functools import cache
from typing import Any, NamedTuple, NoReturn

from omegaconf import OmegaConf

STORE_TIMEOUT = timedelta(seconds=60)
RANK_ZERO_SPEAKS_FIRST_S = 5  # what rank 0 gets to report an error that all ranks met


class Refusal(RuntimeError):
    """What was asked for cannot work; the message says why and what to do, and no traceback is shown."""


def rank() -> int:
    """Return this process's rank among all, 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Return the number of ranks, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Return the number of ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def num_nodes() -> int:
    """Return the number of nodes: torchrun gives every node as many ranks as this one has."""
    return world_size() // local_world_size()


def accelerator() -> str:
    """Return "gpu" where every rank of this node has a GPU of its own, otherwise "cpu"."""
    import torch

    return "gpu" if torch.cuda.device_count() >= local_world_size() else "cpu"


def run_stamp() -> str:
    """Return the time the run started: the same string on every rank and after an elastic restart.

    Ranks start in different seconds and there is no process group yet, so the first to arrive leaves its clock in
    the store that torchrun's agent keeps for the whole job.

    Raises:
        Refusal: several ranks and no agent store; on every rank.
    """
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]
    if world_size() == 1:
        return now
    if not has_agent_store():
        raise Refusal(
            "the ranks must agree on one run directory, and this launcher keeps no store they could agree in: "
            "start with torchrun, or name the directory with run_name=..."
        )
    return agent_store().compare_set("train/run_stamp", "", now).decode()


def agreed(key: str, value: str) -> str:
    """Return rank 0's value on every rank, before there is a process group; each its own without torchrun's store.

    Every life of the ranks has values of its own.
    """
    if world_size() == 1 or not has_agent_store():
        return value
    store, key = agent_store(), f"train/{life().name}/{key}"
    if rank() == 0:
        store.set(key, value)
    return store.get(key).decode()


class Life(NamedTuple):
    """The time between two restarts of all ranks by torchrun."""

    name: str  # the same on every rank, another one in every life
    is_restart: bool


@cache
def life() -> Life:
    """Return the life that this process belongs to; every rank calls it.

    `TORCHELASTIC_RESTART_COUNT` does not tell: a node whose own ranks did not fail does not count.
    """
    if world_size() == 1 or not has_agent_store():
        count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return Life(count, count != "0")
    return meet(agent_store(), rank(), world_size())


def meet(store: Any, rank: int, world_size: int) -> Life:
    """Return rank 0's new life on every rank, through a store with what the ranks of earlier lives have left there.

    Rank 0 answers every greeting, by its unique name, until all ranks have confirmed its answer: a greeting of an
    earlier life is answered in vain.

    Raises:
        Refusal: not all ranks came within a minute; on those that did.
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
        raise Refusal("the ranks did not meet within a minute: see what ended the others, and start them together")
    time.sleep(0.02)


def has_agent_store() -> bool:
    """Whether torchrun keeps a store for the whole job, restarts included."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def agent_store() -> Any:
    """Return a new connection to that store."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=STORE_TIMEOUT)


def register_resolvers() -> None:
    """Give the configuration `${run_stamp:}`, `${accelerator:}`, `${local_world_size:}` and `${num_nodes:}`."""
    for resolver in (accelerator, local_world_size, num_nodes, world_size):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
    OmegaConf.register_new_resolver("run_stamp", run_stamp, use_cache=True, replace=True)


def refuse_multirun(arguments: list[str]) -> None:
    """Exit where Hydra's multirun was asked for on several ranks, each of which would sweep by itself."""
    if world_size() > 1 and {"-m", "--multirun"} & set(arguments):
        overrides = " ".join(argument for argument in arguments if argument not in {"-m", "--multirun"})
        leave(
            f"multirun (-m) needs a single process, and there are {world_size()} ranks: sweep with "
            f"`python -m train -m {overrides}`, or start one torchrun for each job of the sweep"
        )


def refuse_slurm_tasks() -> None:
    """Exit where SLURM runs the trainer as several tasks without torchrun, which sets up the ranks here."""
    tasks = int(os.environ.get("SLURM_NTASKS") or 1)
    is_interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "RANK" not in os.environ and tasks > 1 and not is_interactive:
        leave(
            f"SLURM has {tasks} tasks in this job, and each would train by itself: start one torchrun for each node "
            "(--ntasks-per-node=1), as scripts/slurm.sbatch does"
        )


def leave(message: str) -> NoReturn:
    """Print one message for all ranks and exit with code 1.

    torchrun ends the other ranks as soon as rank 0 has left; a rank that outlives the wait met the error alone and
    reports it itself.
    """
    if rank() != 0:
        time.sleep(RANK_ZERO_SPEAKS_FIRST_S)
    sys.exit(f"error: {message}")
