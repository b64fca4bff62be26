"""The contract of a backend's steps against the oracle: for pytest, and for `scripts/gpu_check.py` on CUDA."""

from typing import Any, NamedTuple

import numpy as np
import torch

import syncbn
from syncbn import reference
from syncbn.backends import Backend
from syncbn.statistics import Fused, Running, Wanted, advance_

EPS = 1e-5
ACTIVATIONS = {  # function and derivative, in NumPy
    "identity": (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(float)),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), lambda z: np.where(z > 0, 1, 0.01)),
    "silu": (lambda z: z / (1 + np.exp(-z)), lambda z: (1 + z * (1 - 1 / (1 + np.exp(-z)))) / (1 + np.exp(-z))),
}


class Case(NamedTuple):
    shape: tuple[int, ...] = (7, 5, 4, 6)
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    activation: str = "relu"
    residual: bool = True
    needs_dy: bool = True
    mask: bool = False
    mean: float = 5.0  # of x; the standard deviation is 1
    affine: bool = True
    momentum: float | None = 0.1
    split: tuple[int, ...] | None = None  # sizes of the batches of several ranks; None: one rank

    def __str__(self) -> str:
        """Return the shape and what differs from the default."""
        changes = [f"{name}={getattr(self, name)}" for name in self._fields[1:]
                   if getattr(self, name) != self._field_defaults[name]]  # fmt: skip
        return " ".join(["x".join(map(str, self.shape)), *changes]).replace("torch.", "")


CASES = [
    Case(),
    Case(mask=True),
    Case(channels_last=True),
    Case(channels_last=True, mask=True, activation="silu"),
    Case(activation="identity", residual=False),
    Case(activation="identity", mask=True, needs_dy=False),
    Case(activation="leaky_relu", residual=False, affine=False),
    Case(activation="silu", residual=False, needs_dy=False, momentum=None),
    Case(activation="leaky_relu", needs_dy=False, channels_last=True),
    Case(dtype=torch.bfloat16, split=(3, 0, 4)),
    Case(dtype=torch.bfloat16, channels_last=True, residual=False, momentum=None, split=(1, 6)),
    Case(dtype=torch.float16, activation="silu", split=(2, 5), mask=True),
    Case(dtype=torch.float16, channels_last=True, activation="identity", needs_dy=True),
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
    Case((2, 3, 64, 40), split=(1, 1)),
    Case((2, 3, 64, 40), mean=0.5, residual=False, needs_dy=False),
    Case((5, 6, 13, 31), channels_last=True, needs_dy=False),
]


def rows(tensor: torch.Tensor) -> np.ndarray:
    """Return (N, C, *S) as (N*S, C) in float64."""
    return tensor.detach().double().cpu().movedim(1, -1).reshape(-1, tensor.shape[1]).numpy()


