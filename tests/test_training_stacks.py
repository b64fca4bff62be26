"""The layer with common training tools: DDP options, FSDP2, gradient accumulation, GradScaler, freezing."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import syncbn

SPLIT = (3, 5)


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(4 * 4, 3),
        nn.BatchNorm1d(3),
    )
    return model.to(dtype)


def batches(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, sum(SPLIT), 2, 6, 6, dtype=dtype, generator=generator)
    return x, torch.randint(3, (4, sum(SPLIT)), generator=generator)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:, sum(SPLIT[: dist.get_rank()]) : sum(SPLIT[: dist.get_rank() + 1])]


def losses(model: nn.Module, x: torch.Tensor, target: torch.Tensor, *, scale: float) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x), target, reduction="sum") * scale


def run_steps(model: nn.Module, x: torch.Tensor, target: torch.Tensor, *, scale: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch, classes in zip(x, target, strict=True):
        optimizer.zero_grad()
        losses(model, batch, classes, scale=scale).backward()
        optimizer.step()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    full = {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in model.state_dict().items()}
    return {name.removeprefix("module."): value for name, value in full.items()}


def assert_as_one_process(
    on_ranks: Callable[..., dict[str, torch.Tensor]], in_one_process: Callable[[nn.Module], None], *args: object
) -> None:
    expected = network()
    in_one_process(expected)
    for state in run_ranks(len(SPLIT), on_ranks, *args):
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-10, msg=name)


def plain_steps(model: nn.Module) -> None:
    run_steps(model, *batches(), scale=1 / sum(SPLIT))


def ddp(options: dict) -> dict[str, torch.Tensor]:
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(network()), **options)
    run_steps(model, *map(own_part, batches()), scale=len(SPLIT) / sum(SPLIT))
    return state_of(model)


@pytest.mark.parametrize(
    "options",
    [{}, {"static_graph": True}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}],
    ids=str,
)
def test_ddp_equals_one_process(options):
    assert_as_one_process(ddp, plain_steps, options)


def fsdp(reshard: bool) -> dict[str, torch.Tensor]:
    model = syncbn.convert_sync_batchnorm(network())
    mesh = init_device_mesh("cpu", (len(SPLIT),))
    for block in (model[0], model[1]):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    run_steps(model, *map(own_part, batches()), scale=len(SPLIT) / sum(SPLIT))
    return state_of(model)


@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2_equals_one_process(reshard):
    assert_as_one_process(fsdp, plain_steps, reshard)


def fsdp_in_bfloat16() -> tuple[bool, torch.dtype]:
    model = syncbn.convert_sync_batchnorm(network(torch.float32))
    mesh = init_device_mesh("cpu", (len(SPLIT),))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    x, target = map(own_part, batches(torch.float32))
    run_steps(model, x, target, scale=1 / 4)
    model.eval()
    y = model(x[0])
    return bool(y.isfinite().all()), model[4].running_mean.dtype


def test_fsdp2_in_mixed_precision_trains_and_evaluates_with_float32_statistics():
    for finite, dtype in run_ranks(2, fsdp_in_bfloat16):
        assert finite
        assert dtype == torch.float32


def accumulate(model: nn.Module, x: torch.Tensor, target: torch.Tensor, *, scale: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, (batch, classes) in enumerate(zip(x, target, strict=True)):
        last = index % 2 == 1
        if last or not isinstance(model, DistributedDataParallel):
            losses(model, batch, classes, scale=scale).backward()
        else:
            with model.no_sync():
                losses(model, batch, classes, scale=scale).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()


def ddp_with_accumulation() -> dict[str, torch.Tensor]:
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(network()))
    accumulate(model, *map(own_part, batches()), scale=len(SPLIT) / sum(SPLIT))
    return state_of(model)


def test_gradient_accumulation_with_no_sync_equals_one_process():
    assert_as_one_process(ddp_with_accumulation, lambda m: accumulate(m, *batches(), scale=1 / sum(SPLIT)))


def twice(model: nn.Module, x: torch.Tensor, target: torch.Tensor, *, scale: float) -> None:
    """Two forward passes before one backward pass, as a discriminator does on real and generated images."""
    first = losses(model, x[0], target[0], scale=scale)
    second = losses(model, x[1], target[1], scale=scale)
    (first + 2 * second).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def ddp_twice() -> dict[str, torch.Tensor]:
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(network()), broadcast_buffers=True)
    twice(model, *map(own_part, batches()), scale=len(SPLIT) / sum(SPLIT))
    return state_of(model)


def test_two_forward_passes_before_one_backward_pass_equal_one_process():
    assert_as_one_process(ddp_twice, lambda m: twice(m, *batches(), scale=1 / sum(SPLIT)))


FROZEN = [("weight",), ("bias",), ("weight", "bias"), ("input",), ("input", "bias"), ("input", "weight")]


def freeze(model: nn.Module, frozen: tuple[str, ...]) -> None:
    """Freeze the weights or biases of every normalization, or the convolution before the first: its input."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.requires_grad_("weight" not in frozen)
            module.bias.requires_grad_("bias" not in frozen)
    model[0][0].requires_grad_("input" not in frozen)


def ddp_frozen(frozen: tuple[str, ...]) -> dict[str, torch.Tensor]:
    model = syncbn.convert_sync_batchnorm(network())
    freeze(model, frozen)
    model = DistributedDataParallel(model)
    run_steps(model, *map(own_part, batches()), scale=len(SPLIT) / sum(SPLIT))
    return state_of(model)


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_frozen_in_any_combination_equals_one_process(frozen):
    def in_one_process(model: nn.Module) -> None:
        freeze(model, frozen)
        plain_steps(model)

    assert_as_one_process(ddp_frozen, in_one_process, frozen)


def unequal_needs() -> bool:
    """On rank 1 only the bias needs a gradient; backward passes still make the same collective calls."""
    layer = syncbn.SyncBatchNorm(3)
    x = torch.randn(4, 3, requires_grad=dist.get_rank() == 0)
    layer.weight.requires_grad_(dist.get_rank() == 0)
    for _ in range(2):
        layer(x).pow(3).sum().backward()
    return bool(layer.bias.grad.isfinite().all())


def test_ranks_that_need_different_gradients_stay_in_step():
    assert run_ranks(2, unequal_needs) == [True, True]


def scaled(with_scaler: bool) -> dict[str, torch.Tensor]:
    model = DistributedDataParallel(syncbn.convert_sync_batchnorm(network(torch.float32)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1, enabled=with_scaler)
    x, target = map(own_part, batches(torch.float32))
    for index, (batch, classes) in enumerate(zip(x, target, strict=True)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(batch)
        loss = nn.functional.cross_entropy(y.float(), classes, reduction="sum") / 4
        if with_scaler and index == 1 and dist.get_rank() == 1:
            loss = loss * torch.inf  # an overflow on one rank reaches all ranks, and the step is skipped
        scaler.scale(loss).backward()
        if not with_scaler and index == 1:
            continue
        scaler.step(optimizer)
        scaler.update()
    return state_of(model)


def test_a_grad_scaler_skips_the_step_with_an_overflow_on_every_rank():
    expected, with_scaler = run_ranks(2, scaled, False), run_ranks(2, scaled, True)
    assert all(value.isfinite().all() for value in with_scaler[0].values())
    for name, value in with_scaler[0].items():
        torch.testing.assert_close(with_scaler[1][name], value, rtol=0, atol=0)
        torch.testing.assert_close(expected[0][name].float(), value.float(), rtol=0.05, atol=0.02)
