"""Activation checkpointing repeats the forward pass: statistics advance once, results do not change, no rank hangs."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from slow import all_but
from torch.nn import functional as F
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import syncbn


class Shifted(torch.nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Functional(torch.nn.BatchNorm2d):
    def forward(self, x):
        self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps)


def network(norm: type[torch.nn.BatchNorm2d] = torch.nn.BatchNorm2d) -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1), norm(4), torch.nn.ReLU(),
        torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4, momentum=None), torch.nn.ReLU(),
    )  # fmt: skip
    return syncbn.convert_sync_batchnorm(model.double())


def train(split: tuple[int, ...], how: str, norm=torch.nn.BatchNorm2d) -> dict[str, torch.Tensor]:
    part = slice(sum(split[: dist.get_rank()]), sum(split[: dist.get_rank() + 1]))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, 2, 5, 5, dtype=torch.float64, generator=generator)[:, part].requires_grad_()
    model = network(norm)
    compiled = torch.compile(model, backend="aot_eager")
    for step, batch in enumerate(x):
        if how == "plain":
            y = model(batch)
        elif how.startswith("compiled") and step == 1:
            y = compiled(batch)  # the same compiled code serves calls outside of a checkpoint
        elif how.startswith("compiled"):
            y = checkpoint(compiled, batch, use_reentrant=how == "compiled, reentrant")
        elif how == "segments":
            y = checkpoint_sequential(model, 2, batch, use_reentrant=False)
        else:
            y = checkpoint(model, batch, use_reentrant=how == "reentrant")
        y.pow(3).sum().backward()
    grads = {f"grad of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"grad of x": x.grad, **grads, **model.state_dict()}


@pytest.mark.parametrize("how", ["reentrant", "not_reentrant", "segments"])
@pytest.mark.parametrize("split", [(8,), (3, 5), (0, 8)], ids=str)
def test_checkpointing_changes_neither_gradients_nor_statistics(how, split):
    ranks = run_ranks(len(split), train, split, how)
    for actual, expected in zip(ranks, run_ranks(len(split), train, split, "plain"), strict=True):
        assert actual["1.num_batches_tracked"] == actual["4.num_batches_tracked"] == 3
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


COMPILED = [(torch.nn.BatchNorm2d, "compiled, reentrant"), (Shifted, "compiled"), (Functional, "compiled, reentrant")]


@pytest.mark.parametrize("norm, how", all_but(COMPILED[:1], COMPILED))
def test_checkpointing_around_a_compiled_block_moves_statistics_once(norm, how):
    split = (3, 5)
    ranks = run_ranks(len(split), train, split, how, norm, collective_timeout_s=100)
    for actual, expected in zip(ranks, run_ranks(len(split), train, split, "plain", norm), strict=True):
        assert actual["1.num_batches_tracked"] == actual["4.num_batches_tracked"] == 3
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_block_compiled_by_inductor_moves_statistics_once_too():
    torch.compiler.reset()
    model, twin, x = network().float(), network().float(), torch.randn(4, 2, 5, 5)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        checkpoint(compiled, x, use_reentrant=False).square().sum().backward()
        twin(x)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


class Checkpoint(torch.autograd.Function):
    """Checkpointing as libraries write it themselves."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, grad_output):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, grad_output)
        return None, x.grad


def test_a_checkpoint_of_another_library_is_a_repetition():
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)
    Checkpoint.apply(layer, x).sum().backward()
    assert layer.num_batches_tracked == 1


def test_saved_tensors_on_the_cpu_inside_a_checkpoint_do_not_hide_the_repetition():
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)

    def run(x):
        with torch.autograd.graph.save_on_cpu():
            return layer(x.sin()).cos()

    checkpoint(run, x, use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize(
    "hook",
    [
        "tensor",
        "leaf",
        "node before",
        "node after",
        "accumulated",
        "module",
        "module before",
        "layer",
        "compiled",
        "end",
    ],
)
def test_a_forward_pass_inside_a_hook_is_one_of_its_own(hook):
    layer, outer = syncbn.SyncBatchNorm(3), torch.nn.Linear(3, 3)
    x, leaf = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)

    def run(*_):
        layer(x)

    if hook == "module":
        outer.register_full_backward_hook(run)
    if hook == "module before":
        outer.register_full_backward_pre_hook(run)
    h = outer(leaf)
    y = syncbn.SyncBatchNorm(3)(h).sin()
    if hook == "tensor":
        h.register_hook(run)
    if hook == "leaf":
        leaf.register_hook(run)
    if hook == "node before":
        y.grad_fn.register_prehook(run)
    if hook == "node after":
        y.grad_fn.register_hook(run)
    if hook == "accumulated":
        leaf.register_post_accumulate_grad_hook(run)
    if hook == "layer":
        y = syncbn.SyncBatchNorm(3)(h)
        y.register_hook(run)
    if hook == "compiled":
        torch.compiler.reset()
        y = torch.compile(outer, backend="aot_eager")(leaf)
        y.register_hook(run)
    if hook == "end":
        h.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(run))
    y.sum().backward()
    assert layer.num_batches_tracked == 1


def keep_elementwise(context, operation, *args, **kwargs):
    kept = [torch.ops.aten.convolution.default, torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor]
    return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("norm", [torch.nn.BatchNorm2d, Shifted, Functional])
def test_selective_checkpointing_finds_the_same_operations_in_the_repetition(norm):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64, generator=generator).requires_grad_()
    model, twin = network(norm), network(norm)
    y = checkpoint(
        model, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, keep_elementwise)
    )
    found = torch.autograd.grad(y.pow(3).sum(), [x, *model.parameters()])
    expected = torch.autograd.grad(twin(x).pow(3).sum(), [x, *twin.parameters()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=1e-12)


class Uncounted(torch.nn.BatchNorm2d):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.num_batches_tracked = None

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1, self.eps)


def test_a_subclass_that_counts_no_batches_may_be_checkpointed():
    layer, x = syncbn.convert_sync_batchnorm(Uncounted(3)), torch.randn(2, 3, 4, 4, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean((0, 2, 3)))
