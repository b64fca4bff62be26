"""The contract of a backend's ops against the oracle: for pytest, and for `scripts/gpu_check.py` on CUDA.

`check_training_step` builds a batch, runs the four ops on each part of it like the ranks of a group, and compares
the results with the oracle on the whole batch.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

import syncbn
from syncbn import reference
from syncbn.backends import Backend
from syncbn.statistics import Epilogue, OutputMask, Reduced, Running, match_layout, unpack_sums

EPS = 1e-5
_normal_cdf = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))), otypes=[float])
ACTIVATIONS = {  # function and derivative, in NumPy
    "identity": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(float)),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), lambda z: np.where(z > 0, 1, 0.01)),
    "silu": (lambda z: z / (1 + np.exp(-z)), lambda z: (1 + z * (1 - 1 / (1 + np.exp(-z)))) / (1 + np.exp(-z))),
    "relu6": (lambda z: np.clip(z, 0, 6), lambda z: ((z > 0) & (z < 6)).astype(float)),
    "gelu": (lambda z: z * _normal_cdf(z), lambda z: _normal_cdf(z) + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)),
    "hardswish": (
        lambda z: z * np.clip(z + 3, 0, 6) / 6,
        lambda z: np.where(z <= -3, 0, np.where(z >= 3, 1, z / 3 + 0.5)),
    ),
}
KINKS = {"relu": (0,), "leaky_relu": (0,), "relu6": (0, 6), "hardswish": (-3, 3)}  # their derivative jumps there


class Case(NamedTuple):
    shape: tuple[int, ...] = (7, 5, 4, 6)
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    activation: str = "relu"
    residual: bool = True
    needs_dy: bool = True
    needs_y: bool = False  # whether backward computes the output again
    mask: bool = False
    mean: float = 5.0  # mean of x; its standard deviation is 1
    affine: bool = True
    scale: float = 1.0  # standard deviation of the weight
    momentum: float | None = 0.1
    split: tuple[int, ...] = ()  # batch sizes of several ranks; empty: one rank

    def __str__(self) -> str:
        """Return the shape and what differs from the default."""
        changes = [f"{name}={getattr(self, name)}" for name in self._fields[1:]
                   if getattr(self, name) != self._field_defaults[name]]  # fmt: skip
        return " ".join(["x".join(map(str, self.shape)), *changes]).replace("torch.", "")


CASES = [
    Case(),
    Case(needs_y=True),
    Case(mask=True),
    Case(mask=True, needs_dy=False, needs_y=True),
    Case(channels_last=True, needs_y=True),
    Case(channels_last=True, mask=True, activation="silu"),
    Case(activation="identity", residual=False, needs_dy=False, needs_y=True),
    Case(activation="identity", residual=False),
    Case(activation="identity", mask=True, needs_dy=False),
    Case(activation="leaky_relu", residual=False, affine=False),
    Case(activation="silu", residual=False, needs_dy=False, momentum=None),
    Case(activation="leaky_relu", needs_dy=False, channels_last=True),
    Case(dtype=torch.bfloat16, split=(3, 0, 4), needs_y=True),
    Case(dtype=torch.bfloat16, channels_last=True, residual=False, momentum=None, split=(1, 6)),
    Case(dtype=torch.float16, activation="silu", split=(2, 5), mask=True),
    Case(dtype=torch.float16, channels_last=True, activation="identity", needs_dy=True, needs_y=True),
    Case(mean=0.5),
    Case(mean=-0.5, activation="silu", residual=False, needs_dy=False, split=(5, 2)),
    Case((13, 3), residual=False),
    Case((13, 3), split=(4, 9), activation="silu"),
    Case((70, 40), mask=True),
    Case((3, 1, 5), channels_last=True),
    Case((3, 2, 70), dtype=torch.bfloat16, split=(1, 2), needs_dy=False),
    Case((4, 6, 1, 1), activation="leaky_relu"),
    Case((2, 3, 2, 3, 2), channels_last=True, split=(1, 1)),
    Case((2, 9, 3, 3, 3), mask=True, residual=False),
    Case((2, 3, 64, 40), split=(1, 1), needs_y=True),
    Case((2, 3, 64, 40), mean=0.5, residual=False, needs_dy=False),
    Case((5, 6, 13, 31), channels_last=True, needs_dy=False),
    *(Case((4, 3, 9, 8), activation=name, scale=4.0, needs_y=True) for name in ("relu6", "gelu", "hardswish")),
]


def rows(tensor: torch.Tensor) -> np.ndarray:
    """Return (N, C, *S) as (N*S, C) in float64."""
    return tensor.detach().double().cpu().movedim(1, -1).reshape(-1, tensor.shape[1]).numpy()


def in_layout(tensor: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else tensor.contiguous()


class Batch(NamedTuple):
    """Operands of a training step on the whole batch."""

    x: torch.Tensor  # NaN where masked
    grad_output: torch.Tensor
    residual: torch.Tensor | None
    mask: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running: Running


class Results(NamedTuple):
    """Results of a training step; by rank, if ranks differ."""

    xs: list[torch.Tensor]
    ys: list[torch.Tensor]
    grad_inputs: list[torch.Tensor]
    reduced: list[Reduced]
    sums: torch.Tensor
    count: torch.Tensor
    mean: torch.Tensor
    invstd: torch.Tensor


def check_training_step(backend: Backend, case: Case, device: str = "cpu") -> None:
    """Run the ops of forward and backward on the parts of a batch; compare with the oracle on the whole batch."""
    batch = build(case, device)
    expected = expected_of(case, batch)
    compare(case, batch, run(backend, case, batch), expected)


def build(case: Case, device: str) -> Batch:
    """Return random operands of a case."""
    generator = torch.Generator().manual_seed(0)
    N, C = case.shape[:2]
    x, grad_output, residual = torch.randn(3, *case.shape, generator=generator)
    x, grad_output, residual = (
        in_layout(tensor.to(device, case.dtype), channels_last=case.channels_last)
        for tensor in (x + case.mean, grad_output, residual)
    )
    dtype = torch.promote_types(case.dtype, torch.float32)
    weight, bias = torch.randn(2, C, generator=generator).to(device, dtype)
    weight = weight * case.scale
    mask = (torch.rand(N, 1, *case.shape[2:], generator=generator) < 0.7).to(device)
    zeros, ones = (torch.full((C,), value, dtype=dtype, device=device) for value in (0, 1))
    return Batch(
        in_layout(torch.where(mask, x, torch.nan), channels_last=case.channels_last) if case.mask else x,
        grad_output,
        residual if case.residual else None,
        mask if case.mask else None,
        weight if case.affine else None,
        bias if case.affine else None,
        Running(zeros, ones, torch.tensor(3, device=device), case.momentum),
    )


def run(backend: Backend, case: Case, batch: Batch) -> Results:
    """Run the four ops on each part of the batch, with sums over the parts in place of all-reduces."""
    sizes = case.split or case.shape[:1]
    parts = [
        slice(start, start + size) for start, size in zip(np.cumsum((0, *sizes[:-1])).tolist(), sizes, strict=True)
    ]
    xs = [in_layout(batch.x[part], channels_last=case.channels_last) for part in parts]
    epilogues = [
        Epilogue(
            *(None if tensor is None else tensor[part] for tensor in (batch.residual, batch.mask)), case.activation
        )
        for part in parts
    ]
    packed = sum(backend.pack_stats(x, epilogue.mask) for x, epilogue in zip(xs, epilogues, strict=True))
    ys = []
    for x, epilogue in zip(xs, epilogues, strict=True):
        own = None if ys else batch.running  # only those of the first rank are compared
        y, count, channels = backend.normalize(
            x, packed, batch.weight, batch.bias, epilogue, eps=EPS, ranks=len(xs), running=own
        )
        ys.append(y)
    output_mask = OutputMask(case.affine, case.affine, case.needs_dy, case.needs_y)
    grads = [match_layout(batch.grad_output[part], x) for part, x in zip(parts, xs, strict=True)]
    operands = [(grad, x, channels, epilogue) for grad, x, epilogue in zip(grads, xs, epilogues, strict=True)]
    reduced = [backend.backward_reduce(*operand, output_mask) for operand in operands]
    sums = sum(own.sums for own in reduced)
    grad_inputs = [
        backend.backward_elemt(*operand, own._replace(sums=sums), count=count)
        for operand, own in zip(operands, reduced, strict=True)
    ]
    return Results(xs, ys, grad_inputs, reduced, sums, count, channels.mean, channels.invstd)


def compare(case: Case, batch: Batch, results: Results, expected: dict[str, Any]) -> None:
    """Compare every result with the oracle's; tolerances follow from the dtype."""
    valid, smooth = expected["valid"], expected["smooth"]
    accumulated = 200 * torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps
    unit = torch.finfo(case.dtype).eps
    largest_dy = np.abs(expected["dy"]).max()
    # an op rounds dy, unless it is grad_output or 0
    rounding = 0 if case.activation in ("identity", "relu") else unit * largest_dy
    slack = (~smooth).sum() * largest_dy  # at a kink of the activation, the result depends on rounding

    assert results.count.item() == valid.sum()
    invstd = 1 / np.sqrt(expected["var"] + EPS)
    running = {f"running {name}": getattr(batch.running, name) for name in ("mean", "var")}
    for name, actual, wanted in (
        ("mean", results.mean, expected["mean"]),
        ("invstd", results.invstd, invstd),
        ("running mean", running["running mean"], expected["running"].running_mean),
        ("running var", running["running var"], expected["running"].running_var),
    ):
        np.testing.assert_allclose(actual.cpu(), wanted, rtol=accumulated, err_msg=name)
    assert batch.running.num_batches_tracked.item() == expected["running"].num_batches_tracked

    atol = 100 * accumulated + rounding * np.sqrt(len(valid)) + 6 * slack
    sum_dy, sum_dy_xmu = unpack_sums(results.sums)
    assert results.sums[0] == 0
    np.testing.assert_allclose(sum_dy.cpu(), expected["grad_bias"], atol=atol)
    np.testing.assert_allclose((sum_dy_xmu * results.invstd).cpu(), expected["grad_weight"], atol=atol)
    for name in ("grad_weight", "grad_bias"):
        own = [getattr(part, name) for part in results.reduced]
        if case.affine:
            np.testing.assert_allclose(sum(own).cpu(), expected[name], atol=atol, err_msg=name)
        else:
            assert own == [None] * len(own)

    found = {"y": results.ys, "grad_input": results.grad_inputs}
    found |= {"dy": [part.dy for part in results.reduced]} if case.needs_dy else {}
    found |= {"y again": [part.y for part in results.reduced]} if case.needs_y else {}
    for name, tensors in found.items():
        actual = np.concatenate([rows(tensor) for tensor in tensors])
        tolerance, compared = accumulated, np.ones_like(smooth)
        if name not in ("y", "y again"):
            tolerance += (2 * rounding + 12 * slack / len(valid)) * max(np.abs(expected["scale"]).max(), 1)
            compared = smooth
        np.testing.assert_allclose(
            actual[valid][compared],
            expected[name.removesuffix(" again")][compared],
            rtol=unit,
            atol=tolerance,
            err_msg=name,
        )
        assert (actual[~valid] == 0).all(), name
        for tensor, x in zip(tensors, results.xs, strict=True):
            assert tensor.dtype == case.dtype
            assert x.numel() == 0 or tensor.stride() == x.stride(), name


