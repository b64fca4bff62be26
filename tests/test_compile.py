"""torch.compile compiles a network with the layer to one graph, forward and backward, with the same results."""

import pytest
import torch
import torch._dynamo.exc
import torch._inductor.config
import torch.distributed as dist
from ranks import run_ranks
from slow import all_but

import syncbn


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4, momentum=None),
    )
    model = syncbn.convert_sync_batchnorm(model)
    model[3].activation = "silu"
    return model


def train(sizes: list[tuple[int, ...]], backend: str) -> list[dict[str, torch.Tensor]]:
    """Return output, gradients and state of every step, eager and compiled; a third compilation raises."""
    found = []
    torch._inductor.config.compile_threads = 1  # a pool of processes takes longer to start than the layer to compile
    for compiled in (False, True):
        model = network()
        run = torch.compile(model, fullgraph=True, backend=backend) if compiled else model
        generator = torch.Generator().manual_seed(dist.get_rank())
        steps = {}
        for step, step_sizes in enumerate(sizes):
            # one compilation for the first size, one for all others
            torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default")
            x = torch.randn(step_sizes[dist.get_rank()], 3, 6, 6, generator=generator).requires_grad_()
            y = run(x)
            y.backward(torch.randn(y.shape, generator=generator))
            steps |= {f"{step} output": y.detach(), f"{step} grad": x.grad}
        grads = {f"grad of {name}": p.grad for name, p in model.named_parameters()}
        found.append(steps | grads | model.state_dict())
        torch.compiler.set_stance("default")
    return found


SIZES = [(4, 4), (3, 5), (2, 7), (9, 3)]


@pytest.mark.parametrize("backend", all_but(["aot_eager"], ["aot_eager", "inductor"]))
def test_compiled_training_equals_eager_training_for_every_batch_size_of_every_rank(backend):
    # Rounding errors of sums over the batch are relative to their largest element.
    for eager, compiled in run_ranks(2, train, SIZES, backend, timeout_s=400, collective_timeout_s=300):
        for name, expected in eager.items():
            atol = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(compiled[name], expected, rtol=1e-5, atol=atol, msg=name)


def test_compiled_in_one_process_without_ranks():
    torch.compiler.reset()
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


def train_with_an_empty_rank() -> list[torch.Tensor]:
    found = []
    for compiled in (False, True):
        layer = syncbn.SyncBatchNorm(3)
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        for size in (4, 4 * dist.get_rank()):
            x = torch.linspace(-1, 3, size * 6).view(size, 3, 2).requires_grad_()
            y = run(x)
            y.backward(torch.ones_like(y).cumsum(0))
        found.append([y.detach(), x.grad, layer.weight.grad, layer.running_var])
    return found


def test_a_rank_without_samples_takes_part_compiled_as_well():
    for eager, compiled in run_ranks(2, train_with_an_empty_rank, collective_timeout_s=100):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"fullgraph": True}, {}, {"fullgraph": True, "dynamic": True}], ids=str)
def test_one_value_per_channel_is_refused_in_the_layers_own_words(options):
    torch.compiler.reset()
    compiled = torch.compile(syncbn.SyncBatchNorm(3), backend="aot_eager", **options)
    words = "expected more than 1 value per channel when training, got 1 in input of shape"
    for size in (1, 4, 1):
        x = torch.randn(size, 3)
        if size > 1:
            compiled(x)
            continue
        with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match=words):
            compiled(x)
