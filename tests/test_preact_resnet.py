"""The network: published sizes, the order within a unit, and the norms that a factory may return."""

import pytest
import torch
from torch import nn
from torchvision import models

from syncbn import SyncBatchNorm
from syncbn.function import NormActConvFunction
from train.mlp import MLP
from train.norms import batch_norm, group_norm
from train.preact_resnet import FORMS, PreActBlock, PreActBottleneck, PreActResNet, preact_resnet


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_the_224_px_forms_have_torchvisions_parameters_but_for_the_norms_of_the_shortcuts(depth):
    with torch.device("meta"):
        ours = preact_resnet(depth, nn.BatchNorm2d, num_classes=1000)
        theirs = getattr(models, f"resnet{depth}")()
    shortcut_norms = sum(count(module[1]) for name, module in theirs.named_modules() if name.endswith("downsample"))
    assert count(ours) == count(theirs) - shortcut_norms


@pytest.mark.parametrize("depth, published_millions", [(20, 0.27), (56, 0.85), (110, 1.7), (164, 1.7)])
def test_the_cifar_forms_have_the_published_sizes(depth, published_millions):
    with torch.device("meta"):
        network = preact_resnet(depth, nn.BatchNorm2d, num_classes=10)
    assert count(network) / 1e6 == pytest.approx(published_millions, rel=0.03)


def test_preact_18_for_32_px_has_11_17_million_parameters():
    with torch.device("meta"):
        network = preact_resnet(18, nn.BatchNorm2d, num_classes=10, image_size=32)
    # 11,171,146 without the final norm, as github.com/kuangliu/pytorch-cifar builds it
    assert count(network) == 11_171_146 + 2 * 512


@pytest.mark.parametrize("depth", sorted(FORMS))
def test_the_depth_counts_the_convolutions_on_the_longest_path_and_the_linear_layer(depth):
    with torch.device("meta"):
        network = preact_resnet(depth, nn.BatchNorm2d, num_classes=10)
    convolutions = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    assert len([name for name in convolutions if "shortcut" not in name]) + 1 == depth


@pytest.mark.parametrize("depth, image_size, pixels", [(18, 224, 7), (18, 32, 4), (50, 64, 8), (20, 32, 8), (20, 8, 2)])
def test_the_resolution_before_pooling_fits_the_image_size(depth, image_size, pixels):
    network = preact_resnet(depth, nn.BatchNorm2d, num_classes=3, image_size=image_size, width=2)
    features = network.stages(network.stem(torch.randn(2, 3, image_size, image_size)))
    assert features.shape[2:] == (pixels, pixels)


@pytest.mark.parametrize("block", [PreActBlock, PreActBottleneck])
def test_every_convolution_of_a_branch_comes_after_norm_and_relu(block):
    unit = block(8, 8 // block.expansion, 1, nn.BatchNorm2d)
    events = []
    for name, module in unit.named_children():
        if name == "dropout":
            continue
        module.register_forward_hook(lambda *_, name=name: events.append(name))
        if name.startswith("conv"):
            module.register_forward_pre_hook(lambda _, inputs: events.append(bool((inputs[0] >= 0).all())))
    unit(torch.randn(4, 8, 5, 5))
    count = 2 if block is PreActBlock else 3
    assert events == [event for i in range(1, count + 1) for event in (f"norm{i}", True, f"conv{i}")]


def test_an_identity_shortcut_carries_the_input_itself():
    unit = PreActBlock(4, 4, 1, nn.BatchNorm2d)
    nn.init.zeros_(unit.conv2.weight)
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(unit(x), x, rtol=0, atol=0)


@pytest.mark.parametrize("stride, width, share", [(2, 4, False), (1, 8, False), (1, 4, True)])
def test_a_shortcut_that_shares_the_preactivation_carries_norm_relu_of_the_input(stride, width, share):
    unit = PreActBlock(4, width, stride, nn.BatchNorm2d, share_preactivation=share)
    nn.init.zeros_(unit.conv2.weight)
    x = torch.randn(3, 4, 6, 6)
    activated = nn.BatchNorm2d(4)(x).relu()
    torch.testing.assert_close(unit(x), activated if unit.shortcut is None else unit.shortcut(activated))


def test_the_first_unit_of_the_network_shares_and_the_others_of_its_shape_do_not():
    first_stage = preact_resnet(20, nn.BatchNorm2d, num_classes=10).stages[0]
    assert [unit.share_preactivation for unit in first_stage] == [True, False, False]


def test_the_last_stage_is_normalized_and_activated_before_pooling():
    network = preact_resnet(20, nn.BatchNorm2d, num_classes=10, width=4)
    seen = []
    network.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    network.head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(torch.randn(4, 3, 8, 8))
    normalized, pooled = seen
    torch.testing.assert_close(pooled, normalized.relu().mean((2, 3)))


@pytest.mark.parametrize("depth", [20, 164, 18])
@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, group_norm, nn.Identity])
def test_an_empty_batch_gives_empty_logits_and_zero_gradients(depth, norm_layer):
    network = preact_resnet(depth, norm_layer, num_classes=10, image_size=96 if depth == 18 else 32, width=4)
    logits = network(torch.empty(0, 3, 32, 32))
    logits.sum().backward()
    assert logits.shape == (0, 10)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in network.parameters())