def expected_of(case: Case, batch: Batch) -> dict[str, Any]:
    """Return the oracle's results for the whole batch, one row per valid position."""
    function, derivative = ACTIVATIONS[case.activation]
    x, grad_output = rows(batch.x), rows(batch.grad_output)
    valid = np.ones(len(x), bool) if batch.mask is None else batch.mask.flatten().cpu().numpy()
    weight, bias = (None if p is None else p.double().cpu().numpy() for p in (batch.weight, batch.bias))
    forward = reference.batch_norm(x[valid], weight=weight, bias=bias, eps=EPS)
    z = forward.output + (0 if batch.residual is None else rows(batch.residual)[valid])
    dy = grad_output[valid] * derivative(z)
    gradients = reference.batch_norm_backward(dy, x[valid], weight=weight, eps=EPS)
    C = x.shape[1]
    running = reference.update_running_stats(
        reference.RunningStats(np.zeros(C), np.ones(C), 3),
        mean=forward.mean, var=forward.var, count=forward.count, momentum=case.momentum,
    )  # fmt: skip
    return {
        "valid": valid,
        "smooth": np.all([np.abs(z - kink) > 1e-5 for kink in KINKS.get(case.activation, (np.inf,))], axis=0),
        "mean": forward.mean, "var": forward.var, "running": running,
        "scale": forward.invstd * (1 if weight is None else weight),
        "y": function(z), "dy": dy, **gradients._asdict(),
    }  # fmt: skip


