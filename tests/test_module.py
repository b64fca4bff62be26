"""SyncBatchNorm in one process: a drop-in for torch's BatchNorm layers."""

import inspect
import io
import itertools
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import syncbn
from syncbn import reference

PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(6, 4), (6, 4, 5), (6, 4, 3, 5), (6, 4, 2, 3, 5)]


def test_the_constructor_takes_the_arguments_of_torchs_layer():
    ours = list(inspect.signature(syncbn.SyncBatchNorm).parameters)
    theirs = list(inspect.signature(nn.SyncBatchNorm).parameters)
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"bias": False}, {"momentum": None}, {"momentum": 0.0}, {"track_running_stats": False}],
    ids=str,
)
def test_without_ranks_it_trains_and_evaluates_as_the_plain_layer(shape, options):
    layer = syncbn.SyncBatchNorm(4, dtype=torch.float64, **options)
    plain = PLAIN[len(shape)](4, dtype=torch.float64, **{k: v for k, v in options.items() if k != "bias"})
    if options.get("bias") is False:
        plain.register_parameter("bias", None)
    for parameter, ours in zip(plain.parameters(), layer.parameters(), strict=True):
        nn.init.normal_(parameter)
        ours.data.copy_(parameter)
    for training in (True, True, False):
        layer.train(training)
        plain.train(training)
        x, grad_output = torch.randn(2, *shape, dtype=torch.float64)
        results = []
        for module in (layer, plain):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(grad_output)
            results.append([y, leaf.grad, *(p.grad for p in module.parameters()), *module.state_dict().values()])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_state_dicts_travel_between_ours_and_the_plain_layer_both_ways(options):
    layer, plain = syncbn.SyncBatchNorm(4, **options), nn.BatchNorm2d(4, **options)
    layer(torch.randn(5, 4, 2, 2))
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict(), strict=True)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, layer.state_dict()[name])
    syncbn.SyncBatchNorm(4, **options).load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_the_output_has_the_dtype_of_the_input_also_with_half_precision_parameters(dtype, training):
    layer = syncbn.SyncBatchNorm(4, dtype=dtype).train(training)
    x = torch.randn(6, 4, 3, 3).to(dtype).requires_grad_()
    y = layer(x)
    grad_output = torch.randn(6, 4, 3, 3).to(dtype)
    y.backward(grad_output)
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == layer.running_var.dtype == dtype
    if training:
        expected = reference.batch_norm(x.detach().double().numpy())
        error = np.abs(y.detach().double().numpy() - expected.output)
        assert (error <= torch.finfo(dtype).eps * np.abs(expected.output) + 1e-6).all()


def test_half_precision_activations_go_with_float32_parameters():
    layer = syncbn.SyncBatchNorm(4)
    for dtype in (torch.float16, torch.bfloat16):
        for training in (True, False):
            layer.train(training)
            assert layer(torch.randn(6, 4, 3, 3).to(dtype)).dtype == dtype
    assert layer.running_mean.dtype == torch.float32


