"""The layer on the Triton backend: results on ranks, numbers of launches and reads, and compiled kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from contract import compare_layers, train_layers
from ranks import run_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

import syncbn

pytest.importorskip("triton")

import sm90

from syncbn.backends import triton_launch


def train(sizes: tuple[int, ...], backend: str, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    os.environ["SYNCBN_BACKEND"] = backend
    return train_layers(dist.get_rank(), sizes, dtype)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("sizes", [(3, 2), (4, 0), (5,)], ids=str)
def test_the_layer_computes_on_triton_what_it_computes_in_float64_without(sizes):
    actual = run_ranks(len(sizes), train, sizes, "triton", torch.float32)
    expected = run_ranks(len(sizes), train, sizes, "torch", torch.float64)
    for own, wanted in zip(actual, expected, strict=True):
        compare_layers(own, wanted)


def recompute() -> tuple[float, float]:
    os.environ["SYNCBN_BACKEND"] = "triton"
    layer = syncbn.SyncBatchNorm(3, momentum=0.5)
    version = layer.running_mean._version
    y = torch.utils.checkpoint.checkpoint(layer, torch.ones(4, 3).cumsum(0).requires_grad_(), use_reentrant=False)
    assert layer.running_mean._version > version  # autograd would raise if the buffer had been saved
    y.sum().backward()
    return layer.num_batches_tracked.item(), layer.running_mean[0].item()


@pytest.mark.usefixtures("interpreter")
def test_running_statistics_advance_once_although_a_checkpoint_recomputes():
    assert run_ranks(1, recompute) == [(1, 1.25)]


def refuse() -> str:
    os.environ["SYNCBN_BACKEND"] = "triton"
    layer = syncbn.SyncBatchNorm(3)
    with pytest.raises(ValueError, match="expected") as error:
        layer(torch.randn(1 if dist.get_rank() == 0 else 0, 3))
    assert layer.running_var.tolist() == [1, 1, 1]
    assert layer.num_batches_tracked == 0
    return str(error.value)


@pytest.mark.usefixtures("interpreter")
def test_a_single_value_over_all_ranks_is_refused_by_all_and_moves_nothing():
    for message in run_ranks(2, refuse):
        assert "expected more than 1 value per channel when training, got 1 over all 2 ranks" in message


@pytest.mark.usefixtures("interpreter")
def test_per_channel_tensors_may_be_columns_of_a_larger_one(monkeypatch):
    monkeypatch.setenv("SYNCBN_BACKEND", "triton")
    x, grad_output = torch.randn(2, 6, 5, 4)
    columns, parameters = torch.rand(2, 5, 2)
    results = []
    for as_columns in (lambda t: t.clone().unbind(1), lambda t: t.clone().t().contiguous()):
        (running_mean, running_var), (weight, bias) = as_columns(columns), as_columns(parameters)
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        y = syncbn.sync_batch_norm(leaves[0], running_mean, running_var, *leaves[1:], training=True, activation="relu")
        results.append([y.detach(), running_mean, running_var, *torch.autograd.grad(y, leaves, grad_output)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert not torch.equal(results[0][1], columns[:, 0])


@pytest.fixture
def without_data(monkeypatch):
    """Triton for tensors without data, in a group of two ranks whose collectives do nothing."""
    monkeypatch.setenv("SYNCBN_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def launches_of(step) -> list[sm90.Launch]:
    return sm90.record(lambda launch: setattr(triton_launch, "launch", launch), step)


def traffic(launches: list[sm90.Launch], numel: int) -> dict[str, int]:
    """Return how many launches have an argument as large as the activations, by name of the argument."""
    names = [name for launch in launches for name, tensor in launch.tensors().items() if tensor.numel() == numel]
    return {name: names.count(name) for name in dict.fromkeys(names)}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(8, 64, 56, 56), (64, 2048, 7, 7), (2, 4, 8, 9, 10), (512, 256)], ids=str)
def test_forward_reads_x_twice_and_backward_x_and_grad_output_twice(without_data, shape, channels_last):
    layer = syncbn.SyncBatchNorm(shape[1], activation="relu", device="meta")
    x = sm90.without_data(shape, torch.bfloat16, channels_last=channels_last).requires_grad_()
    found = launches_of(lambda: layer(x).backward(torch.empty_like(x, requires_grad=False)))
    names = [launch.kernel.__name__ for launch in found]
    assert names[:4] == ["stats_kernel", "merge_stats_kernel", "gather_stats_kernel", "elemt_kernel"]
    assert names[4:] == ["backward_reduce_kernel", "merge_sums_kernel", "backward_elemt_kernel"]
    assert traffic(found[:4], x.numel()) == {"x_ptr": 2, "y_ptr": 1}
    assert traffic(found[4:], x.numel()) == {"grad_output_ptr": 2, "x_ptr": 2, "grad_input_ptr": 1}
    partials = sum(t.nbytes for launch in found for name, t in launch.tensors().items() if name == "partials_ptr")
    assert partials <= max(0.15 * x.nbytes, 2**20)


def test_a_group_of_one_rank_launches_the_same_kernels(without_data):
    layer = syncbn.BatchNorm(6, device="meta")
    found = launches_of(lambda: layer(torch.empty(4, 6, 5, 5, device="meta")))
    names = [launch.kernel.__name__ for launch in found]
    assert names == ["stats_kernel", "merge_stats_kernel", "gather_stats_kernel", "elemt_kernel"]


def test_the_gradient_of_a_residual_is_written_along_the_way_and_read_instead_of_computed_again(without_data):
    layer = syncbn.SyncBatchNorm(6, activation="silu", device="meta")
    x, residual = (torch.empty(4, 6, 5, 5, device="meta", requires_grad=True) for _ in range(2))
    found = launches_of(lambda: layer(x, residual).backward(torch.empty_like(x)))[4:]
    assert traffic(found, x.numel()) == {
        "grad_output_ptr": 2, "x_ptr": 2, "residual_ptr": 1, "dy_ptr": 1, "grad_input_ptr": 1,
    }  # fmt: skip
    assert found[2].arguments["ACTIVATION"] == "identity"


def test_another_batch_size_or_resolution_selects_no_other_binary(without_data):
    launches = []
    for size in ((8, 64, 56, 56), (7, 64, 56, 56), (1, 64, 56, 56), (8, 64, 48, 64), (8, 64, 23, 9)):
        x = sm90.without_data(size, torch.float32, channels_last=True)
        launches += launches_of(lambda x=x: sm90.training_pass(x))
    assert len(sm90.distinct(launches)) == 7


@pytest.mark.parametrize("shape", [*sm90.SHAPES, (1, 1, 2**33), (2**20, 3), (5, 100_000, 3), (1, 7, 1)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_programs_cover_all_tiles_and_respect_the_limits_of_the_device(shape, channels_last):
    N, C = shape[:2]
    S = torch.Size(shape[2:]).numel()
    sizes = (1, C, N * S) if channels_last else (N, C, S)
    plan = triton_launch.plan(*sizes, channels_last=channels_last, multiprocessors=132)
    blocks = plan.constexprs
    tiles = sizes[0] * -(-sizes[2] // blocks["BLOCK_S"])
    for grid, per_program in ((plan.reduce_grid, plan.reduce_tiles), (plan.elemt_grid, plan.elemt_tiles)):
        assert grid[0] * blocks["BLOCK_C"] >= C > (grid[0] - 1) * blocks["BLOCK_C"]
        assert grid[1] * per_program >= tiles > (grid[1] - 1) * per_program
        assert grid[1] <= triton_launch.MAX_GRID_Y
    assert plan.reduce_tiles * blocks["BLOCK_S"] <= triton_launch.EXACT_COUNT
    assert blocks["BLOCK_C"] * blocks["BLOCK_S"] <= triton_launch.TILE_ELEMENTS
    assert blocks["INT64"] or N * C * S < 2**31


def output_of(script: str) -> str:
    """Run a script of this folder in a separate process, without the interpreter, under which nothing compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = Path(__file__).with_name(script)
    environment["PYTHONPATH"] = os.pathsep.join([str(path.parents[1]), environment.get("PYTHONPATH", "")])
    result = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_kept_binary_is_the_one_that_triton_would_choose():
    launches, kept = map(int, output_of("kept_binaries.py").split())
    assert launches > 800
    assert 0.5 < kept / launches < 1  # unaligned tensors are among them


def test_kernels_compile_for_sm90_without_spills_and_with_wide_accesses():
    found = [json.loads(line) for line in output_of("sm90.py").splitlines()]
    kernels = {"stats", "merge_stats", "gather_stats", "elemt", "backward_reduce", "merge_sums", "backward_elemt"}
    assert {binary["kernel"] for binary in found} == {f"{name}_kernel" for name in kernels}
    for binary in found:
        assert binary["STACK"] == binary["LOCAL"] == 0, f"spills: {binary}"
        assert binary["REG"] <= 128, f"fewer than two programs fit a multiprocessor: {binary}"
        if binary["x_bytes"] is not None and binary["ALIGN_C"] * binary["ALIGN_S"] >= 4:
            assert max(binary["load_bytes"]) >= min(16, 4 * binary["x_bytes"]), f"narrow accesses: {binary}"