def test_batchnorm_leaves_its_running_averages_alone_on_an_empty_batch():
    layer = nn.BatchNorm2d(3)
    layer(torch.randn(8, 3, 4, 4))
    before = layer.running_mean.clone(), layer.running_var.clone()
    layer(torch.empty(0, 3, 4, 4))
    torch.testing.assert_close((layer.running_mean, layer.running_var), before, rtol=0, atol=0)


def test_convolutions_have_a_bias_only_where_the_norm_shifts_nothing():
    for norm_layer, expected in ((nn.BatchNorm2d, False), (group_norm, False), (nn.Identity, True)):
        network = preact_resnet(20, norm_layer, num_classes=10, width=8)
        biases = [module.bias is not None for module in network.modules() if isinstance(module, nn.Conv2d)]
        assert set(biases) == {expected}


@pytest.mark.parametrize("num_channels, num_groups, expected", [(64, 32, 32), (16, 32, 16), (12, 8, 6), (7, 1, 1)])
def test_group_norm_takes_the_most_groups_that_divide_the_channels(num_channels, num_groups, expected):
    assert group_norm(num_channels, num_groups).num_groups == expected


def test_any_stages_can_be_built_and_an_unknown_depth_names_the_known_ones():
    network = PreActResNet(PreActBottleneck, (1, 2), 4, nn.BatchNorm2d, num_classes=5, in_channels=1)
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"depth must be one of \[18, 20, 34, .*\], got 19"):
        preact_resnet(19, nn.BatchNorm2d, num_classes=10)


@pytest.mark.parametrize("depth", [20, 164])
def test_zero_init_starts_every_unit_as_its_shortcut(depth):
    network = preact_resnet(depth, nn.BatchNorm2d, num_classes=3, width=4, zero_init=True)
    unit = network.stages[0][1]
    x = torch.randn(2, unit.norm1.num_features, 8, 8)
    assert torch.equal(unit(x), x)
    assert not torch.equal(preact_resnet(depth, nn.BatchNorm2d, num_classes=3, width=4).stages[0][1](x), x)


@pytest.mark.parametrize("order", ["bn_relu", "relu_bn"])
def test_the_order_of_norm_and_activation_is_an_option(order):
    network = preact_resnet(20, nn.BatchNorm2d, num_classes=3, width=4, order=order)
    pooled = []
    network.head.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    network(torch.randn(8, 3, 8, 8))
    # the batch mean is 0 right after normalization, and above 0 after the activation
    assert bool((pooled[0].mean(0).abs() < 1e-5).all()) == (order == "relu_bn")


def test_a_norm_that_activates_is_not_activated_again_and_gives_the_same():
    plain = preact_resnet(20, nn.BatchNorm2d, num_classes=3, width=4)
    fused = preact_resnet(20, lambda channels: batch_norm(channels, "relu"), num_classes=3, width=4)
    fused.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(fused(images), plain(images), rtol=1e-4, atol=1e-5)


def test_an_order_that_a_fused_norm_cannot_have_is_refused():
    with pytest.raises(ValueError, match=r"set norm\.activation=identity"):
        preact_resnet(20, lambda channels: batch_norm(channels, "relu"), num_classes=3, order="relu_bn")


def test_dropout_zeroes_values_before_the_last_convolution_in_training_alone():
    unit = PreActBlock(4, 4, 1, nn.BatchNorm2d, dropout=0.5)
    shares = []
    unit.conv2.register_forward_pre_hook(lambda module, inputs: shares.append(float((inputs[0] == 0).float().mean())))
    x = torch.randn(16, 4, 8, 8)
    unit(x)
    unit.eval()(x)
    assert shares[0] == pytest.approx(0.75, abs=0.05)  # half of them by ReLU
    assert shares[1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, group_norm, nn.Identity])
def test_a_fully_connected_network_takes_every_norm_and_an_empty_batch(norm_layer):
    network = MLP(norm_layer, num_classes=3, in_channels=1, image_size=8, widths=(6, 5), dropout=0.1)
    assert network(torch.randn(4, 1, 8, 8)).shape == (4, 3)
    assert network(torch.empty(0, 1, 8, 8)).shape == (0, 3)
    assert {layer.bias is not None for layer in network.layers} == {norm_layer is nn.Identity}


@pytest.mark.parametrize(
    "depth, options, units",
    [
        (20, {}, 17),  # of 19 norms: the first is read by an addition too, the last by the mean over pixels
        (50, {}, 48),
        (20, {"dropout": 0.5}, 8),
        (50, {"dropout": 0.5}, 32),
        (50, {"order": "relu_bn"}, 0),
    ],
)
def test_units_compute_what_their_modules_do(depth, options, units, monkeypatch):
    calls = []
    apply = NormActConvFunction.apply
    monkeypatch.setattr(NormActConvFunction, "apply", lambda *args: calls.append(1) or apply(*args))
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        network = preact_resnet(depth, SyncBatchNorm, num_classes=3, width=4, fused=fused, **options).double()
        torch.manual_seed(1)  # the same dropout masks
        logits = network(images)
        grads = torch.autograd.grad(logits.square().sum(), list(network.parameters()))
        found.append({"logits": logits.detach(), **network.state_dict(), **dict(enumerate(grads))})
        assert len(calls) == units
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
