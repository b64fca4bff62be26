"""Forward and backward never make the host wait for the device: nothing is read back, nothing depends on data."""

import os

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")


class FailOnHostSync(TorchDispatchMode):
    """Raises on every operation that makes the host wait for an accelerator or moves data off it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert not name.startswith(WAITS), f"{func} waits for the device"
        if name.startswith("index"):  # boolean indexing is nonzero in disguise
            indices = args[1] if isinstance(args[1], list | tuple) else [args[1]]
            assert all(i is None or i.dtype != torch.bool for i in indices), f"{func} with a boolean index"
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            for tensor in args:
                if isinstance(tensor, torch.Tensor):
                    assert tensor.device == result.device, f"{func} moves data to {result.device}"
        return result


def take_steps(layer: syncbn.SyncBatchNorm, x: torch.Tensor, grad_output: torch.Tensor, mask: torch.Tensor) -> None:
    with FailOnHostSync():
        layer(x).backward(grad_output)
        layer(x, residual=x, mask=mask).backward(grad_output)
        (grad,) = torch.autograd.grad(layer(x), x, grad_output, create_graph=True)
        grad.square().sum().backward()
        layer.eval()
        layer(x, residual=x, mask=mask).backward(grad_output)


def train(sizes: tuple[int, ...]) -> float:
    os.environ["SYNCBN_BACKEND"] = "torch"  # what other devices than CPU use; that one may read values
    layer = syncbn.SyncBatchNorm(3, momentum=None, activation="relu")
    x = torch.randn(sizes[dist.get_rank()], 3, 4, 4, requires_grad=True)
    take_steps(layer, x, torch.randn(x.shape), torch.ones(len(x), 1, 4, 4, dtype=torch.bool))
    return layer.num_batches_tracked.item()


@pytest.mark.parametrize("sizes", [(2, 5), (2, 0, 3)], ids=str)
def test_nothing_is_read_back_in_forward_backward_and_double_backward(sizes):
    assert run_ranks(len(sizes), train, sizes) == [3] * len(sizes)


@pytest.fixture
def fake_group():
    """A group of four ranks whose collectives do nothing: for tensors without data."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_without_data_go_through(fake_group, dtype):
    """The meta device stands for an accelerator: reading a value from it fails, copying one to the host shows."""
    layer = syncbn.SyncBatchNorm(3, momentum=None, activation="relu", device="meta")
    x = torch.empty(2, 3, 4, 4, device="meta", dtype=dtype, requires_grad=True)
    mask = torch.empty(2, 1, 4, 4, device="meta", dtype=torch.bool)
    take_steps(layer, x, torch.empty_like(x, requires_grad=False), mask)
    assert x.grad.is_meta
    assert layer.running_mean.is_meta


def test_the_check_itself_finds_a_host_sync():
    for offence in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.to("meta")):
        with pytest.raises(AssertionError), FailOnHostSync():
            offence(torch.randn(5))
