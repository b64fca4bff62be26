"""Forward and backward never make the host wait for the device: nothing is read back, nothing depends on data."""

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")


class FailOnHostSync(TorchDispatchMode):
    """Raises on every operation that would make the host wait for an accelerator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert not name.startswith(WAITS), f"{func} waits for the device"
        if name.startswith("index"):  # boolean indexing is nonzero in disguise
            indices = args[1] if isinstance(args[1], list | tuple) else [args[1]]
            assert all(i is None or i.dtype != torch.bool for i in indices), f"{func} with a boolean index"
        target = (kwargs or {}).get("device")
        assert target is None or torch.device(target).type == "cpu" or args[0].device == target, f"{func} moves data"
        return func(*args, **(kwargs or {}))


def train(sizes: tuple[int, ...]) -> float:
    layer = syncbn.SyncBatchNorm(3, momentum=None, activation="relu")
    x = torch.randn(sizes[dist.get_rank()], 3, 4, 4, requires_grad=True)
    mask = torch.ones(len(x), 1, 4, 4, dtype=torch.bool)
    grad_output = torch.randn(x.shape)
    with FailOnHostSync():
        layer(x).backward(grad_output)
        layer(x, residual=x, mask=mask).backward(grad_output)
        (grad,) = torch.autograd.grad(layer(x), x, grad_output, create_graph=True)
        grad.square().sum().backward()
    return layer.num_batches_tracked.item()


def test_nothing_is_read_back_in_forward_backward_and_double_backward():
    assert run_ranks(2, train, (2, 5)) == [3, 3]
    assert run_ranks(3, train, (2, 0, 3)) == [3, 3, 3]


def test_the_check_itself_finds_a_host_sync():
    for offence in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero()):
        try:
            with FailOnHostSync():
                offence(torch.randn(5))
        except AssertionError:
            continue
        raise AssertionError("not found")
