"""How a launcher's environment variables are read, and which are refused."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

from train import distenv

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "2"}


def under(monkeypatch, **environment):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_without_a_launcher_there_is_one_rank(monkeypatch):
    under(monkeypatch)
    assert (distenv.rank(), distenv.world_size(), distenv.local_world_size(), distenv.num_nodes()) == (0, 1, 1, 1)


def test_torchruns_environment_gives_ranks_and_nodes(monkeypatch):
    under(monkeypatch, **TORCHRUN)
    assert (distenv.rank(), distenv.world_size(), distenv.local_world_size(), distenv.num_nodes()) == (5, 6, 2, 3)


@pytest.mark.parametrize("gpus, expected", [(0, "cpu"), (1, "cpu"), (2, "gpu"), (8, "gpu")])
def test_gpus_are_used_where_every_local_rank_has_its_own(monkeypatch, gpus, expected):
    under(monkeypatch, **TORCHRUN)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert distenv.accelerator() == expected


def test_ranks_that_cannot_agree_on_a_directory_are_told_to_name_it(monkeypatch):
    under(monkeypatch, RANK="0", WORLD_SIZE="2")
    with pytest.raises(distenv.Refusal, match="torchrun, or name the directory with run_name"):
        distenv.run_stamp()


def test_the_first_rank_to_ask_the_store_names_the_run_for_all(monkeypatch):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    under(monkeypatch, **TORCHRUN, **agent)
    assert len({distenv.run_stamp() for _ in range(3)}) == 1


def test_every_life_has_one_name_on_all_ranks_whatever_the_lives_before_have_left():
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    server.set("train/greeting/2", "of a rank that has died")

    def join(rank):
        return distenv.meet(torch.distributed.TCPStore("127.0.0.1", server.port), rank, 3)

    with ThreadPoolExecutor(3) as pool:
        lives = [set(pool.map(join, range(3))) for _ in range(3)]
    assert [len(life) for life in lives] == [1, 1, 1]
    assert len({life.name for (life,) in lives}) == 3
    assert [life.is_restart for (life,) in lives] == [False, True, True]


def test_ranks_that_do_not_meet_say_so(monkeypatch):
    monkeypatch.setattr(distenv, "STORE_TIMEOUT", timedelta(seconds=0.1))
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    for rank in (0, 1):
        with pytest.raises(distenv.Refusal, match="the ranks did not meet"):
            distenv.meet(store, rank, 2)


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_multirun_on_several_ranks_is_refused_with_the_command_that_works(monkeypatch, flag):
    under(monkeypatch, RANK="0", WORLD_SIZE="2")
    with pytest.raises(SystemExit, match=r"needs a single process, .* 2 ranks: .*`python -m train -m norm=sync,local`"):
        distenv.refuse_multirun([flag, "norm=sync,local"])


def test_multirun_in_a_single_process_is_hydras_own(monkeypatch):
    under(monkeypatch)
    distenv.refuse_multirun(["-m", "norm=sync,local"])


def test_tasks_of_slurm_without_torchrun_are_refused_with_the_way_that_works(monkeypatch):
    under(monkeypatch)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    with pytest.raises(SystemExit, match=r"SLURM has 8 tasks .*: start one torchrun for each node .*slurm.sbatch"):
        distenv.refuse_slurm_tasks()
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    distenv.refuse_slurm_tasks()
    under(monkeypatch, **TORCHRUN)
    monkeypatch.delenv("SLURM_JOB_NAME")
    distenv.refuse_slurm_tasks()


def test_rank_0_reports_before_the_others(monkeypatch):
    waited = []
    monkeypatch.setattr(distenv.time, "sleep", waited.append)
    for rank in ("0", "1"):
        under(monkeypatch, RANK=rank, WORLD_SIZE="2")
        with pytest.raises(SystemExit, match="error: no"):
            distenv.leave("no")
    assert waited == [distenv.RANK_ZERO_SPEAKS_FIRST_S]
