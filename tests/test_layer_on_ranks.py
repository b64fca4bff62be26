"""SyncBatchNorm on gloo ranks against the NumPy oracle on the whole batch: any split, shape, dtype and layout."""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import syncbn
from syncbn import reference

SHAPES = {
    "NC": (16, 5),
    "NCL": (16, 5, 6),
    "NCHW": (16, 5, 4, 3),
    "NCDHW": (16, 5, 2, 3, 2),
}
SPLITS = {  # samples per rank; each split has 16 in total
    1: {"whole": (16,)},
    2: {"even": (8, 8), "uneven": (3, 13), "empty": (0, 16)},
    3: {"even": (6, 5, 5), "uneven": (1, 2, 13), "empty": (0, 16, 0)},
    4: {"even": (4, 4, 4, 4), "uneven": (1, 9, 2, 4), "empty": (8, 0, 0, 8)},
    8: {"even": (2,) * 8, "uneven": (1, 1, 1, 1, 1, 1, 1, 9), "empty": (0, 4, 0, 4, 1, 0, 7, 0)},
}
LAYOUTS = {"contiguous": None, "channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}


class Case(NamedTuple):
    """One training step: the parameters that vary between tests."""

    split: tuple[int, ...]
    shape: tuple[int, ...] = SHAPES["NCHW"]
    dtype: torch.dtype = torch.float64
    layout: str = "contiguous"
    affine: bool = True

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x and grad_output of the whole batch in the dtype of the case, weight and bias."""
        generator = torch.Generator().manual_seed(1)
        x, grad_output = torch.randn(2, *self.shape, dtype=torch.float64, generator=generator)
        weight, bias = torch.randn(2, self.shape[1], dtype=torch.float64, generator=generator)
        x = 3 * x + torch.arange(self.shape[0]).view(-1, *[1] * (x.dim() - 1)) / 4  # the mean differs between ranks
        parameter_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return x.to(self.dtype), grad_output.to(self.dtype), weight.to(parameter_dtype), bias.to(parameter_dtype)


class Step(NamedTuple):
    """The results of one training step on one rank; activations in float64 for the comparison."""

    output: np.ndarray
    grad_input: np.ndarray
    grad_weight: np.ndarray | None
    grad_bias: np.ndarray | None
    running_mean: np.ndarray
    running_var: np.ndarray
    dtypes: tuple[torch.dtype, torch.dtype]
    in_layout: bool


def cases(world_size: int) -> dict[str, Case]:
    found = {}
    for name, split in SPLITS[world_size].items():
        for shape_name, shape in SHAPES.items():
            found[f"{name}-{shape_name}"] = Case(split, shape)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found[f"{name}-{dtype}"] = Case(split, dtype=dtype)
        found[f"{name}-channels_last"] = Case(split, layout="channels_last")
        found[f"{name}-channels_last_3d"] = Case(split, SHAPES["NCDHW"], layout="channels_last_3d")
        found[f"{name}-channels_last-bfloat16"] = Case(split, dtype=torch.bfloat16, layout="channels_last")
        found[f"{name}-no_affine"] = Case(split, affine=False)
    return found


CASES = [(world_size, name) for world_size in SPLITS for name in cases(world_size)]


def take_steps(all_cases: dict[str, Case]) -> dict[str, Step]:
    """Run one step per case; every rank has the same cases."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialized memory with NaN
    return {name: take_step(case) for name, case in all_cases.items()}


def take_step(case: Case) -> Step:
    rank = dist.get_rank()
    part = slice(sum(case.split[:rank]), sum(case.split[: rank + 1]))
    x, grad_output, weight, bias = case.batch()
    layout = LAYOUTS[case.layout] or torch.contiguous_format
    x = x[part].contiguous(memory_format=layout).requires_grad_()

    layer = syncbn.SyncBatchNorm(case.shape[1], momentum=0.3, affine=case.affine, dtype=weight.dtype)
    if case.affine:
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    output = layer(x)
    output.backward(grad_output[part])  # contiguous, regardless of the layout of x
    return Step(
        output.detach().double().numpy(),
        x.grad.double().numpy(),
        layer.weight.grad.double().numpy() if case.affine else None,
        layer.bias.grad.double().numpy() if case.affine else None,
        layer.running_mean.numpy(),
        layer.running_var.numpy(),
        (output.dtype, x.grad.dtype),
        output.is_contiguous(memory_format=layout) and x.grad.is_contiguous(memory_format=layout),
    )


@cache
def steps(world_size: int) -> list[dict[str, Step]]:
    return run_ranks(world_size, take_steps, cases(world_size))


@pytest.mark.parametrize("world_size, name", CASES)
def test_one_step_equals_the_oracle_on_the_whole_batch(world_size, name):
    case = cases(world_size)[name]
    ranks = [step[name] for step in steps(world_size)]
    x, grad_output, weight, bias = (tensor.double().numpy() for tensor in case.batch())
    weight, bias = (weight, bias) if case.affine else (None, None)
    forward = reference.batch_norm(x, weight=weight, bias=bias)
    gradients = reference.batch_norm_backward(grad_output, x, weight=weight)
    running = reference.update_running_stats(
        reference.RunningStats(np.zeros(case.shape[1]), np.ones(case.shape[1])),
        mean=forward.mean,
        var=forward.var,
        count=forward.count,
        momentum=0.3,
    )

    def assert_close(actual, expected, *, dtype, terms):
        # Results are rounded once to their dtype, after `terms` roundings in the accumulation dtype.
        unit = torch.finfo(dtype).eps / 2
        accumulation_unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
        scale = np.abs(expected).max(initial=1.0)
        error = np.abs(actual - expected)
        bound = (unit * np.abs(expected) if dtype != torch.float64 else 0) + terms * accumulation_unit * scale
        assert (error <= bound).all(), f"error {error.max():.1e}, bound {np.min(bound):.1e}"
        if case.dtype == torch.float64:
            assert error.max(initial=0) <= 1e-11

    terms = 4 * math.sqrt(forward.count) + 16
    assert_close(np.concatenate([step.output for step in ranks]), forward.output, dtype=case.dtype, terms=terms)
    assert_close(
        np.concatenate([step.grad_input for step in ranks]), gradients.grad_input, dtype=case.dtype, terms=terms
    )
    parameter_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    if case.affine:
        grad_weight = sum(step.grad_weight for step in ranks)
        assert_close(grad_weight, gradients.grad_weight, dtype=parameter_dtype, terms=terms * world_size)
        grad_bias = sum(step.grad_bias for step in ranks)
        assert_close(grad_bias, gradients.grad_bias, dtype=parameter_dtype, terms=terms * world_size)
    for step in ranks:
        assert_close(step.running_mean, running.running_mean, dtype=parameter_dtype, terms=terms)
        assert_close(step.running_var, running.running_var, dtype=parameter_dtype, terms=terms)
        assert step.dtypes == (case.dtype, case.dtype)
        assert step.in_layout


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_running_statistics_are_bitwise_equal_on_all_ranks(world_size):
    for name in cases(world_size):
        for step in steps(world_size):
            first = steps(world_size)[0][name]
            assert np.array_equal(step[name].running_mean, first.running_mean)
            assert np.array_equal(step[name].running_var, first.running_var)


def test_gradients_of_the_parameters_are_sums_over_the_own_rank():
    case = Case((3, 13))
    x, grad_output, _, _ = (tensor.numpy() for tensor in case.batch())
    normalized = reference.batch_norm(x).output
    for part, step in zip((slice(0, 3), slice(3, 16)), steps(2), strict=True):
        expected = (grad_output * normalized)[part].sum((0, 2, 3))
        np.testing.assert_allclose(step["uneven-NCHW"].grad_weight, expected, rtol=0, atol=1e-11)


# Accuracy: design bar 1e-6 relative error of the variance


def variances(offsets_and_scales: list[tuple[float, float]], split: tuple[int, ...]) -> list[np.ndarray]:
    """Return the biased variance of float32 data `offset + scale * randn`, from an update with momentum 1."""
    rank = dist.get_rank()
    part = slice(sum(split[:rank]), sum(split[: rank + 1]))
    found = []
    for offset, scale in offsets_and_scales:
        layer = syncbn.SyncBatchNorm(4, momentum=1.0, affine=False)
        layer(offset_data(offset, scale)[part])
        found.append(layer.running_var.numpy())
    return found


def offset_data(offset: float, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(32, 4, 14, 14, dtype=torch.float64, generator=generator)
    return (offset + scale * x).float()


@pytest.mark.parametrize("split", [(32,), (16, 16), (1, 31), (0, 10, 22), (4,) * 8], ids=str)
def test_the_variance_of_float32_data_is_exact_to_1e_6_at_any_offset_and_scale(split):
    offsets_and_scales = [(0, 1), (1e2, 1), (1e3, 1), (1e4, 1), (-1e4, 1), (1, 1e-3), (1, 1e-4), (0, 1e-5), (0.1, 1e-5)]
    found = run_ranks(len(split), variances, offsets_and_scales, split)
    for rank in found:
        for (offset, scale), var in zip(offsets_and_scales, rank, strict=True):
            x = offset_data(offset, scale).double().numpy()
            statistics = reference.batch_norm(x)
            expected = statistics.var * statistics.count / (statistics.count - 1)
            np.testing.assert_allclose(var, expected, rtol=1e-6, atol=0, err_msg=f"{offset=}, {scale=}")


def test_the_output_keeps_its_accuracy_at_a_mean_of_ten_thousand_standard_deviations():
    x = offset_data(1e4, 1)
    output = syncbn.SyncBatchNorm(4, affine=False)(x)
    expected = reference.batch_norm(x.double().numpy()).output
    np.testing.assert_allclose(output.double().numpy(), expected, rtol=0, atol=4e-6)


def train_on_constants(sizes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    constants = torch.tensor([0.1, -1 / 3, 7e4, 0.0, 1e-30, 3.0], dtype=dtype).view(1, 6, 1)
    found = []
    for create_graph in (False, True):
        torch.manual_seed(0)
        layer = syncbn.SyncBatchNorm(6, eps=0.0, activation="leaky_relu", dtype=dtype)
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.normal_(layer.bias)
        x = constants.expand(sizes[dist.get_rank()], 6, 5).clone().requires_grad_()
        y = layer(x)
        leaves = [x, layer.weight, layer.bias]
        grads = torch.autograd.grad(y, leaves, torch.randn(y.shape, dtype=dtype), create_graph=create_graph)
        if create_graph:
            loss = sum(grad.square().sum() for grad in grads)
            grads = [*grads, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]
        expected = torch.nn.functional.leaky_relu(layer.bias).view(1, 6, 1).expand(y.shape)
        found += [y.detach() - expected.detach(), *(grad.detach() for grad in grads)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(4,), (3, 1), (0, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8)], ids=str)
def test_constant_channels_without_eps_yield_the_bias_and_finite_gradients_of_any_order(sizes, dtype):
    for found in run_ranks(len(sizes), train_on_constants, sizes, dtype):
        for tensor in found:
            assert tensor.isfinite().all()
        assert found[0].abs().sum() == found[4].abs().sum() == 0


@pytest.mark.parametrize("mean_over_std", [1e2, 1e4, 1e6])
def test_one_process_loses_no_more_than_the_wire_does(mean_over_std):
    x = mean_over_std + torch.randn(64, 3, dtype=torch.float64)
    layer = syncbn.SyncBatchNorm(3, momentum=1.0, dtype=torch.float64)
    layer(x)
    rtol = 1e-15 * mean_over_std**2
    np.testing.assert_allclose(layer.running_var.numpy(), x.numpy().var(0, ddof=1), rtol=rtol)


# Several steps, groups of layers, DDP


def cumulative_average(batches: list[torch.Tensor], split: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int]:
    rank = dist.get_rank()
    part = slice(sum(split[:rank]), sum(split[: rank + 1]))
    layer = syncbn.SyncBatchNorm(3, momentum=None, dtype=torch.float64)
    for batch in batches:
        layer(batch[part])
    return layer.running_mean.numpy(), layer.running_var.numpy(), layer.num_batches_tracked.item()


def test_momentum_none_averages_all_batches_and_leaves_out_an_empty_one():
    batches = [torch.randn(6, 3, 2, dtype=torch.float64) * step for step in range(1, 4)]
    batches.insert(1, batches[0][:0])
    for running_mean, running_var, num_batches_tracked in run_ranks(2, cumulative_average, batches, (2, 4)):
        full = [reference.batch_norm(batch.numpy()) for batch in batches if len(batch)]
        np.testing.assert_allclose(running_mean, np.mean([batch.mean for batch in full], axis=0), atol=1e-12)
        unbiased = [batch.var * batch.count / (batch.count - 1) for batch in full]
        np.testing.assert_allclose(running_var, np.mean(unbiased, axis=0), atol=1e-12)
        assert num_batches_tracked == 3


def network() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 6, 3, stride=2),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 9, 4),
        torch.nn.BatchNorm1d(4),
    ).double()


