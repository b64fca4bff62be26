"""Real networks, converted: one SGD step on two uneven ranks equals the step of one process on the whole batch."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from ranks import run_ranks
from slow import all_but

import syncbn

NETWORKS = {  # constructor arguments, image size: small and narrow, because only results are compared
    "resnet18": ({}, 40),
    "resnet50": ({"width_per_group": 16}, 40),
    "densenet121": ({}, 40),
    "mobilenet_v3_small": ({}, 40),
    "efficientnet_b0": ({}, 40),
    "googlenet": ({"aux_logits": False, "init_weights": False}, 40),
    "shufflenet_v2_x1_0": ({}, 40),
    "regnet_y_400mf": ({}, 40),
    "inception_v3": ({"aux_logits": False, "init_weights": False}, 80),
    "timm resnetv2_50": ({"width_factor": 0.25}, 40),
}
SPLIT = (2, 4)


def build(name: str) -> torch.nn.Module:
    arguments, _ = NETWORKS[name]
    torch.manual_seed(0)
    if name.startswith("timm "):
        import timm

        model = timm.create_model(name.removeprefix("timm "), num_classes=5, **arguments)
    else:
        model = torchvision.models.get_model(name, num_classes=5, **arguments)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # dropout masks would depend on the split
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    return model.double()


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = NETWORKS[name][1]
    x = torch.randn(sum(SPLIT), 3, size, size, dtype=torch.float64, generator=generator)
    return x, torch.randn(sum(SPLIT), 5, dtype=torch.float64, generator=generator)


def step(model: torch.nn.Module, x: torch.Tensor, grad_output: torch.Tensor, *, scale: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    y = model(x)
    (y if isinstance(y, torch.Tensor) else y.logits).backward(grad_output * scale)
    optimizer.step()


def step_on_ranks(name: str) -> dict[str, np.ndarray]:
    part = slice(sum(SPLIT[: dist.get_rank()]), sum(SPLIT[: dist.get_rank() + 1]))
    x, grad_output = batch(name)
    model = syncbn.convert_sync_batchnorm(build(name))
    step(torch.nn.parallel.DistributedDataParallel(model), x[part], grad_output[part], scale=dist.get_world_size())
    return {key: value.numpy() for key, value in model.state_dict().items()}


QUICK = ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "timm resnetv2_50"]


@pytest.mark.parametrize("name", all_but(QUICK, NETWORKS))
def test_a_step_on_uneven_ranks_equals_the_step_on_the_whole_batch(name):
    if name.startswith("timm "):
        pytest.importorskip("timm")
    expected = build(name)
    before = copy.deepcopy(expected.state_dict())
    step(expected, *batch(name), scale=1)
    ranks = run_ranks(2, step_on_ranks, name)
    for state in ranks:
        for key, value in expected.state_dict().items():
            np.testing.assert_allclose(state[key], value.numpy(), rtol=0, atol=1e-9, err_msg=key)
    moved = [key for key, value in expected.state_dict().items() if not torch.equal(value, before[key])]
    assert len(moved) > 0.95 * len(before)  # the step changed the network
