"""Process groups: their creation, copies and pickles of layers, and layers with different groups."""

import copy
import os
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import syncbn
from syncbn import reference


def batch() -> torch.Tensor:
    return torch.randn(8, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


def running_mean(group) -> np.ndarray:
    layer = syncbn.SyncBatchNorm(3, momentum=1.0, process_group=group, dtype=torch.float64)
    layer(batch().chunk(4)[dist.get_rank()])
    return layer.running_mean.numpy()


def statistics_by_size() -> dict[str, np.ndarray]:
    os.environ["LOCAL_WORLD_SIZE"] = "2"  # as torchrun sets it: two nodes of two ranks
    return {str(size): running_mean(syncbn.new_sync_groups(size)) for size in (1, 2, 4, "node")}


def test_statistics_are_those_of_the_group_of_consecutive_ranks():
    ranks = run_ranks(4, statistics_by_size)
    for rank, found in enumerate(ranks):
        for size, ranks_per_group in (("1", 1), ("2", 2), ("4", 4), ("node", 2)):
            first = rank // ranks_per_group * ranks_per_group
            expected = reference.batch_norm(batch()[2 * first : 2 * (first + ranks_per_group)].numpy()).mean
            np.testing.assert_allclose(found[size], expected, atol=1e-12)


def refused_sizes() -> list[str]:
    messages = []
    for size in (3, 0, -2, 8, "rack", 1.5, "²", None, 2 if dist.get_rank() else 4):
        try:
            syncbn.new_sync_groups(size)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_sizes_that_do_not_divide_the_world_or_differ_are_refused_on_every_rank():
    for messages in run_ranks(4, refused_sizes):
        for message, got in zip(messages[:-1], (3, 0, -2, 8, "rack", 1.5, "²", None), strict=True):
            assert message == f"expected a group size that divides the world size 4, got {got}: use [1, 2, 4]"
        assert messages[-1] == "expected the same group size from every rank, got 4, 2, 2, 2 from ranks 0 to 3"


def test_groups_need_an_initialized_process_group():
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group first"):
        syncbn.new_sync_groups(2)


def copies_and_pickles() -> list[bool]:
    group = syncbn.new_sync_groups(2)
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3))
    syncbn.convert_sync_batchnorm(model[0], group)
    syncbn.convert_sync_batchnorm(model[1])
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    return [twin[0].process_group is group and twin[1].process_group is None for twin in twins]


def test_a_copy_and_a_pickle_keep_the_group_of_each_layer():
    assert run_ranks(4, copies_and_pickles) == [[True, True]] * 4


def pickled_layer() -> bytes:
    return pickle.dumps(syncbn.SyncBatchNorm(3, process_group=syncbn.new_sync_groups(2)))


def load_elsewhere(pickled: bytes) -> str:
    layer = pickle.loads(pickled)
    layer.eval()(torch.randn(4, 3))
    try:
        layer.train()(torch.randn(4, 3))
    except ValueError as error:
        message = str(error)
    syncbn.convert_sync_batchnorm(layer, dist.group.WORLD)
    layer(torch.randn(4, 3))
    return message


def test_a_pickle_read_where_no_such_group_exists_evaluates_and_says_what_it_lacks():
    pickled = run_ranks(4, pickled_layer)[2]
    for message in run_ranks(2, load_elsewhere, pickled):
        assert message.startswith("expected a process group of ranks [2, 3], which this module had when it was pickled")


def different_groups() -> tuple[np.ndarray, np.ndarray]:
    model = torch.nn.Sequential(
        syncbn.SyncBatchNorm(3, momentum=1.0, process_group=syncbn.new_sync_groups(2)),
        syncbn.SyncBatchNorm(3, momentum=1.0),
    ).double()
    x = batch().chunk(4)[dist.get_rank()].requires_grad_()
    model(x).pow(3).sum().backward()
    return model[0].running_mean.numpy(), model[1].running_mean.numpy()


def test_layers_of_one_network_may_have_different_groups():
    ranks = run_ranks(4, different_groups)
    assert np.array_equal(ranks[0][0], ranks[1][0])
    assert not np.allclose(ranks[0][0], ranks[2][0])
    assert all(np.array_equal(ranks[0][1], rank[1]) for rank in ranks)
