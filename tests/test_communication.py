"""How often the layer communicates: twice per layer and training step, never in evaluation."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import syncbn
from syncbn import collectives


class CountCollectives(TorchDispatchMode):
    """Counts collectives by name and records the number of bytes of each."""

    def __init__(self):
        super().__init__()
        self.calls, self.sizes = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.__name__.split(".")[0]
            self.calls[name] += 1
            own = args[1] if name == "allgather_" else args[0]  # of an all-gather, args[0] is what it returns
            self.sizes.append(own[0].nbytes)
        return func(*args, **(kwargs or {}))


def network() -> torch.nn.Module:
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3)]
    return syncbn.convert_sync_batchnorm(torch.nn.Sequential(*layers, torch.nn.BatchNorm2d(8)))


def train_and_evaluate() -> dict[str, tuple[Counter, list[int]]]:
    model, x, found = network(), torch.randn(2, 3, 8, 8), {}
    with CountCollectives() as forward:
        loss = model(x).square().mean()
    with CountCollectives() as backward:
        loss.backward()
    model.eval()
    with CountCollectives() as evaluation:
        model(x).square().mean().backward()
    for name, mode in (("forward", forward), ("backward", backward), ("evaluation", evaluation)):
        found[name] = (mode.calls, mode.sizes)
    return found


def train_and_evaluate_with_all_reduces() -> dict[str, tuple[Counter, list[int]]]:
    collectives.MAX_GATHERED_RANKS = 1
    return train_and_evaluate()


@pytest.mark.parametrize(
    "run, name", [(train_and_evaluate, "allgather_"), (train_and_evaluate_with_all_reduces, "allreduce_")]
)
def test_one_collective_per_layer_forward_and_one_backward_and_none_in_evaluation(run, name):
    for found in run_ranks(2, run):
        assert found["forward"] == ({name: 2}, [8 * (2 * 8 + 1)] * 2)
        assert found["backward"] == ({name: 2}, [8 * (2 * 8 + 1)] * 2)
        assert found["evaluation"] == ({}, [])


def own_vector(rank: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(1001, dtype=torch.float64, generator=generator) * 10.0**rank


def sums_of_vectors() -> list[torch.Tensor]:
    found = []
    for seed in range(3):
        values = own_vector(dist.get_rank(), seed)
        assert collectives.all_reduce_(values, None) is values
        found.append(values)
    values = own_vector(dist.get_rank(), 3)
    wait = collectives.release_peers(None, 500).start_all_reduce_(values)
    wait()
    return [*found, values]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_sum_over_gloo_ranks_is_taken_in_rank_order_on_every_rank(ranks):
    for found in run_ranks(ranks, sums_of_vectors):
        for seed, actual in enumerate(found):
            expected = own_vector(0, seed)
            for rank in range(1, ranks):
                expected += own_vector(rank, seed)
            assert torch.equal(actual, expected)


def train_with_a_counter_on_rank_0() -> torch.Tensor:
    model, x = network(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) if dist.get_rank() == 0 else nullcontext():
        model(x).square().mean().backward()
    return model[1].running_var


def test_one_rank_may_watch_its_operations():
    first, second = run_ranks(2, train_with_a_counter_on_rank_0)
    assert torch.equal(first, second)


def train_compiled_on_rank_0() -> torch.Tensor:
    torch.manual_seed(0)
    model, x = network(), torch.randn(2, 3, 8, 8)
    run = torch.compile(model, backend="aot_eager") if dist.get_rank() == 0 else model
    for _ in range(2):
        run(x).square().mean().backward()
    return torch.cat([model[1].running_var, model[1].weight.grad])


def test_one_rank_may_run_compiled_code_beside_eager_ones():
    first, second = run_ranks(2, train_compiled_on_rank_0, collective_timeout_s=100)
    torch.testing.assert_close(first, second)


def test_a_group_of_one_rank_does_not_communicate():
    (found,) = run_ranks(1, train_and_evaluate)
    assert all(calls == {} for calls, _ in found.values())


def evaluate_on_rank_0() -> bool:
    model = network().eval()
    return dist.get_rank() != 0 or bool(model(torch.randn(2, 3, 8, 8)).isfinite().all())


def test_one_rank_may_evaluate_alone():
    assert run_ranks(2, evaluate_on_rank_0) == [True, True]


def local_evaluation() -> torch.Tensor:
    layer = syncbn.SyncBatchNorm(3, track_running_stats=False).eval()
    return layer(torch.arange(12.0).view(4, 3) ** (1 + dist.get_rank()))


def test_evaluation_without_running_statistics_uses_those_of_the_local_batch():
    for rank, y in enumerate(run_ranks(2, local_evaluation)):
        expected = torch.nn.BatchNorm1d(3, track_running_stats=False)(torch.arange(12.0).view(4, 3) ** (1 + rank))
        torch.testing.assert_close(y, expected.detach())