def train(model, x, target, *, loss_scale: float):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch, classes in zip(x, target, strict=True):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(batch), classes, reduction="sum") * loss_scale
        loss.backward()
        optimizer.step()


def train_with_ddp(x, target, split, synchronize: bool):
    part = slice(sum(split[: dist.get_rank()]), sum(split[: dist.get_rank() + 1]))
    model = syncbn.convert_sync_batchnorm(network()) if synchronize else network()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    # DDP averages gradients over ranks; multiplied by the number of ranks they are those of the sum.
    train(ddp, x[:, part], target[:, part], loss_scale=dist.get_world_size() / x.shape[1])
    return {name: value.numpy() for name, value in model.state_dict().items()}


def test_ddp_on_uneven_ranks_trains_the_same_network_as_one_process_and_only_when_synchronized():
    x, target = torch.randn(4, 10, 3, 7, 7, dtype=torch.float64), torch.randint(4, (4, 10))
    expected = network()
    train(expected, x, target, loss_scale=1 / 10)
    for state in run_ranks(2, train_with_ddp, x, target, (3, 7), True):
        for name, value in expected.state_dict().items():
            np.testing.assert_allclose(state[name], value.numpy(), rtol=0, atol=1e-11, err_msg=name)
    local = run_ranks(2, train_with_ddp, x, target, (3, 7), False)[0]
    assert np.abs(local["0.weight"] - expected.state_dict()["0.weight"].numpy()).max() > 1e-3