def check_variance(backend: Backend, mean: float, std: float, shape: tuple[int, ...], device: str = "cpu") -> float:
    """Return the largest relative error of the variance of float32 data, over channels, layouts and 1 or 2 ranks."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).float()
    expected = rows(x).var(0)
    errors = []
    for channels_last in (False, True):
        own = in_layout(x.to(device), channels_last=channels_last)
        for parts in ((slice(None),), (slice(0, 1), slice(1, None))):
            packed = sum(backend.pack_stats(own[part], None) for part in parts)
            _, _, channels = backend.normalize(
                own, packed, None, None, Epilogue(), eps=0.0, ranks=len(parts), running=None
            )
            errors.append(np.abs(channels.invstd.cpu().numpy() ** -2 / expected - 1).max())
    return float(max(errors))


def _layer(**arguments: Any) -> syncbn.SyncBatchNorm:
    return syncbn.SyncBatchNorm(5, **arguments)


def _unit(**arguments: Any) -> syncbn.NormActConv:
    return syncbn.NormActConv(_layer(**arguments), torch.nn.Conv2d(5, 5, 3, padding=1))


LAYERS = {  # module, whether with a residual, whether with a mask
    "plain": (_layer, False, False),
    "relu": (partial(_layer, activation="relu"), True, False),
    "masked": (partial(_layer, activation="silu", momentum=None, temperature=1.5), True, True),
    "no weight": (partial(_layer, activation="leaky_relu", affine=False), False, True),
    "no bias": (partial(_layer, bias=False), True, False),
    "unit": (partial(_unit, activation="relu"), False, False),
    "masked unit": (partial(_unit, activation="gelu"), True, True),
}


def train_layers(
    rank: int, sizes: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> dict[str, dict[str, torch.Tensor]]:
    """Return results of two steps of each layer; the second step has an expanded gradient and another layout."""
    found = {}
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for name, (make, with_residual, with_mask) in LAYERS.items():
        torch.manual_seed(0)
        layer = make().to(device, dtype)
        x, residual = torch.randn(2, sum(sizes), 5, 4, 3).to(device, dtype)
        mask = (torch.rand(sum(sizes), 1, 4, 3) < 0.7).to(device)
        grad_output = torch.randn(x.shape).to(device, dtype)[part]
        results = {}
        for step, layout in enumerate((torch.contiguous_format, torch.channels_last)):
            own_x, own_residual = (
                (t + step)[part].contiguous(memory_format=layout).requires_grad_() for t in (x, residual)
            )
            y = layer(own_x, own_residual if with_residual else None, mask[part] if with_mask else None)
            y.backward(grad_output if step == 0 else grad_output[:, :, :1].expand(y.shape))
            results |= {f"{step} y": y.detach(), f"{step} grad_input": own_x.grad}
            results |= {f"{step} grad_residual": own_residual.grad} if with_residual else {}
        results |= {f"grad of {key}": parameter.grad for key, parameter in layer.named_parameters()}
        found[name] = {key: value.double().cpu() for key, value in (results | layer.state_dict()).items()}
    return found


def compare_layers(actual: dict[str, dict[str, torch.Tensor]], expected: dict[str, dict[str, torch.Tensor]]) -> None:
    """Compare results of `train_layers` in float32 with those in float64."""
    for name, wanted in expected.items():
        assert actual[name].keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(
                actual[name][key], value, rtol=1e-5, atol=2e-5, msg=lambda text, at=(name, key): f"{at}: {text}"
            )
