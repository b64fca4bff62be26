"""The pure functions on per-channel statistics."""

import numpy as np
import pytest
import torch

from syncbn import reference
from syncbn.statistics import Running, invstd_of, pack, unpack, update_running_stats_


def packed_by_rank(x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    parts = [reference.batch_norm(part.numpy()) for part in x.split(sizes)]
    vectors = [
        pack(
            torch.tensor(float(part.count), dtype=torch.float64),
            torch.from_numpy(part.mean),
            torch.from_numpy(part.var) * part.count,
        )
        for part in parts
    ]
    return torch.stack(vectors)


@pytest.mark.parametrize("sizes", [[12], [6, 6], [1, 11], [0, 5, 7], [0, 12, 0]], ids=str)
def test_the_sum_of_packed_vectors_unpacks_to_the_statistics_of_the_whole_batch(sizes):
    x = torch.randn(12, 3, 5, dtype=torch.float64) + 7
    count, mean, var = unpack(packed_by_rank(x, sizes).sum(0), len(sizes))
    expected = reference.batch_norm(x.numpy())
    assert count.item() == expected.count
    np.testing.assert_allclose(mean.numpy(), expected.mean, rtol=1e-13)
    np.testing.assert_allclose(var.numpy(), expected.var, rtol=1e-12)


def test_the_order_of_ranks_changes_nothing_beyond_rounding():
    vectors = packed_by_rank(torch.randn(12, 3, 5, dtype=torch.float64), [2, 3, 7])
    torch.testing.assert_close(
        unpack(vectors.sum(0), 3)[2], unpack(vectors[[2, 0, 1]].sum(0), 3)[2], rtol=1e-13, atol=0
    )


def test_an_empty_batch_unpacks_to_zeros():
    count, mean, var = unpack(packed_by_rank(torch.zeros(0, 3, dtype=torch.float64), [0, 0]).sum(0), 2)
    assert count == 0
    assert mean.tolist() == var.tolist() == [0, 0, 0]


def test_the_variance_is_never_negative_whatever_the_rounding():
    packed = pack(torch.tensor(3.0, dtype=torch.float64), torch.full((50,), 1 / 3 + 1e6), torch.zeros(50))
    assert (unpack(packed, 1)[2] >= 0).all()


def test_counts_are_exact_beyond_what_float32_can_hold():
    packed = pack(torch.tensor(2.0**24 + 1, dtype=torch.float64), torch.zeros(1), torch.zeros(1))
    assert unpack(packed + packed, 2)[0].item() == 2**25 + 2


def test_invstd_of_nothing_is_zero_not_infinite():
    assert invstd_of(torch.tensor([0.0, 4.0]), eps=0.0).tolist() == [0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_running_statistics_move_as_the_oracle_says(dtype):
    running_mean, running_var = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    x = torch.randn(8, 3, 4, dtype=torch.float64) * 2 + 1
    count, mean, var = unpack(packed_by_rank(x, [8])[0], 1)
    update_running_stats_(Running(running_mean, running_var, None, 0.1), count=count, mean=mean, var=var)
    batch = reference.batch_norm(x.numpy())
    expected = reference.update_running_stats(
        reference.RunningStats(np.zeros(3), np.ones(3)),
        mean=batch.mean,
        var=batch.var,
        count=batch.count,
        momentum=0.1,
    )
    tolerance = torch.finfo(dtype).eps
    np.testing.assert_allclose(running_mean.double().numpy(), expected.running_mean, rtol=tolerance)
    np.testing.assert_allclose(running_var.double().numpy(), expected.running_var, rtol=tolerance)


def test_an_empty_batch_moves_no_running_statistics():
    running_mean, running_var = torch.tensor([2.0]), torch.tensor([3.0])
    zero = torch.zeros(1, dtype=torch.float64)
    update_running_stats_(Running(running_mean, running_var, None, 0.5), count=zero[0], mean=zero, var=zero)
    assert (running_mean.item(), running_var.item()) == (2, 3)


@pytest.mark.parametrize("ranks", [1, 8, 64, 1024])
def test_constants_have_no_variance_over_any_number_of_ranks(ranks):
    constants = torch.randn(2000, dtype=torch.float64) * 100
    counts = torch.randint(1, 100_000, (ranks,), dtype=torch.float64)
    packed = sum(pack(count, constants, torch.zeros(2000)) for count in counts)
    assert unpack(packed, ranks)[2].abs().sum() == 0
