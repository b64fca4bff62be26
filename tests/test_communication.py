"""How often the layer communicates: twice per layer and training step, never in evaluation."""

from collections import Counter

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn


class CountCollectives(TorchDispatchMode):
    """Counts collectives by name and records the number of bytes of each."""

    def __init__(self):
        super().__init__()
        self.calls, self.sizes = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls[func.__name__.split(".")[0]] += 1
            self.sizes.append(args[0][0].nbytes)
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


def test_one_all_reduce_per_layer_forward_and_one_backward_and_none_in_evaluation():
    for found in run_ranks(2, train_and_evaluate):
        assert found["forward"] == ({"allreduce_": 2}, [8 * (2 * 8 + 1)] * 2)
        assert found["backward"] == ({"allreduce_": 2}, [8 * (2 * 8 + 1)] * 2)
        assert found["evaluation"] == ({}, [])


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
