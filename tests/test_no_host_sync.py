"""Forward and backward never make the host wait for the device: they read no value and do not depend on data."""

import os
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")
READS = {
    *("cpu", "numpy", "tolist", "item", "__array__", "__bool__", "__float__", "__int__", "__index__", "__contains__"),
    *("data_ptr", "__dlpack__", "__format__", "__repr__"),
}


class FailOnHostSync(TorchDispatchMode):
    """Raises on every operation that makes the host wait for an accelerator or moves data off it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert not name.startswith(WAITS), f"{func} waits for the device"
        if name.startswith("index"):  # boolean indexing calls nonzero
            indices = args[1] if isinstance(args[1], list | tuple) else [args[1]]
            assert all(i is None or i.dtype != torch.bool for i in indices), f"{func} with a boolean index"
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            for tensor in args:
                if isinstance(tensor, torch.Tensor):
                    assert tensor.device == result.device, f"{func} moves data to {result.device}"
        return result


class FailOnRead(TorchFunctionMode):
    """Raises on every method by which Python code reads a value; on CPU such a read dispatches no operation."""

    def __init__(self, may_read=lambda tensor: False):
        super().__init__()
        self.may_read = may_read

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in READS or self.may_read(args[0]), f"{name} reads a tensor of shape {tuple(args[0].shape)}"
        return func(*args, **(kwargs or {}))


class NoHostSync(ExitStack):
    """FailOnHostSync and FailOnRead together."""

    def __init__(self, may_read=lambda tensor: False):
        super().__init__()
        self.enter_context(FailOnHostSync())
        self.enter_context(FailOnRead(may_read))


def take_steps(
    layer: syncbn.SyncBatchNorm, x: torch.Tensor, grad_output: torch.Tensor, mask: torch.Tensor, may_read
) -> None:
    with NoHostSync(may_read):
        layer(x).backward(grad_output)
        layer(x, residual=x, mask=mask).backward(grad_output)
        (grad,) = torch.autograd.grad(layer(x), x, grad_output, create_graph=True)
        grad.square().sum().backward()
        layer.eval()
        layer(x, residual=x, mask=mask).backward(grad_output)


def is_reduced_vector(tensor: torch.Tensor) -> bool:
    """Return whether the tensor is an all-reduced vector, whose count or refusal is read on CPU only."""
    return tensor.shape == (7,) and tensor.dtype == torch.float64 and tensor.is_cpu


def train(sizes: tuple[int, ...]) -> float:
    os.environ["SYNCBN_BACKEND"] = "torch"  # the backend of other devices; the CPU backend may read values
    layer = syncbn.SyncBatchNorm(3, momentum=None, activation="relu")
    x = torch.randn(sizes[dist.get_rank()], 3, 4, 4, requires_grad=True)
    mask = torch.ones(len(x), 1, 4, 4, dtype=torch.bool)
    take_steps(layer, x, torch.randn(x.shape), mask, is_reduced_vector)
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
    """The meta device stands for an accelerator: reading a value fails, and a copy to the host is detected."""
    layer = syncbn.SyncBatchNorm(3, momentum=None, activation="relu", device="meta")
    x = torch.empty(2, 3, 4, 4, device="meta", dtype=dtype, requires_grad=True)
    mask = torch.empty(2, 1, 4, 4, device="meta", dtype=torch.bool)
    take_steps(layer, x, torch.empty_like(x, requires_grad=False), mask, lambda tensor: False)
    assert x.grad.is_meta
    assert layer.running_mean.is_meta


OFFENCES = {
    "item": lambda x: x.sum().item(),
    "boolean index": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "another device": lambda x: x.to("meta"),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "numpy of another shape": lambda x: x.double().reshape(1, 7).numpy(),
    "tolist": lambda x: x.tolist(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "index": lambda x: [1, 2, 3][x.long().clamp(0, 2)[0]],
    "array": lambda x: x.__array__(),
    "f-string": lambda x: f"{x[0]:.2f}",
}


@pytest.mark.parametrize("offence", OFFENCES)
def test_the_check_itself_finds_a_host_sync(offence):
    with pytest.raises(AssertionError), NoHostSync(is_reduced_vector):
        OFFENCES[offence](torch.randn(7))
