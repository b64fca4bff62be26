"""Population statistics are those of the whole data set on every rank, and nothing else in the model changes."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import syncbn
from syncbn import reference

LENGTHS = {"even": (2, 2), "uneven": (3, 1), "none": (4, 0)}


def data() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 2, 7, 3)
    return [index + torch.randn(n, 3, 4, dtype=torch.float64, generator=generator) for index, n in enumerate(sizes)]


def network(norm=torch.nn.BatchNorm1d) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        norm(3), torch.nn.Dropout(0.5), torch.nn.Conv1d(3, 4, 1), torch.nn.ReLU(), norm(4), torch.nn.Conv1d(4, 2, 1)
    ).double()


def recalibrated(lengths: tuple[int, ...], synchronize: bool) -> tuple[dict[str, np.ndarray], int]:
    start = sum(lengths[: dist.get_rank()])
    own = [(x, "a label") for x in data()[start : start + lengths[dist.get_rank()]]]
    model = network()
    if synchronize:
        syncbn.convert_sync_batchnorm(model)
    read = syncbn.recalibrate(model, iter(own))
    return {name: value.numpy() for name, value in model.state_dict().items()}, read


@pytest.mark.parametrize("synchronize", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_statistics_are_those_of_all_values_of_all_ranks(lengths, synchronize):
    ranks = run_ranks(2, recalibrated, lengths, synchronize)
    values = np.concatenate([np.moveaxis(x.numpy(), 1, -1).reshape(-1, 3) for x in data()])
    for (state, read), length in zip(ranks, lengths, strict=True):
        assert read == length
        np.testing.assert_allclose(state["0.running_mean"], values.mean(0), atol=1e-12)
        np.testing.assert_allclose(state["0.running_var"], values.var(0, ddof=1), atol=1e-12)
        assert all(np.array_equal(value, ranks[0][0][name]) for name, value in state.items())


def test_deeper_layers_see_what_they_see_in_training_but_without_dropout():
    model, (x, *_) = network(), data()
    syncbn.recalibrate(model, [x])
    with torch.no_grad():
        normalized = torch.from_numpy(reference.batch_norm(x.numpy()).output)
        hidden = torch.relu(model[2](normalized))
    expected = reference.batch_norm(hidden.numpy())
    np.testing.assert_allclose(model[4].running_mean.numpy(), expected.mean, atol=1e-12)


def test_splitting_the_data_into_other_batches_changes_nothing_in_the_first_layer():
    one, other = network(), network()
    syncbn.recalibrate(one, [torch.cat(data())])
    syncbn.recalibrate(other, data())
    torch.testing.assert_close(one[0].running_var, other[0].running_var, rtol=1e-12, atol=0)


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm1d, syncbn.SyncBatchNorm, syncbn.BatchNorm])
@pytest.mark.parametrize("training", [True, False])
def test_flags_generators_and_all_other_state_stay_as_they_were(norm, training):
    model = network(norm).train(training)
    model[4].eval()
    flags = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert syncbn.recalibrate(model, data(), num_batches=2) == 2
    assert [module.training for module in model.modules()] == flags
    assert all(layer.track_running_stats for layer in (model[0], model[4]))
    assert torch.equal(torch.get_rng_state(), generator)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"0.running_mean", "0.running_var", "4.running_mean", "4.running_var"}
    assert not model[0]._forward_pre_hooks


def test_an_exception_restores_flags_and_keeps_the_statistics():
    model = network().eval()

    def batches():
        yield data()[0]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        syncbn.recalibrate(model, batches())
    assert not any(module.training for module in model.modules())
    assert model[0].running_mean.abs().max() == 0
    assert model[0].track_running_stats


def test_no_batch_at_all_is_an_error_and_no_layer_at_all_is_none():
    with pytest.raises(ValueError, match="expected at least one batch on some rank, got none"):
        syncbn.recalibrate(network(), [])
    assert syncbn.recalibrate(torch.nn.Conv1d(3, 4, 1).double(), data()) == 4


def test_a_layer_that_the_model_does_not_use_keeps_its_statistics():
    model = network()
    model[0].unused = torch.nn.BatchNorm1d(2)
    syncbn.recalibrate(model, data())
    assert model[0].unused.running_var.tolist() == [1, 1]


def merged(counts: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    torch.manual_seed(dist.get_rank())
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3)).double()
    model[0].running_mean.normal_()
    model[0].running_var.uniform_(1, 2)
    own = (model[0].running_mean.numpy().copy(), model[0].running_var.numpy().copy())
    syncbn.merge_running_stats(model, counts[dist.get_rank()])
    return *own, model[0].running_mean.numpy(), model[0].running_var.numpy()


@pytest.mark.parametrize("counts", [(1.0, 1.0, 1.0), (100, 300, 0), (0.2, 0.1, 0.1)], ids=str)
def test_merged_statistics_are_the_pooled_ones(counts):
    ranks = run_ranks(3, merged, counts)
    weights = np.array(counts) / sum(counts)
    means, variances = np.array([rank[0] for rank in ranks]), np.array([rank[1] for rank in ranks])
    mean = weights @ means
    var = weights @ variances + weights @ (means - mean) ** 2
    for rank in ranks:
        np.testing.assert_allclose(rank[2], mean, atol=1e-12)
        np.testing.assert_allclose(rank[3], var, atol=1e-12)


def merging_error(counts: tuple[float, ...]) -> tuple[str, float]:
    model = network()
    model[0].running_mean.fill_(1)
    with pytest.raises(ValueError, match="expected finite counts") as caught:
        syncbn.merge_running_stats(model, counts[dist.get_rank()])
    return str(caught.value), float(model[0].running_mean.sum())


@pytest.mark.parametrize("counts", [(0, 0), (3, -2), (1, float("nan")), (float("inf"), 1)], ids=str)
def test_counts_that_are_no_weights_are_refused_on_every_rank(counts):
    for count, (message, untouched) in zip(counts, run_ranks(2, merging_error, counts), strict=True):
        assert f"expected finite counts of at least 0, one of them positive, got {count} on this rank" in message
        assert untouched == 3


def test_statistics_of_a_rank_that_counts_nothing_may_be_anything():
    model = network()
    model[0].running_mean.fill_(float("nan"))
    with pytest.raises(ValueError, match="one of them positive, got 0 on this rank"):
        syncbn.merge_running_stats(model, 0)
    for rank in run_ranks(2, merged_with_a_spoiled_rank):
        assert rank == [1, 1, 1]


def merged_with_a_spoiled_rank() -> list[float]:
    model = torch.nn.BatchNorm1d(3)
    model.running_mean.fill_(float("nan") if dist.get_rank() else 1)
    syncbn.merge_running_stats(model, 0 if dist.get_rank() else 10)
    return model.running_mean.tolist()


def fails_on_one_rank(where: str) -> str:
    model, batches = network(), iter(data())
    if dist.get_rank() == 1:
        if where == "loader":
            batches = (x.no_such_attribute for x in data())
        elif where == "batch":
            batches = iter([{"image": data()[0]}])
        elif where == "end":
            batches = iter([data()[0], (None, 1)])
        elif where == "model":
            model[2] = torch.nn.Conv1d(5, 4, 1).double()
        elif where == "construction":
            batches = None
    try:
        syncbn.recalibrate(model, batches)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


FAILURES = {
    "loader": "AttributeError",
    "batch": "TypeError: expected batches that are tensors, or tuples or lists that begin with one, got dict",
    "end": "TypeError: expected batches that are tensors, or tuples or lists that begin with one, got tuple",
    "model": "RuntimeError: Given groups=1",
    "construction": "TypeError: 'NoneType' object is not iterable",
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_on_one_rank_is_raised_on_every_rank(where):
    (other, own) = run_ranks(2, fails_on_one_rank, where)
    assert own.startswith(FAILURES[where])
    assert other.startswith("RuntimeError: expected every rank of the group to go on, got from ranks {1: ")


def test_constants_have_no_variance_after_many_batches():
    model = syncbn.SyncBatchNorm(500, dtype=torch.float64)
    x = (torch.randn(500, dtype=torch.float64) * 100).expand(3, 500)
    syncbn.recalibrate(model, [x] * 1000)
    assert model.running_var.abs().sum() == 0
