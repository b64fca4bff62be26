"""Activation checkpointing repeats the forward pass: statistics advance once, results do not change, no rank hangs."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import syncbn


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
        torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.BatchNorm2d(4, momentum=None), torch.nn.ReLU(),
    )  # fmt: skip
    return syncbn.convert_sync_batchnorm(model.double())


def train(split: tuple[int, ...], how: str) -> dict[str, torch.Tensor]:
    part = slice(sum(split[: dist.get_rank()]), sum(split[: dist.get_rank() + 1]))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, 2, 5, 5, dtype=torch.float64, generator=generator)[:, part].requires_grad_()
    model = network()
    for batch in x:
        if how == "plain":
            y = model(batch)
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