def in_layout(tensor: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else tensor.contiguous()


def check_training_step(backend: Backend, case: Case, device: str = "cpu") -> None:
    """Take the steps of forward and backward on the parts of a batch; compare with the oracle on the whole of it."""
    generator = torch.Generator().manual_seed(0)
    N, C = case.shape[:2]
    tensors = torch.randn(3, *case.shape, generator=generator) + torch.tensor([case.mean, 0, 0]).view(
        3, *[1] * len(case.shape)
    )
    x, grad_output, residual = (in_layout(t.to(device, case.dtype), channels_last=case.channels_last) for t in tensors)
    weight, bias = torch.randn(2, C, generator=generator).to(torch.promote_types(case.dtype, torch.float32))
    mask = torch.rand(N, 1, *case.shape[2:], generator=generator) < 0.7
    valid = mask.flatten().numpy() if case.mask else np.ones(x.numel() // C, bool)
    expected = _expected(case, rows(x), rows(grad_output), rows(residual), weight.numpy(), bias.numpy(), valid)
    if case.mask:  # masked positions may hold anything
        x = torch.where(mask.to(device), x, torch.nan)

    zeros, ones = (torch.full((C,), value, dtype=weight.dtype, device=device) for value in (0, 1))
    running = Running(zeros, ones, torch.tensor(3, device=device), case.momentum)
    parameters = (weight.to(device), bias.to(device)) if case.affine else (None, None)
    parts = [slice(0, N)]
    if case.split is not None:
        ends = np.cumsum((0, *case.split))
        parts = [slice(*pair) for pair in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
    masks = [mask[part].to(device) if case.mask else None for part in parts]
    xs = [in_layout(x[part], channels_last=case.channels_last) for part in parts]
    fuseds = [
        Fused(residual[part] if case.residual else None, mask, case.activation)
        for part, mask in zip(parts, masks, strict=True)
    ]
    packed = None
    if case.split is not None:
        packed = sum(backend.pack_stats(x, mask) for x, mask in zip(xs, masks, strict=True))
    ys = []
    for x, fused in zip(xs, fuseds, strict=True):  # the first rank's running statistics are looked at
        y, count, var, channels = backend.normalize(
            x, packed, *parameters, fused, eps=EPS, running=None if ys else running
        )
        ys.append(y)
    if not backend.updates_running:
        advance_(running, count=count, mean=channels.mean, var=var)
    grads = [backend.match_layout(grad_output[part], x) for part, x in zip(parts, xs, strict=True)]
    dtype = weight.dtype if case.affine else None
    wanted = Wanted(dtype, dtype, case.needs_dy)
    if case.split is None:
        own = backend.backward(grads[0], x, channels, fused, wanted, count=count)
        grad_inputs, reduced, sums = [own.grad_input], [own], None
    else:
        operands = list(zip(grads, xs, [channels] * len(xs), fuseds, strict=True))
        reduced = [backend.backward_reduce(*operand, wanted) for operand in operands]
        sums = sum(part.sums for part in reduced)
        grad_inputs = [
            backend.backward_elemt(*operand, wanted, own._replace(sums=sums), count=count)
            for operand, own in zip(operands, reduced, strict=True)
        ]

    accumulated = 200 * torch.finfo(weight.dtype).eps
    unit = torch.finfo(case.dtype).eps
    # dy is rounded on its way, unless it is grad_output or 0
    rounding = 0 if case.activation in ("identity", "relu") else unit * np.abs(expected["dy"]).max()
    assert count.item() == valid.sum()
    np.testing.assert_allclose(channels.mean.cpu(), expected["mean"], rtol=accumulated)
    np.testing.assert_allclose(var.cpu(), expected["var"], rtol=accumulated)
    np.testing.assert_allclose(running.mean.cpu(), expected["running"].running_mean, rtol=accumulated)
    np.testing.assert_allclose(running.var.cpu(), expected["running"].running_var, rtol=accumulated)
    assert running.num_batches_tracked.item() == expected["running"].num_batches_tracked
    slack = expected["kinks"] * np.abs(expected["dy"]).max()  # values at a kink, where rounding decides
    atol = 100 * accumulated + rounding * np.sqrt(len(valid)) + 6 * slack
    if sums is not None:
        np.testing.assert_allclose(sums[:C].cpu(), expected["grad_bias"], atol=atol)
        np.testing.assert_allclose((sums[C:] * channels.invstd).cpu(), expected["grad_weight"], atol=atol)
    if case.affine:
        for name in ("grad_weight", "grad_bias"):
            total = sum(getattr(part, name) for part in reduced)
            np.testing.assert_allclose(total.cpu(), expected[name], atol=atol, err_msg=name)
    found = {"y": ys, "grad_input": grad_inputs} | ({"dy": [part.dy for part in reduced]} if case.needs_dy else {})
    scale = np.abs(expected["scale"]).max()
    for name, tensors_of_parts in found.items():
        actual = np.concatenate([rows(tensor) for tensor in tensors_of_parts])
        tolerance, smooth = accumulated, np.ones_like(expected["smooth"])
        if name != "y":
            tolerance += (2 * rounding + 12 * slack / len(valid)) * max(scale, 1)
            smooth = expected["smooth"]
        np.testing.assert_allclose(
            actual[valid][smooth], expected[name][smooth], rtol=unit, atol=tolerance, err_msg=name
        )
        assert (actual[~valid] == 0).all(), name
        for tensor, x in zip(tensors_of_parts, xs, strict=True):
            assert tensor.dtype == case.dtype
            assert x.numel() == 0 or tensor.stride() == x.stride(), name


def check_variance(backend: Backend, mean: float, std: float, shape: tuple[int, ...], device: str = "cpu") -> float:
    """Return the largest relative error of the variance of float32 data, over channels and both layouts."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).float()
    expected = rows(x).var(0)
    errors = []
    for channels_last in (False, True):
        own = in_layout(x.to(device), channels_last=channels_last)
        packed = sum(backend.pack_stats(own[part], None) for part in (slice(0, 1), slice(1, None)))
        for vector in (None, packed):
            _, _, var, _ = backend.normalize(own, vector, None, None, Fused(), eps=0.0, running=None)
            errors.append(np.abs(var.cpu().numpy() / expected - 1).max())
    return float(max(errors))


LAYERS = {  # arguments, with a residual, with a mask
    "plain": ({}, False, False),
    "relu": ({"activation": "relu"}, True, False),
    "masked": ({"activation": "silu", "momentum": None, "temperature": 1.5}, True, True),
    "no weight": ({"activation": "leaky_relu", "affine": False}, False, True),
    "no bias": ({"bias": False}, True, False),
}


def train_layers(
    rank: int, sizes: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"
) -> dict[str, dict[str, torch.Tensor]]:
    """Return results of two steps of each layer; the second one has its gradient expanded and its layout changed."""
    found = {}
    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    for name, (arguments, with_residual, with_mask) in LAYERS.items():
        torch.manual_seed(0)
        layer = syncbn.SyncBatchNorm(5, **arguments).to(device, dtype)
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


def _expected(
    case: Case, x: np.ndarray, grad_output: np.ndarray, residual: np.ndarray, weight: Any, bias: Any, valid: np.ndarray
) -> dict[str, Any]:
    function, derivative = ACTIVATIONS[case.activation]
    if not case.affine:
        weight = bias = None
    forward = reference.batch_norm(x[valid], weight=weight, bias=bias, eps=EPS)
    z = forward.output + (residual[valid] if case.residual else 0)
    dy = grad_output[valid] * derivative(z)
    gradients = reference.batch_norm_backward(dy, x[valid], weight=weight, eps=EPS)
    C = x.shape[1]
    running = reference.update_running_stats(
        reference.RunningStats(np.zeros(C), np.ones(C), 3),
        mean=forward.mean, var=forward.var, count=forward.count, momentum=case.momentum,
    )  # fmt: skip
    scale = forward.invstd * (1 if weight is None else weight)
    smooth = np.abs(z) > (1e-5 if case.activation in ("relu", "leaky_relu") else -1)
    return {
        "smooth": smooth, "kinks": (~smooth).sum(),
        "mean": forward.mean, "var": forward.var, "running": running, "scale": scale,
        "y": function(z), "dy": dy, **gradients._asdict(),
    }  # fmt: skip
