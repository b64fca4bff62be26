"""The life of a network of torchvision or timm: convert, trace with torch.fx, freeze, train, revert; each as before."""

import copy

import pytest
import timm
import torch
import torchvision
from slow import all_but
from timm.layers import freeze_batch_norm_2d, unfreeze_batch_norm_2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn

TORCHVISION = {
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "densenet121": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "shufflenet_v2_x1_0": 32,
    "regnet_y_400mf": 32,
    "mnasnet0_5": 32,
    "deeplabv3_mobilenet_v3_large": 48,
    "lraspp_mobilenet_v3_large": 48,
    "r3d_18": 16,
}
TIMM = {  # image size
    "resnetv2_50": 32,
    "mobilenetv3_small_050": 32,
    "regnetx_002": 32,
    "ghostnet_100": 32,
    "hrnet_w18_small": 64,
    "dla34": 64,
    "res2net50_26w_4s": 32,
    "cspresnet50": 32,
    "repvgg_a0": 32,
    "mixnet_s": 32,
    "fbnetc_100": 32,
    "rexnet_100": 32,
    "ese_vovnet19b_dw": 32,
    "dpn48b": 64,
    "skresnet18": 32,
    "lcnet_050": 32,
    "levit_128s": 224,
    "seresnext26d_32x4d": 32,
    "tinynet_e": 32,
    "mobileone_s0": 32,
}
NETWORKS = [f"torchvision {name}" for name in TORCHVISION] + [f"timm {name}" for name in TIMM]


def build(network: str) -> tuple[nn.Module, torch.Tensor]:
    """Return a network with statistics of its own, without dropout, and a batch."""
    library, name = network.split()
    torch.manual_seed(0)
    if library == "timm":
        model, shape = timm.create_model(name, num_classes=5, drop_rate=0.0), (3, TIMM[name], TIMM[name])
    else:
        options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
        if "_large" in name:
            options = {"weights_backbone": None}
        model = torchvision.models.get_model(name, weights=None, num_classes=5, **options)
        shape = (3, *[4] * (name == "r3d_18"), TORCHVISION[name], TORCHVISION[name])
    for module in model.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.double(), torch.randn(3, *shape, dtype=torch.float64)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y["out"] if isinstance(y, dict) else y


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def train(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    y = output(model.train(), x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    optimizer.step()


def assert_close(found, expected) -> None:
    # rounding errors grow in these untrained networks: 1e-14 in the input becomes 1e-9 in the output of some
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


QUICK = ["torchvision resnet18", "torchvision googlenet", "timm mobilenetv3_small_050", "timm lcnet_050"]


@pytest.mark.parametrize("network", all_but(QUICK, NETWORKS))
def test_a_network_is_converted_traced_frozen_trained_and_reverted(network):
    plain, x = build(network)
    model = copy.deepcopy(plain)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    norms = [name for name, module in plain.named_modules() if isinstance(module, _BatchNorm)]

    assert syncbn.convert_sync_batchnorm(model) is model
    assert [name for name, module in model.named_modules() if isinstance(module, syncbn.SyncBatchNorm)] == norms
    assert all(isinstance(module, classes(plain)[name]) for name, module in model.named_modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    for training in (False, True):
        traced = torch.fx.symbolic_trace(copy.deepcopy(model).train(training))
        called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        assert set(norms) <= set(called) | {name for name in norms if classes(plain)[name] not in vars(nn).values()}
        assert sum(isinstance(module, syncbn.SyncBatchNorm) for module in traced.modules()) == len(norms)
        assert_close(output(traced, x), output(copy.deepcopy(plain).train(training), x))

    frozen, expected = freeze_batch_norm_2d(copy.deepcopy(model)), freeze_batch_norm_2d(copy.deepcopy(plain))
    if "r3d" not in network and "levit" not in network:  # timm freezes BatchNorm2d alone
        assert classes(frozen) == classes(expected)
        assert not any(isinstance(module, _BatchNorm) for module in frozen.modules())
        assert_close(output(frozen.eval(), x), output(expected.eval(), x))
        assert classes(unfreeze_batch_norm_2d(frozen)) == classes(unfreeze_batch_norm_2d(expected))

    train(model, x)
    train(plain, x)
    assert_close(model.state_dict(), plain.state_dict())
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(moved) > 0.5 * len(before)  # weights in front of a scale that is initialized to 0 stay

    trained = {name: value.clone() for name, value in model.state_dict().items()}
    assert syncbn.revert_sync_batchnorm(model) is model
    assert classes(model) == classes(plain)
    torch.testing.assert_close(model.state_dict(), trained, rtol=0, atol=0)
    assert_close(output(model.eval(), x), output(plain.eval(), x))
