"""The contract of the verbs: every backend, on parts of the batch or the whole of it, against the oracle."""

import numpy as np
import pytest
import torch

from syncbn import backends, reference
from syncbn.backends import torch_ops
from syncbn.statistics import Channels

BACKENDS = {"torch": torch_ops}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=[1, 300, 2**17], ids=["sample_by_sample", "parts", "whole"])
def part_elements(request, monkeypatch):
    monkeypatch.setattr(torch_ops, "PART_ELEMENTS", request.param)


@pytest.mark.usefixtures("part_elements")
@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_the_verbs_in_turn_are_a_training_step(backend, layout, dtype, with_mask, activation):
    x, grad_output, residual = torch.randn(3, 7, 5, 4, 6)
    x = 5 + x
    x, grad_output, residual = (t.to(dtype).contiguous(memory_format=layout) for t in (x, grad_output, residual))
    weight, bias = torch.randn(2, 5, dtype=torch.promote_types(dtype, torch.float32))
    mask = (torch.rand(7, 1, 4, 6) < 0.7) if with_mask else None

    count, mean, M2 = backend.batch_norm_stats(x, mask)
    channels = Channels(mean, (M2 / count + 1e-5).rsqrt(), weight, bias)
    y = backend.batch_norm_elemt(x, channels, residual=residual, mask=mask, activation=activation)
    dy = backend.batch_norm_activation_backward(
        grad_output, x, channels, residual=residual, mask=mask, activation=activation
    )
    sum_dy, sum_dy_xmu = backend.batch_norm_backward_reduce(dy, x, channels, mask=mask)
    grad_input = backend.batch_norm_backward_elemt(
        dy, x, channels, mask=mask, count=count, sum_dy=sum_dy, sum_dy_xmu=sum_dy_xmu
    )

    def rows(tensor: torch.Tensor) -> np.ndarray:
        return tensor.double().movedim(1, -1).reshape(-1, 5).numpy()

    valid = np.ones(7 * 24, bool) if mask is None else mask.flatten().numpy()
    forward = reference.batch_norm(rows(x)[valid], weight=weight.numpy(), bias=bias.numpy())
    z = forward.output + rows(residual)[valid]
    expected_y = np.maximum(z, 0) if activation == "relu" else z
    expected_dy = rows(grad_output)[valid] * ((z > 0) if activation == "relu" else 1)
    gradients = reference.batch_norm_backward(expected_dy, rows(x)[valid], weight=weight.numpy())
    accumulated = 200 * torch.finfo(weight.dtype).eps
    unit = torch.finfo(dtype).eps
    assert count.item() == valid.sum()
    np.testing.assert_allclose(mean, forward.mean, rtol=accumulated)
    np.testing.assert_allclose(M2 / count, forward.var, rtol=accumulated)
    np.testing.assert_allclose(sum_dy, gradients.grad_bias, atol=100 * accumulated)
    np.testing.assert_allclose(sum_dy_xmu * channels.invstd, gradients.grad_weight, atol=100 * accumulated)
    for actual, expected in ((y, expected_y), (dy, expected_dy), (grad_input, gradients.grad_input)):
        np.testing.assert_allclose(rows(actual)[valid], expected, rtol=unit, atol=accumulated)
        assert (rows(actual)[~valid] == 0).all()
        assert actual.dtype == dtype
        assert actual.is_contiguous(memory_format=layout)


def test_parts_cover_the_batch_once_and_stay_small():
    for shape in [(1000, 64, 8, 8), (3, 2**17), (5, 2**18), (70000, 7)]:
        x = torch.empty(shape)
        covered = torch.zeros(shape[0], dtype=torch.int64)
        for part in torch_ops._parts(x):
            covered[part] += 1
            assert x[part].numel() <= max(torch_ops.PART_ELEMENTS, x[0].numel())
        assert (covered == 1).all()


def test_select_returns_a_backend_with_all_verbs():
    backend = backends.select(torch.empty(2, 3))
    verbs = [name for name in vars(backends.Backend) if name.startswith("batch_norm_")]
    assert len(verbs) == 5
    assert all(callable(getattr(backend, verb)) for verb in verbs)
