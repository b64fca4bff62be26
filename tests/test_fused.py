"""Activation, residual, mask and temperature of the layer: on ranks, against the oracle."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from contract import ACTIVATIONS
from ranks import run_ranks

import syncbn
from syncbn import reference

SPLITS = {"one": (9,), "uneven": (2, 7), "empty": (5, 0, 4)}
SHAPE = (9, 4, 3, 2)


def rows(x: np.ndarray) -> np.ndarray:
    """Return (N, C, *S) as (N*S, C)."""
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


def oracle(batch: dict, activation: str, temperature: float) -> dict[str, np.ndarray]:
    """Return output and gradients as rows; a masked position is a row that never reaches the normalization."""
    x, grad_output = rows(batch["x"]), rows(batch["grad_output"])
    valid = np.ones(len(x), bool) if batch["mask"] is None else np.broadcast_to(
        batch["mask"], (SHAPE[0], 1, *SHAPE[2:])).ravel()  # fmt: skip
    function, derivative = ACTIVATIONS[activation]
    z = temperature * reference.batch_norm(x[valid], weight=batch["weight"], bias=batch["bias"]).output
    if batch["residual"] is not None:
        z = z + rows(batch["residual"])[valid]
    dz = grad_output[valid] * derivative(z)
    gradients = reference.batch_norm_backward(temperature * dz, x[valid], weight=batch["weight"])
    found = {name: np.zeros_like(x) for name in ("output", "grad_input", "grad_residual")}
    found["output"][valid] = function(z)
    found["grad_input"][valid] = gradients.grad_input
    found["grad_residual"][valid] = dz
    return found | {"grad_weight": gradients.grad_weight, "grad_bias": gradients.grad_bias}


def make_batch(*, with_residual: bool, with_mask: bool) -> dict[str, np.ndarray | None]:
    generator = np.random.default_rng(0)
    x, grad_output, residual = generator.normal(2, 3, (3, *SHAPE))
    weight, bias = generator.normal(size=(2, SHAPE[1]))
    mask = generator.random((SHAPE[0], 1, *SHAPE[2:])) < 0.6
    mask[:2] = False  # the first rank of the uneven split has no valid position
    return {
        "x": x,
        "grad_output": grad_output,
        "weight": weight,
        "bias": bias,
        "residual": residual if with_residual else None,
        "mask": mask if with_mask else None,
    }


def options() -> list[tuple[str, bool, bool, float]]:
    plain = list(itertools.product(ACTIVATIONS, (False, True), (False, True), (1.0,)))
    return [*plain, ("identity", False, False, 0.5), ("silu", True, True, 2.0)]


def take_steps(split: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    part = slice(sum(split[: dist.get_rank()]), sum(split[: dist.get_rank() + 1]))
    found = []
    for activation, with_residual, with_mask, temperature in options():
        batch = {
            name: None if value is None else torch.from_numpy(value[part] if value.ndim > 1 else value)
            for name, value in make_batch(with_residual=with_residual, with_mask=with_mask).items()
        }
        if with_mask:
            batch["x"] = batch["x"].masked_fill(~batch["mask"], torch.nan)  # padding may contain any value
        layer = syncbn.SyncBatchNorm(
            SHAPE[1], activation=activation, temperature=temperature, momentum=1.0, dtype=torch.float64
        )
        with torch.no_grad():
            layer.weight.copy_(batch["weight"])
            layer.bias.copy_(batch["bias"])
        x = batch["x"].requires_grad_()
        residual = None if batch["residual"] is None else batch["residual"].requires_grad_()
        y = layer(x, residual=residual, mask=batch["mask"])
        y.backward(batch["grad_output"])
        found.append(
            {
                "output": rows(y.detach().numpy()),
                "grad_input": rows(x.grad.numpy()),
                "grad_residual": None if residual is None else rows(residual.grad.numpy()),
                "grad_weight": layer.weight.grad.numpy(),
                "grad_bias": layer.bias.grad.numpy(),
                "running_mean": layer.running_mean.numpy(),
            }
        )
    return found


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_activation_residual_mask_and_temperature_equal_the_oracle_on_the_whole_batch(split):
    ranks = run_ranks(len(split), take_steps, split)
    for index, (activation, with_residual, with_mask, temperature) in enumerate(options()):
        batch = make_batch(with_residual=with_residual, with_mask=with_mask)
        expected = oracle(batch, activation, temperature)
        case = f"{activation}, residual={with_residual}, mask={with_mask}, {temperature=}"
        steps = [rank[index] for rank in ranks]
        for name in ("output", "grad_input", *(["grad_residual"] if with_residual else [])):
            actual = np.concatenate([step[name] for step in steps])
            np.testing.assert_allclose(actual, expected[name], rtol=0, atol=1e-11, err_msg=f"{name}: {case}")
        grad_weight = sum(step["grad_weight"] for step in steps) / temperature
        np.testing.assert_allclose(grad_weight * temperature, expected["grad_weight"], atol=1e-11, err_msg=case)
        np.testing.assert_allclose(sum(s["grad_bias"] for s in steps), expected["grad_bias"], atol=1e-11, err_msg=case)
        valid = np.ones(len(rows(batch["x"])), bool) if batch["mask"] is None else batch["mask"].ravel()
        for step in steps:
            np.testing.assert_allclose(step["running_mean"], rows(batch["x"])[valid].mean(0), atol=1e-12, err_msg=case)


@pytest.mark.parametrize("mask_shape", [(5, 1, 6), (1, 1, 6), (5, 1, 1), (6,), (1,)], ids=str)
def test_a_mask_broadcasts_over_channels_and_whatever_else_it_lacks(mask_shape):
    layer, x = syncbn.SyncBatchNorm(3, dtype=torch.float64), torch.randn(5, 3, 6, dtype=torch.float64)
    mask = torch.ones(mask_shape, dtype=torch.bool)
    mask[..., :1] = mask_shape[-1] == 1
    full = mask.expand(5, 1, 6)
    torch.testing.assert_close(layer(x, mask=mask), layer(x, mask=full), rtol=0, atol=1e-13)
    assert (layer(x, mask=mask)[~full.expand(5, 3, 6)] == 0).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_evaluation_applies_the_same_extras_to_running_statistics(activation, dtype):
    layer = syncbn.SyncBatchNorm(4, activation=activation, temperature=1.5, dtype=dtype)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.running_mean)
    layer.eval()
    x, residual = torch.randn(2, 6, 4, 5).to(dtype)
    mask = torch.rand(6, 1, 5) < 0.5
    state = {name: value.double().numpy() for name, value in layer.state_dict().items()}
    running = reference.RunningStats(state["running_mean"], state["running_var"])
    z = 1.5 * reference.batch_norm_eval(
        x.double().numpy(), running, weight=state["weight"], bias=state["bias"]
    ) + residual.double().numpy()  # fmt: skip
    expected = np.where(mask.numpy(), ACTIVATIONS[activation][0](z), 0)
    actual = layer(x, residual=residual, mask=mask).detach()
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual.double().numpy(), expected, atol=16 * torch.finfo(dtype).eps * np.abs(z).max())


def test_a_layer_with_extras_keeps_them_when_it_is_reverted():
    layer = syncbn.SyncBatchNorm(4, activation="relu", temperature=2.0)
    assert list(layer.state_dict()) == list(torch.nn.BatchNorm2d(4).state_dict())
    x, residual = torch.randn(2, 6, 4, 5)
    for training in (True, False):
        expected = layer.train(training)(x, residual)
        syncbn.revert_sync_batchnorm(layer)
        torch.testing.assert_close(layer(x, residual), expected)
        syncbn.convert_sync_batchnorm(layer)
    assert "activation=relu, temperature=2.0" in repr(layer)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"residual": torch.zeros(4, 3)}, r"expected a residual like the input, \(4, 3, 2\) of torch.float32"),
        ({"residual": torch.zeros(4, 3, 2).double()}, "of torch.float64: expand or convert it"),
        ({"mask": torch.ones(4, 1, 2)}, r"expected a mask of torch.bool that broadcasts to \(4, 1, 2\)"),
        ({"mask": torch.ones(4, 3, 2).bool()}, r"got \(4, 3, 2\) of torch.bool"),
        ({"mask": torch.ones(1, 4, 1, 2).bool()}, r"got \(1, 4, 1, 2\) of torch.bool"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_or_mask_that_does_not_fit_is_refused(arguments, message, training):
    with pytest.raises(ValueError, match=message):
        syncbn.SyncBatchNorm(3).train(training)(torch.randn(4, 3, 2), **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"activation": "selu"},
            "expected activation to be one of identity, relu, leaky_relu, silu, relu6, gelu, hardswish",
        ),
        ({"temperature": 0.0}, "expected temperature above 0, got 0.0"),
    ],
)
def test_unknown_activations_and_temperatures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        syncbn.SyncBatchNorm(3, **arguments)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Sums the storages that autograd saves, each storage once, without parameters."""

    def __init__(self, *known: torch.Tensor):
        self.storages: dict[int, int] = {}
        known_storages = {tensor.untyped_storage().data_ptr() for tensor in known}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known_storages:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_kept_for_backward_is_the_input_and_a_few_values_per_channel(activation, dtype):
    layer = syncbn.SyncBatchNorm(64, activation=activation)
    source = torch.randn(8, 64, 16, 16, dtype=dtype, requires_grad=True)
    x = source * 2
    saved = SavedBytes(*layer.parameters())
    with saved:
        layer(x)
    assert sum(saved.storages.values()) <= x.nbytes + 8 * (5 * 64 + 1)  # float64: count, mean, invstd, coefficients


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_whatever_stands_behind_a_mask_reaches_no_output_and_no_gradient(training, create_graph):
    layer = syncbn.SyncBatchNorm(3, activation="silu").train(training)
    mask = torch.tensor([True, True, False, True]).view(4, 1)
    cotangent = torch.randn(4, 3)

    def results(hidden: float) -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, residual = torch.randn(2, 4, 3)
        x[2], residual[2] = hidden, hidden
        leaves = [x.requires_grad_(), residual.requires_grad_(), layer.weight, layer.bias]
        y = layer(x, residual, mask)
        return [y, *torch.autograd.grad(y, leaves, cotangent, create_graph=create_graph)]

    for spoiled, clean in zip(results(float("nan")), results(0.0), strict=True):
        torch.testing.assert_close(spoiled, clean)


@pytest.mark.parametrize("name", ["residual", "mask"])
def test_a_residual_or_mask_elsewhere_is_refused(name):
    tensors = {"residual": torch.empty(4, 3, device="meta"), "mask": torch.ones(4, 1, dtype=bool, device="meta")}
    with pytest.raises(ValueError, match=f"expected a {name} on cpu like the input, got meta: move it"):
        syncbn.SyncBatchNorm(3)(torch.randn(4, 3), **{name: tensors[name]})
