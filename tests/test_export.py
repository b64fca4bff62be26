"""Evaluation exports as plain batch normalization, and folds into the convolution before it."""

import pytest
import torch
import torch.fx.experimental.optimization
import torchvision
from torch import nn

import syncbn


def trained_network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    model(torch.randn(16, 3, 8, 8) + 1)
    return model.eval()


def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_torch_export_contains_torchs_batch_norm_and_nothing_that_communicates():
    model = syncbn.convert_sync_batchnorm(trained_network())
    exported = torch.export.export(model, (image(),))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert sum("batch_norm" in name for name in called) == 2
    assert not any("c10d" in name or "reduce" in name for name in called)
    torch.testing.assert_close(exported.module()(image()), model(image()), rtol=0, atol=0)


def test_torch_export_takes_any_batch_size():
    model = syncbn.convert_sync_batchnorm(trained_network())
    exported = torch.export.export(model, (image(),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(exported.module()(x), model(x), rtol=0, atol=1e-6)


def test_jit_trace_contains_torchs_batch_norm():
    model = syncbn.convert_sync_batchnorm(trained_network())
    traced = torch.jit.trace(model, image())
    assert str(traced.inlined_graph).count("aten::batch_norm") == 2
    torch.testing.assert_close(traced(image()), model(image()), rtol=0, atol=0)


def test_onnx_contains_plain_batch_normalization_only():
    pytest.importorskip("onnxscript")
    model = syncbn.convert_sync_batchnorm(trained_network())
    program = torch.onnx.export(model, (image(),), dynamo=True, verbose=False, optimize=False)
    operators = [node.op_type for node in program.model.graph]
    assert operators.count("BatchNormalization") == 2
    assert set(operators) <= {"Conv", "BatchNormalization", "Relu", "Constant", "Identity"}
    domains = {node.domain for node in program.model.graph}
    assert domains == {""}


def test_the_reverted_model_evaluates_bit_for_bit_as_the_converted_one():
    model = syncbn.convert_sync_batchnorm(trained_network())
    expected = model(image())
    assert torch.equal(syncbn.revert_sync_batchnorm(model)(image()), expected)
    assert torch.equal(torch.export.export(model, (image(),)).module()(image()), expected)


def test_a_reverted_network_folds_into_its_convolutions_with_torchs_own_fuser():
    torch.manual_seed(0)
    model = syncbn.convert_sync_batchnorm(torchvision.models.resnet18(num_classes=7))
    model(torch.randn(4, 3, 48, 48))
    syncbn.revert_sync_batchnorm(model).eval()
    x = torch.randn(2, 3, 48, 48)
    folded = torch.fx.experimental.optimization.fuse(model)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in folded.modules())
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


def test_fused_extras_export_too():
    layer = syncbn.SyncBatchNorm(3, activation="silu", temperature=0.5).eval()
    x, residual = torch.randn(2, 4, 3, 5)
    exported = torch.export.export(layer, (x, residual))
    torch.testing.assert_close(exported.module()(x, residual), layer(x, residual))


def test_scripting_works_after_reverting():
    model = syncbn.revert_sync_batchnorm(syncbn.convert_sync_batchnorm(trained_network()))
    torch.testing.assert_close(torch.jit.script(model)(image()), model(image()))
