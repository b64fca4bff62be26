"""Half precision: large counts, empty ranks, autocast; sums and counts are never in half precision."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import syncbn
from syncbn import reference

HALVES = [torch.float16, torch.bfloat16]


def large_counts(dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Train a half-precision layer on 100,352 values per channel and rank: 32 images of 56 x 56, as in a ResNet."""
    layer = syncbn.SyncBatchNorm(2, momentum=1.0).to(dtype)
    torch.manual_seed(dist.get_rank())
    x = (1 + torch.randn(32, 2, 56, 56)).to(dtype)
    y = layer(x)
    return x.double().numpy(), layer.running_mean.double().numpy(), y.detach().double().numpy()


@pytest.mark.parametrize("dtype", HALVES)
def test_counts_beyond_what_half_precision_can_hold_give_an_exact_mean(dtype):
    ranks = run_ranks(2, large_counts, dtype)
    expected = reference.batch_norm(np.concatenate([x for x, _, _ in ranks]))
    unit = torch.finfo(dtype).eps / 2
    for _, running_mean, _ in ranks:
        np.testing.assert_allclose(running_mean, expected.mean, rtol=unit)
    y = np.concatenate([y for _, _, y in ranks])
    assert (np.abs(y - expected.output) <= unit * np.abs(expected.output) + 1e-6).all()


def empty_rank(dtype: torch.dtype, autocast: bool, sizes: tuple[int, ...]) -> tuple[str, bool, float]:
    torch.manual_seed(dist.get_rank())
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))
    model = syncbn.convert_sync_batchnorm(model if autocast else model.to(dtype))
    x = torch.randn(sizes[dist.get_rank()], 2, 4, 4).to(torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        y = model(x)
    y.float().pow(3).sum().backward()
    finite = all(p.grad.isfinite().all() for p in model.parameters()) and bool(y.isfinite().all())
    return str(y.dtype), finite, model[1].running_mean.double().sum().item()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (0, 0)], ids=str)
def test_a_rank_without_samples_takes_part_in_every_dtype(dtype, autocast, sizes):
    if autocast and dtype not in HALVES:
        pytest.skip("autocast on CPU is for half precision")
    ranks = run_ranks(2, empty_rank, dtype, autocast, sizes)
    for found in ranks:
        assert found[:2] == (str(dtype), True)
        assert found[2] == ranks[0][2]
        assert (found[2] == 0) == (sizes == (0, 0))
