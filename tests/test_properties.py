"""Properties that hold for any shape, split, dtype, layout, offset and scale, including the documented claims."""

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

import syncbn
from syncbn import reference

EXAMPLES = 120
WORLD_SIZE = 3


@st.composite
def problems(draw):
    """Draw the parameters of one training step as plain values, from which every rank builds the same tensors."""
    spatial = draw(st.lists(st.integers(1, 4), max_size=3))
    sizes = draw(st.lists(st.integers(0, 4), min_size=WORLD_SIZE, max_size=WORLD_SIZE))
    if sum(sizes) * int(np.prod(spatial)) < 2:
        sizes[0] += 2
    return {
        "sizes": sizes,
        "shape": (sum(sizes), draw(st.integers(1, 5)), *spatial),
        "dtype": draw(st.sampled_from(["float64", "float32", "bfloat16", "float16"])),
        "layout": draw(st.sampled_from(["contiguous", "channels_last", "permuted", "strided"])),
        "offset": draw(st.sampled_from([0.0, 1.0, -30.0, 1000.0])),
        "scale": draw(st.sampled_from([1.0, 1e-2, 20.0])),
        "seed": draw(st.integers(0, 2**16)),
    }


def whole_batch(problem: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(problem["seed"])
    dtype = getattr(torch, problem["dtype"])
    x, grad_output = torch.randn(2, *problem["shape"], dtype=torch.float64, generator=generator)
    weight = torch.randn(problem["shape"][1], dtype=torch.float64, generator=generator)
    x = problem["offset"] + problem["scale"] * x
    return x.to(dtype), grad_output.to(dtype), weight.to(torch.promote_types(dtype, torch.float32))


def in_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last" and x.dim() in (4, 5):
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "permuted":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        return x.repeat_interleave(2, 0)[::2]
    return x


def formats(x: torch.Tensor) -> list[torch.memory_format]:
    """Return the memory formats of x; if sizes of 1 allow several, all their strides are accepted."""
    by_dim = {4: [torch.channels_last], 5: [torch.channels_last_3d]}
    candidates = [torch.contiguous_format, *by_dim.get(x.dim(), [])]
    found = [candidate for candidate in candidates if x.is_contiguous(memory_format=candidate)]
    return found if len(found) == 1 else []


def solve(all_problems: list[dict]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    found = []
    for problem in all_problems:
        x, grad_output, weight = (
            tensor if tensor.dim() == 1 else tensor.split(problem["sizes"])[dist.get_rank()]
            for tensor in whole_batch(problem)
        )
        layer = syncbn.SyncBatchNorm(x.shape[1], dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        x = in_layout(x, problem["layout"]).detach().requires_grad_()
        y = layer(x)
        y.backward(grad_output)
        for memory_format in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
            if memory_format in formats(x):
                assert y.is_contiguous(memory_format=memory_format)
                assert x.grad.is_contiguous(memory_format=memory_format)
        found.append((y.detach().double().numpy(), x.grad.double().numpy(), layer.weight.grad.double().numpy()))
    return found


def drawn(strategy, count: int) -> list:
    """Return `count` examples, the same in every run: starting ranks for one example at a time is too slow."""
    examples = []

    @settings(max_examples=count, database=None, derandomize=True, deadline=None)
    @given(strategy)
    def collect(example):
        examples.append(example)

    collect()
    return examples


def test_any_step_on_ranks_equals_the_oracle_on_the_whole_batch():
    all_problems = drawn(problems(), EXAMPLES)
    ranks = run_ranks(WORLD_SIZE, solve, all_problems)
    for index, problem in enumerate(all_problems):
        x, grad_output, weight = (tensor.double().numpy() for tensor in whole_batch(problem))
        y, grad_input, _ = (np.concatenate([rank[index][part] for rank in ranks]) for part in range(3))
        grad_weight = sum(rank[index][2] for rank in ranks)
        forward = reference.batch_norm(x, weight=weight)
        gradients = reference.batch_norm_backward(grad_output, x, weight=weight)
        unit = torch.finfo(getattr(torch, problem["dtype"])).eps
        accumulated = min(unit, torch.finfo(torch.float32).eps)
        # The float64 vector gives the variance a relative error of about 1e-16 (mean/std)^2.
        growth = 1 + ((forward.mean * forward.invstd) ** 2).max() * 1e-16 / accumulated
        for name, actual, expected in (
            ("output", y, forward.output),
            ("grad_input", grad_input, gradients.grad_input),
            ("grad_weight", grad_weight, gradients.grad_weight),
        ):
            largest = np.abs(expected).max(initial=1.0)
            bound = (unit if name != "grad_weight" else 0) * np.abs(expected) + 100 * accumulated * growth * largest
            assert (np.abs(actual - expected) <= bound).all(), (name, problem, np.abs(actual - expected).max())


def layer_of(num_features: int) -> syncbn.SyncBatchNorm:
    return syncbn.SyncBatchNorm(num_features, eps=0.0, dtype=torch.float64)


seeds = st.integers(0, 2**16)
factors = st.floats(0.01, 100.0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, factors)
def test_normalization_does_not_see_the_scale_of_the_weights_in_front_of_it(seed, a):
    """BN(W u) = BN((aW) u); the Jacobian for u is equal, the gradient for aW is 1/a as large (Ioffe & Szegedy, 3.3)."""
    generator = torch.Generator().manual_seed(seed)
    u, grad_output = torch.randn(2, 12, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    results = []
    for scale in (1.0, a):
        own_u, own_weight = u.clone().requires_grad_(), (scale * weight).requires_grad_()
        y = layer_of(4)(own_u @ own_weight.T)
        y.backward(grad_output)
        results.append((y.detach(), own_u.grad, own_weight.grad * scale))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, st.floats(-10, 10), factors)
def test_outputs_have_mean_bias_and_standard_deviation_weight_whatever_comes_in(seed, offset, scale):
    generator = torch.Generator().manual_seed(seed)
    x = offset + scale * torch.randn(9, 4, 5, dtype=torch.float64, generator=generator)
    layer = layer_of(4)
    layer.weight.data.uniform_(0.1, 3, generator=generator)
    layer.bias.data.normal_(generator=generator)
    y = layer(x)
    torch.testing.assert_close(y.mean((0, 2)), layer.bias.data, rtol=0, atol=1e-7)
    torch.testing.assert_close(y.std((0, 2), correction=0), layer.weight.data, rtol=1e-7, atol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds, st.floats(-10, 10), factors)
def test_weight_std_and_bias_mean_restore_the_input(seed, offset, scale):
    x = offset + scale * torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    layer = layer_of(4)
    layer.weight.data.copy_(x.std(0, correction=0))
    layer.bias.data.copy_(x.mean(0))
    torch.testing.assert_close(layer(x).detach(), x, rtol=1e-7, atol=1e-7 * scale)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seeds)
def test_the_gradient_of_the_input_is_orthogonal_to_constants_and_to_the_output(seed):
    generator = torch.Generator().manual_seed(seed)
    x, grad_output = torch.randn(2, 9, 4, dtype=torch.float64, generator=generator)
    x.requires_grad_()
    y = layer_of(4)(x)
    (grad_input,) = torch.autograd.grad(y, x, grad_output)
    assert grad_input.sum(0).abs().max() < 1e-12
    assert (grad_input * y).sum(0).abs().max() < 1e-12
