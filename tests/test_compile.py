"""torch.compile takes a network with the layer as one graph, forward and backward, and returns the same numbers."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch._dynamo.utils import counters

import syncbn


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4, momentum=None),
    )
    model = syncbn.convert_sync_batchnorm(model)
    model[4].activation = "silu"
    return model


def train(sizes: list[tuple[int, ...]], backend: str) -> list[dict[str, torch.Tensor]]:
    """Return every step's output, gradients and state, eager and compiled, and how often it was compiled."""
    found = []
    for compiled in (False, True):
        model = network()
        run = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        generator = torch.Generator().manual_seed(dist.get_rank())
        steps = {}
        for index, step_sizes in enumerate(sizes):
            x = torch.randn(step_sizes[dist.get_rank()], 3, 6, 6, generator=generator).requires_grad_()
            if compiled and index == 1:
                torch._dynamo.mark_dynamic(x, 0)
            y = run(x)
            y.backward(torch.randn(y.shape, generator=generator))
            steps |= {f"{index} output": y.detach(), f"{index} grad": x.grad}
        grads = {f"grad of {name}": p.grad for name, p in model.named_parameters()}
        found.append(steps | grads | model.state_dict())
    found.append({"graphs": torch.tensor(counters["stats"]["unique_graphs"])})
    return found


SIZES = [(4, 4), (3, 5), (2, 7), (9, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("backend, world_size", [("aot_eager", 2), ("inductor", 2)])
def test_compiled_training_equals_eager_training_for_every_batch_size_of_every_rank(backend, world_size):
    # Sums over the batch are rounded relative to their largest element.
    for eager, compiled, graphs in run_ranks(world_size, train, SIZES, backend, timeout_s=400):
        for name, expected in eager.items():
            atol = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(compiled[name], expected, rtol=1e-5, atol=atol, msg=name)
        assert graphs["graphs"] <= 2  # one for the first size, one for all others


def test_compiled_in_one_process_without_ranks():
    torch._dynamo.reset()
    layer = syncbn.SyncBatchNorm(3, activation="relu", temperature=0.5)
    twin = syncbn.SyncBatchNorm(3, activation="relu", temperature=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, residual = torch.randn(2, 5, 3, 4)
    mask = torch.rand(5, 1, 4) < 0.7
    for training in (True, False):
        layer.train(training)
        twin.train(training)
        torch.testing.assert_close(compiled(x, residual, mask), twin(x, residual, mask), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())