def test_autocast_hands_it_bfloat16_and_it_computes_statistics_in_float32():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), syncbn.SyncBatchNorm(4))
    x = torch.randn(8, 3, 5, 5) + 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        convolved = model[0](x)
        y = model[1](convolved)
    assert convolved.dtype == y.dtype == torch.bfloat16
    expected = reference.batch_norm(convolved.detach().double().numpy())
    np.testing.assert_allclose(y.detach().double().numpy(), expected.output, rtol=2**-8, atol=1e-5)
    y.backward(torch.randn_like(y))
    assert model[0].weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(6, 3, 5, 4).permute(0, 3, 1, 2),
        torch.randn(6, 8, 5, 3)[:, ::2],
        torch.randn(12, 4, 5, 3)[1::2, :, 1:, :-1],
        torch.randn(1, 4, 1, 1).expand(6, 4, 5, 3),
        torch.randn(5, 4, 6).transpose(0, 2),
    ],
    ids=["permuted", "every_second_channel", "sliced", "expanded", "transposed"],
)
def test_views_of_any_strides_give_what_their_contiguous_copy_gives(x):
    layer = syncbn.SyncBatchNorm(4)
    grad_output = torch.randn(x.shape)
    results = []
    for source in (x, x.contiguous()):
        leaf = source.detach().requires_grad_()
        y = layer(leaf)
        y.backward(grad_output)
        results.append((y, leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=4e-6, atol=2e-6)


@pytest.mark.parametrize("shape", [(0, 4), (0, 4, 5, 5), (3, 4, 0), (3, 4, 5, 0)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_passes_through_and_moves_no_statistics(shape, training):
    layer = syncbn.SyncBatchNorm(4).train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.empty(shape, requires_grad=True)
    y = layer(x)
    y.backward(torch.empty(shape))
    assert y.shape == x.grad.shape == shape
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0] * 4
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("frozen", ["weight", "bias", "input", "weight bias", "input weight", "input bias"])
def test_frozen_tensors_get_no_gradient_and_the_others_stay_exact(frozen):
    layer = syncbn.SyncBatchNorm(4, dtype=torch.float64)
    x, grad_output = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    leaves = {"input": x.clone().requires_grad_(), "weight": layer.weight, "bias": layer.bias}
    for name in frozen.split():
        leaves[name].requires_grad_(False)
    layer(leaves["input"]).backward(grad_output)
    gradients = reference.batch_norm_backward(grad_output.numpy(), x.numpy())
    for name, expected in zip(("input", "weight", "bias"), gradients, strict=True):
        if name in frozen:
            assert leaves[name].grad is None
        else:
            np.testing.assert_allclose(leaves[name].grad.numpy(), expected, atol=1e-12)


def test_gradients_pass_gradcheck():
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)

    def normalize(x, weight, bias):
        return syncbn.sync_batch_norm(x, None, None, weight, bias, training=True)

    assert torch.autograd.gradcheck(normalize, (x, layer.weight, layer.bias))


def test_two_forward_passes_before_one_backward_pass_are_independent():
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    grad_output = torch.randn(2, 5, 3, dtype=torch.float64)
    first, second = layer(x[0]), layer(x[1])
    torch.autograd.backward([first, second], list(grad_output))
    for part in range(2):
        expected = reference.batch_norm_backward(grad_output[part].numpy(), x[part].detach().numpy())
        np.testing.assert_allclose(x.grad[part].numpy(), expected.grad_input, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_functional_form_equals_torchs(training):
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    weight, bias = torch.randn(2, 4, dtype=torch.float64)
    running = [torch.zeros(2, 4, dtype=torch.float64) + 0.5 for _ in range(2)]
    ours = syncbn.sync_batch_norm(x, *running[0], weight, bias, training, 0.3, 1e-3)
    theirs = nn.functional.batch_norm(x, *running[1], weight, bias, training, 0.3, 1e-3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(running[0], running[1], rtol=0, atol=1e-12)


def test_the_functional_form_works_without_running_statistics_and_parameters():
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    y = syncbn.sync_batch_norm(x, None, None, training=True)
    np.testing.assert_allclose(y.numpy(), reference.batch_norm(x.numpy()).output, atol=1e-12)


def test_a_constant_channel_yields_the_bias_also_without_eps():
    layer = syncbn.SyncBatchNorm(2, eps=0.0)
    nn.init.constant_(layer.bias, 3.0)
    assert (layer(torch.full((4, 2, 5), 7.0)) == 3).all()


def test_reset_parameters_returns_to_the_initial_state_also_without_bias():
    layer = syncbn.SyncBatchNorm(3, bias=False)
    nn.init.normal_(layer.weight)
    layer(torch.randn(5, 3))
    layer.reset_parameters()
    fresh = syncbn.SyncBatchNorm(3, bias=False).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in layer.state_dict().items())


def test_importing_the_package_imports_neither_triton_nor_lightning_nor_hydra():
    code = "import sys, syncbn; print(*({'triton', 'lightning', 'hydra', 'train'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_a_bias_may_change_between_forward_and_backward_if_no_activation_follows():
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.bias.add_(1)
    y.square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, 2 * y.detach().sum(0))


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[:1].expand_as(t),
}


# torch 2.14 on CPU is wrong for x of shape (4, 17, 6, 1), channels last, and a contiguous gradient
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 17, 6, 1), (4, 3, 5), (3, 4, 1, 5), (2, 3, 2, 3, 1), (6, 5), (5, 1, 3)], ids=str)
def test_gradients_are_right_for_every_pair_of_layouts(shape, training):
    for (own, of_x), (other, of_gradient) in itertools.product(LAYOUTS.items(), repeat=2):
        if own == "expanded":  # a constant over the batch
            continue
        x, grad_output = of_x(torch.randn(shape)), of_gradient(torch.randn(shape))
        layer = syncbn.SyncBatchNorm(shape[1]).train(training)
        for tensor in (layer.running_mean, layer.weight, layer.bias):
            torch.nn.init.normal_(tensor)
        running = reference.RunningStats(layer.running_mean.double().numpy(), layer.running_var.double().numpy())
        leaf = x.detach().requires_grad_()
        grads = torch.autograd.grad(layer(leaf), [leaf, layer.weight, layer.bias], grad_output)
        whole, gradient = x.contiguous().double().numpy(), grad_output.contiguous().double().numpy()
        weight = layer.weight.detach().double().numpy()
        if training:
            expected = reference.batch_norm_backward(gradient, whole, weight=weight)
        else:
            expected = reference.batch_norm_eval_backward(gradient, whole, running=running, weight=weight)
        for name, found, wanted in zip(expected._fields, grads, expected, strict=True):
            scale = 1 + np.abs(wanted).max()
            np.testing.assert_allclose(found / scale, wanted / scale, atol=2e-5, err_msg=f"{name}: {own}, {other}")


def test_an_output_of_evaluation_does_not_keep_its_input():
    layer = syncbn.convert_sync_batchnorm(torch.nn.BatchNorm2d(3)).eval()
    x = torch.randn(4, 3, 8, 8)
    memory = weakref.ref(x)
    y = layer(x)
    y.sum().backward()
    del x
    assert memory() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(y, io.BytesIO())


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("size", [1, 5])
def test_a_tensor_of_the_wrong_size_is_refused_before_the_statistics_move(name, size):
    layer = syncbn.SyncBatchNorm(3)
    old = getattr(layer, name)
    setattr(layer, name, torch.nn.Parameter(torch.ones(size)) if name in ("weight", "bias") else torch.ones(size))
    with pytest.raises(ValueError, match=rf"expected {name} of shape \(3,\), got \({size},\)"):
        layer(torch.randn(4, 3))
    setattr(layer, name, old)
    assert layer.num_batches_tracked == 0
