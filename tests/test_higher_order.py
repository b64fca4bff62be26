"""Second and higher derivatives equal those of one process on the whole batch, for any split over ranks."""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.nn.functional import all_reduce
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.activations import ACTIVATIONS

SPLITS = {"one": (10,), "two": (3, 7), "three": (4, 0, 6), "four": (1, 2, 3, 4)}


class Elementary(torch.nn.BatchNorm1d):
    """The formula in elementary operations: torch's own layer has no third derivative."""

    def forward(self, x):
        centred = x - x.mean(0)
        return centred / (centred.square().mean(0) + self.eps).sqrt() * self.weight + self.bias


def network(*, synchronize: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6),
        torch.nn.BatchNorm1d(6) if synchronize else Elementary(6),
        torch.nn.Tanh(),
        torch.nn.Linear(6, 3),
        torch.nn.BatchNorm1d(3) if synchronize else Elementary(3),
        torch.nn.Softplus(),
        torch.nn.Linear(3, 1),
    ).double()
    return syncbn.convert_sync_batchnorm(model) if synchronize else model


def batch() -> torch.Tensor:
    return torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def total(value: torch.Tensor, *, synchronize: bool) -> torch.Tensor:
    return all_reduce(value) if synchronize else value


def gradient_penalty(x: torch.Tensor, *, synchronize: bool) -> list[torch.Tensor]:
    """Return the gradient of sum(|dD/dx| - 1)^2 (Gulrajani et al. 2017) for this rank's x, then for the parameters."""
    model = network(synchronize=synchronize)
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    penalty = (grad.norm(dim=1) - 1).square().sum()
    grads = torch.autograd.grad(penalty, [x, *model.parameters()], allow_unused=True)
    grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, [x, *model.parameters()], strict=True)]
    return [grads[0], *(total(grad, synchronize=synchronize) for grad in grads[1:])]


def hessian_vector_product(x: torch.Tensor, *, synchronize: bool) -> list[torch.Tensor]:
    """Return H v for the parameters, whose gradients are summed over ranks, and its derivative (third order)."""
    model = network(synchronize=synchronize)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(2)
    vectors = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]

    def derivative(of: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(of, parameters, create_graph=True)
        return total(sum((g * v).sum() for g, v in zip(grads, vectors, strict=True)), synchronize=synchronize)

    first = derivative(model(x).exp().sum())
    # The derivative of a value that every rank holds is summed over ranks: divide by their number.
    ranks = dist.get_world_size() if synchronize else 1
    second = derivative(first / ranks)
    third = derivative(second / ranks)
    return [first.detach(), second.detach(), third.detach()]


def on_ranks(split: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    part = slice(sum(split[: dist.get_rank()]), sum(split[: dist.get_rank() + 1]))
    penalty = gradient_penalty(batch()[part], synchronize=True)
    return penalty, hessian_vector_product(batch()[part], synchronize=True)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_gradient_penalty_and_hessian_vector_products_equal_those_of_one_process(split):
    ranks = run_ranks(len(split), on_ranks, split)
    expected = gradient_penalty(batch(), synchronize=False)
    torch.testing.assert_close(torch.cat([penalty[0] for penalty, _ in ranks]), expected[0], rtol=0, atol=1e-9)
    for penalty, products in ranks:
        for actual, wanted in zip(penalty[1:], expected[1:], strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-9)
        for actual, wanted in zip(products, hessian_vector_product(batch(), synchronize=False), strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation, with_mask", itertools.product(ACTIVATIONS, [False, True]))
def test_first_and_second_derivatives_pass_gradcheck(activation, with_mask):
    x, residual = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    mask = (torch.arange(10).view(5, 1, 2) % 3 > 0) if with_mask else None
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight, bias)]

    def normalize(x, residual, weight, bias):
        return syncbn.sync_batch_norm(
            x, None, None, weight, bias, training=True, residual=residual, mask=mask, activation=activation
        )

    assert torch.autograd.gradcheck(normalize, leaves)
    assert torch.autograd.gradgradcheck(normalize, leaves)


@pytest.mark.parametrize("frozen", ["weight", "bias", "x", "weight bias", "x weight"])
def test_first_derivatives_are_the_same_with_and_without_create_graph(frozen):
    layer = syncbn.SyncBatchNorm(3, activation="relu", dtype=torch.float64)
    x, grad_output = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    leaves = {"x": x.requires_grad_("x" not in frozen.split()), "weight": layer.weight, "bias": layer.bias}
    for name in ("weight", "bias"):
        leaves[name].requires_grad_(name not in frozen)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    plain = torch.autograd.grad(layer(x), wanted, grad_output)
    differentiable = torch.autograd.grad(layer(x), wanted, grad_output, create_graph=True)
    torch.testing.assert_close(plain, differentiable, rtol=0, atol=1e-12)


def test_half_precision_inputs_have_second_derivatives():
    layer = syncbn.SyncBatchNorm(3)
    x = torch.randn(6, 3, 4).bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).float().pow(3).sum(), x, create_graph=True)
    grad.float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


class ElementaryLayer(torch.nn.Module):
    """The formula in elementary operations, with a scale that depends on the input."""

    def forward(self, x, weight, residual):
        centred = x - x.mean(0)
        return torch.relu(centred / (centred.square().mean(0) + 1e-5).sqrt() * weight + residual)


def test_inputs_that_are_computed_from_another_get_their_own_derivative():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    cotangents = torch.randn(2, 6, 3, dtype=torch.float64)

    def second_derivative(normalize):
        h = x.sin()
        y = normalize(h, h.square().mean(0), h)  # weight and residual depend on the input
        (grad,) = torch.autograd.grad(y, x, cotangents[0], create_graph=True)
        return grad, *torch.autograd.grad(grad, x, cotangents[1])

    expected = second_derivative(ElementaryLayer())
    found = second_derivative(
        lambda x, weight, residual: syncbn.sync_batch_norm(
            x, None, None, weight, training=True, residual=residual, activation="relu"
        )
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_a_checkpointed_layer_has_a_backward_pass_under_create_graph():
    layer = syncbn.SyncBatchNorm(3, activation="relu")
    x = torch.randn(6, 3, requires_grad=True)
    cotangent = torch.randn(6, 3)
    (expected,) = torch.autograd.grad(layer(x), x, cotangent, create_graph=True)
    y = checkpoint(layer, x, use_reentrant=False)
    (found,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
    torch.testing.assert_close(found, expected)
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_a_batch_of_gradients_is_taken_back_as_each_alone_is(name, monkeypatch):
    monkeypatch.setenv("SYNCBN_BACKEND", name)
    layer = syncbn.SyncBatchNorm(4, activation="relu", dtype=torch.float64)
    x = torch.randn(8, 4, 4, 3, dtype=torch.float64, requires_grad=True)
    cotangents = torch.randn(3, *x.shape, dtype=torch.float64)
    y, inputs = layer(x), [x, layer.weight, layer.bias]
    alone = [torch.autograd.grad(y, inputs, cotangent, retain_graph=True) for cotangent in cotangents]
    together = torch.autograd.grad(y, inputs, cotangents, is_grads_batched=True)
    for found, expected in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))
