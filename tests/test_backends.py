"""The contract of the steps: every backend, on parts of the batch or the whole of it, against the oracle."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from contract import CASES, Case, check_training_step, check_variance
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import syncbn
from syncbn import backends, reference
from syncbn.backends import compiled, compiled_calls, cpu_layout
from syncbn.statistics import Fused, Running, unpack


@pytest.fixture(autouse=True)
def no_minimum(monkeypatch):
    monkeypatch.setattr(cpu_layout, "MIN_ELEMENTS", 0)


IN_FLOAT64 = [case._replace(dtype=torch.float64) for case in CASES[:9]]


@pytest.mark.parametrize("case", [*CASES, *IN_FLOAT64], ids=str)
def test_the_steps_in_turn_are_a_training_pass(case):
    check_training_step(backends.PLAIN, case)


@pytest.fixture(params=[1, 300, cpu_layout.PART_ELEMENTS], ids=["smallest_parts", "parts", "whole"])
def part_elements(request, monkeypatch):
    monkeypatch.setattr(cpu_layout, "PART_ELEMENTS", request.param)


@pytest.mark.usefixtures("part_elements")
@pytest.mark.parametrize("case", [*CASES, *IN_FLOAT64], ids=str)
def test_the_steps_on_cpu_in_turn_are_a_training_pass(case):
    check_training_step(backends.CPU, case)


@pytest.mark.parametrize("case", [*CASES, *IN_FLOAT64], ids=str)
def test_the_kernels_for_torch_compile_make_a_training_pass_without_it(case, monkeypatch):
    monkeypatch.setattr(compiled_calls, "is_available", False)
    check_training_step(backends.COMPILED, case)


IN_PARTS = Case((400, 40), channels_last=True, needs_dy=False, split=(131, 269))  # 3 and 13 rows fill no block


@pytest.mark.parametrize("case", [Case(), Case(channels_last=True), IN_PARTS], ids=str)
def test_the_compiled_steps_in_turn_are_a_training_pass(case):
    check_training_step(backends.COMPILED, case)
    split = None if case.split is None else (4, 5)
    check_training_step(backends.COMPILED, case._replace(shape=(9, *case.shape[1:]), split=split))
    assert compiled_calls.is_available


def test_sizes_share_one_compilation(monkeypatch):
    counters = torch._dynamo.utils.counters
    torch.compiler.reset()
    compiled_calls.forget()
    counters.clear()
    for C, sizes in ((5, (4, 6)), (7, (9, 3)), (64, (8, 8)), (3, (2, 4))):
        for N in (2, 3, 5):
            check_training_step(backends.COMPILED, Case((N, C, *sizes), residual=False, needs_dy=False))
    assert counters["stats"]["unique_graphs"] == 3  # forward, again from another pivot than the first, backward


WITHOUT_A_COMPILER = """
import warnings
import torch, syncbn
from syncbn import backends
x = torch.randn(64, 64, 8, 8, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layers = [syncbn.SyncBatchNorm(64, activation="relu") for _ in range(2)]
    for layer in layers:
        layer(x).square().sum().backward()
print([str(w.message) for w in caught if "syncbn" in str(w.message)])
assert backends.select(x) is backends.CPU
expected = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
torch.testing.assert_close(layers[0](x), expected)
"""  # (64, 64, 8, 8) is large enough for kernels


def test_without_a_compiler_it_says_so_once_and_goes_on(tmp_path):
    environment = {"SYNCBN_BACKEND": "compiled", "CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", WITHOUT_A_COMPILER]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("syncbn runs without compiled kernels: torch.compile failed") == 1
    assert "compiler" in run.stdout


SMALLER = {(2, 3, 64, 40): (2, 3, 16, 40), (5, 6, 13, 31): (3, 6, 5, 31)}  # what the interpreter takes 10 s for


@pytest.mark.parametrize("case", [c._replace(shape=SMALLER.get(c.shape, c.shape)) for c in CASES], ids=str)
def test_the_steps_of_triton_in_turn_are_a_training_pass(case, small_tiles, device):
    check_training_step(small_tiles, case, device)


@pytest.mark.parametrize("case", [Case(), Case((3, 2, 70), split=(1, 2)), Case(channels_last=True)], ids=str)
def test_the_steps_of_triton_with_tiles_and_offsets_for_large_activations(case, triton_launch, device, monkeypatch):
    monkeypatch.setattr(triton_launch, "INT32_OFFSETS", 0)
    triton_launch.plan.cache_clear()
    check_training_step(triton_launch, case, device)
    triton_launch.plan.cache_clear()


MEANS_AND_STDS = [(0, 1), (1e2, 1), (1e4, 1), (1, 1e-4), (0, 1e-5), (0.1, 1e-5), (-1e4, 1)]


@pytest.mark.parametrize("mean, std", MEANS_AND_STDS)
@pytest.mark.parametrize("name", ["torch", "cpu", "compiled", "triton"])
def test_the_variance_has_six_digits_at_any_mean_and_scale(name, mean, std, request, device, monkeypatch):
    own = {"torch": backends.PLAIN, "cpu": backends.CPU, "compiled": backends.COMPILED}
    backend = own.get(name) or request.getfixturevalue("triton_launch")
    monkeypatch.setattr(compiled_calls, "is_available", False)  # compiled below, for fewer variants
    assert check_variance(backend, mean, std, (6, 3, 31, 30), device if name == "triton" else "cpu") < 1e-6


def test_the_variance_has_six_digits_in_compiled_code():
    for mean, std in MEANS_AND_STDS:
        x = torch.randn(6, 3, 31, 30) * std + mean
        packed = sum(backends.COMPILED.pack_stats(x[part], None) for part in (slice(0, 1), slice(1, None)))
        np.testing.assert_allclose(unpack(packed)[2], x.double().numpy().var((0, 2, 3)), rtol=1e-6)
    assert compiled_calls.is_available


ON_CPU = {"cpu": backends.CPU, "compiled": backends.COMPILED}


def variance_of(name, x):
    return ON_CPU[name].normalize(x, None, None, None, Fused(), eps=1e-5, running=None)[2]


# ATen's CPU kernels add up a run of contiguous positions in float32: whole runs of 2^20 cost four digits.
@pytest.mark.parametrize("mean", [0, 1, 1.9, 2.1, 1e3])
@pytest.mark.parametrize("shape", [(1, 2, 1024, 1024), (70, 3, 31, 31), (700, 1, 31, 31)])
def test_long_runs_cost_no_digits(shape, mean):
    torch.manual_seed(0)
    x, grad_output = torch.randn(shape) + mean, torch.randn(shape)
    if shape[1] == 1:  # contiguous as well
        x, grad_output = (t.as_strided(shape, (31 * 31, 1, 31, 1)) for t in (x, grad_output))
    whole = x.double().numpy()
    expected = reference.batch_norm_backward(grad_output.double().numpy(), whole)
    layer, leaf = syncbn.SyncBatchNorm(shape[1], momentum=1.0), x.requires_grad_()
    y = layer(leaf)
    y.backward(grad_output)
    n = whole.size // shape[1]
    np.testing.assert_allclose(layer.running_var, whole.var((0, 2, 3)) * n / (n - 1), rtol=1e-6)
    np.testing.assert_allclose(y.detach(), reference.batch_norm(whole).output, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(leaf.grad, expected.grad_input, rtol=1e-6, atol=1e-6)
    for found, sums in ((layer.weight.grad, expected.grad_weight), (layer.bias.grad, expected.grad_bias)):
        np.testing.assert_allclose(found, sums, atol=1e-6 * np.sqrt(n))


@pytest.mark.parametrize("name", ON_CPU)
def test_the_variance_has_six_digits_where_the_batch_cannot_be_split_evenly(name, monkeypatch):
    monkeypatch.setattr(compiled_calls, "is_available", False)
    means = 1 + torch.rand(257, dtype=torch.float64)
    for mean_over_std in (0, 1e4, 1e6):
        x = (torch.randn(1031, 257, dtype=torch.float64) * 30 + 30 * mean_over_std * means).float()  # 1031 is prime
        np.testing.assert_allclose(variance_of(name, x), x.double().numpy().var(0), rtol=1e-6)
        x = x.T[:4, :1021].reshape(1, 2, 2 * 1021)[:, :, : 2 * 1021 - 3].contiguous()  # 2039 is prime, and contiguous
        np.testing.assert_allclose(variance_of(name, x), x.double().numpy().var((0, 2)), rtol=1e-6)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_first_image_unlike_the_others_costs_no_accuracy(name, monkeypatch):
    monkeypatch.setattr(compiled_calls, "is_available", False)
    x = torch.randn(20, 3, 10, 10)
    x[0] += 1e5
    for layout in (torch.contiguous_format, torch.channels_last):
        found = variance_of(name, x.contiguous(memory_format=layout))
        np.testing.assert_allclose(found, x.double().var((0, 2, 3), correction=0), rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_momentum_of_zero_or_one_is_not_taken_for_the_last_attempt(momentum, monkeypatch):
    monkeypatch.setattr(compiled_calls, "is_available", False)
    compiled._scalar.cache_clear()
    x = torch.randn(20, 3, 10, 10)
    x[0] += 1e5  # takes all attempts
    running = Running(torch.zeros(3), torch.ones(3), None, momentum)
    backends.COMPILED.normalize(x, None, None, None, Fused(), eps=1e-5, running=running)
    torch.testing.assert_close(running.mean, momentum * x.mean((0, 2, 3)))


@pytest.mark.parametrize("name", ["torch", "auto", "compiled"])
def test_what_works_in_place_may_follow_the_layer(name, monkeypatch):
    monkeypatch.setenv("SYNCBN_BACKEND", name)
    monkeypatch.setattr(compiled_calls, "is_available", name == "compiled")
    x = torch.randn(4, 5, 6, 7)
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(5, 5, 1), syncbn.SyncBatchNorm(5), torch.nn.ReLU(inplace=inplace))
        model(x).square().sum().backward()
        results.append(model[0].weight.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["torch", "auto", "compiled"])
def test_the_memory_of_the_caller_stays_resizable_as_fsdp_needs_it(name, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, name)
    dtype = torch.float32 if name == "compiled" else torch.float64  # NumPy shares the memory of its own dtypes
    layer = syncbn.SyncBatchNorm(3, dtype=dtype, activation="relu")
    x = torch.randn(4, 3, 6, 7, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    syncbn.assert_replicas_equal(layer)
    gradients = [x.grad, layer.weight.grad, layer.bias.grad]
    assert all(t.untyped_storage().resizable() for t in [*layer.state_dict().values(), x, y, *gradients])


def test_the_default_device_of_the_first_call_does_not_matter(monkeypatch):
    cpu_layout.constants.cache_clear()
    x = torch.randn(4, 5, 6, 7)
    layer = syncbn.SyncBatchNorm(5)
    with torch.device("meta"):
        y = layer(x)
    torch.testing.assert_close(layer(x), y)


# A variance above 65504 is no float16, its share in the average may be one.
@pytest.mark.parametrize("name", ["torch", "auto", "compiled"])
@pytest.mark.parametrize("momentum, expected", [(0.0, 1), (0.1, 16_000)])
def test_running_statistics_are_rounded_once_they_have_moved(name, momentum, expected, monkeypatch):
    monkeypatch.setenv("SYNCBN_BACKEND", name)
    layer = syncbn.SyncBatchNorm(3, momentum=momentum).half()
    layer((torch.randn(4, 3, 8, 8) * 400).half())
    assert (layer.running_var / expected - 1).abs().max() < 0.3


@pytest.mark.parametrize("name", ["auto", "compiled"])
def test_a_negative_view_is_read_as_what_it_stands_for(name, monkeypatch):
    monkeypatch.setenv("SYNCBN_BACKEND", name)
    x = torch._neg_view(torch.randn(4, 5, 6, 7) + 3)
    layer = syncbn.SyncBatchNorm(5, momentum=1.0)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))


def test_float64_has_its_whole_range():
    x = torch.randn(40, 5, dtype=torch.float64) * 1e36 + 1e39
    y = syncbn.SyncBatchNorm(5, eps=0, dtype=torch.float64)(x)
    np.testing.assert_allclose(y.detach(), reference.batch_norm(x.numpy() / 1e36, eps=0).output, atol=1e-9)


def test_a_mode_under_which_nothing_can_be_compiled_does_not_switch_compilation_off(monkeypatch):
    monkeypatch.setenv("SYNCBN_BACKEND", "compiled")
    layer, x = syncbn.SyncBatchNorm(5), torch.randn(4, 5, 6, 7)
    with FlopCounterMode(display=False):
        y = layer(x)
    assert compiled_calls.is_available
    torch.testing.assert_close(layer(x), y)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["auto", "compiled"])
def test_whoever_records_operations_one_by_one_gets_all_of_them(name, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, name)
    x, other = torch.randn(2, 4, 5, 6, 7)

    def gradient(x):
        x = x.detach().requires_grad_()
        y = syncbn.sync_batch_norm(x, None, None, training=True, activation="relu")
        return torch.autograd.grad(y.pow(3).sum(), x)[0]

    recorded = make_fx(gradient)(x)
    layer = syncbn.SyncBatchNorm(5)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "torch")
    torch.testing.assert_close(recorded(other), gradient(other))
    torch.testing.assert_close(traced(other), layer(other))


@pytest.mark.parametrize("own", [backends.PLAIN, backends.CPU, backends.COMPILED], ids=["torch", "cpu", "compiled"])
def test_a_negative_view_as_weight_is_read_as_what_it_stands_for(own):
    weight, x = torch.rand(5), torch.randn(4, 5, 6, 7)
    results = [
        own.normalize(x, None, values, None, Fused(), eps=1e-5, running=None)[0]
        for values in (-weight, torch._neg_view(weight))
    ]
    torch.testing.assert_close(*results)


def test_an_activation_keeps_nan_and_a_refused_count_moves_nothing(triton_launch, device):
    packed = torch.full((7,), torch.nan, dtype=torch.float64, device=device)
    running = Running(torch.zeros(3, device=device), torch.ones(3, device=device), None, 0.1)
    x = torch.randn(4, 3, device=device)
    for activation in ("identity", "relu", "leaky_relu", "silu"):
        fused = Fused(activation=activation)
        y, count, _, _ = triton_launch.normalize(x, packed, None, None, fused, eps=1e-5, running=running)
        assert count.isnan()
        assert running.mean.tolist() == [0] * 3
        assert running.var.tolist() == [1] * 3
        assert y.isnan().all()


@pytest.mark.parametrize("count, moved", [(0, False), (1, False), (2, True)])
@pytest.mark.parametrize("momentum", [0.5, None])
def test_statistics_move_from_two_values_on(count, moved, momentum, triton_launch, device):
    x = torch.randn(count, 300, device=device)
    running = Running(
        torch.zeros(300, device=device), torch.ones(300, device=device), torch.tensor(0, device=device), momentum
    )
    triton_launch.normalize(x, None, None, None, Fused(), eps=1e-5, running=running)
    assert running.num_batches_tracked.item() == moved
    assert bool((running.mean != 0).all()) == bool((running.var != 1).all()) == moved


def test_backward_of_triton_takes_over_from_a_forward_pass_in_plain_pytorch(triton_launch, device):
    class PlainForward:
        def __getattr__(self, name):
            return getattr(triton_launch if name.startswith("backward") else backends.PLAIN, name)

    check_training_step(PlainForward(), Case(), device)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape", [(1000, 64, 8, 8), (3, 2, 128, 100), (5, 257, 3, 7), (70000, 7, 1, 1), (4099, 1, 1, 2)]
)
def test_the_view_on_cpu_has_every_value_once_in_short_runs_of_its_channel(shape, channels_last):
    x = torch.arange(shape[1], dtype=torch.float64).view(1, -1, 1, 1).expand(shape)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    view = cpu_layout._view(x.shape, x.stride())
    covered = torch.zeros(view.shape[0], dtype=torch.int64)
    for part in view.parts():
        covered[part] += 1
        assert not view.is_channels_last or len(covered[part]) <= cpu_layout.MAX_ROWS
    assert (covered == 1).all()
    flat = view.of(x)
    assert flat.data_ptr() == x.data_ptr()
    assert flat.dim() == 2 or flat.shape[2] <= cpu_layout.MAX_RUN
    channels = view.broadcast(view.spread(np.arange(shape[1]), x))
    assert (flat == channels).all()
    sums = flat.sum([0, *range(2, flat.dim())])
    np.testing.assert_allclose(view.fold(sums.numpy()), x.sum([0, 2, 3]))


def test_every_backend_has_all_steps(triton_launch):
    steps = [name for name in vars(backends.Backend) if not name.startswith("_")]
    assert len(steps) == 6 + 1
    for backend in (backends.PLAIN, backends.CPU, backends.COMPILED, triton_launch):
        assert all(hasattr(backend, step) for step in steps)


def test_select_follows_the_environment(monkeypatch, triton_launch):
    x = torch.randn(4, 3)
    monkeypatch.delenv("SYNCBN_BACKEND", raising=False)
    assert backends.select(x) is backends.CPU
    assert backends.select(x.to("meta")) is backends.PLAIN
    monkeypatch.setenv("SYNCBN_BACKEND", "torch")
    assert backends.select(x) is backends.PLAIN
    monkeypatch.setenv("SYNCBN_BACKEND", "compiled")
    assert backends.select(x) is backends.COMPILED
    monkeypatch.setenv("SYNCBN_BACKEND", "triton")
    assert backends.select(x) is triton_launch
    for unsupported in (x.double(), torch.randn(4, 6)[:, ::2], torch.randn(4, 2, 3, 5).transpose(1, 2)):
        assert backends.select(unsupported) is backends.PLAIN
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        ValueError, match="expected tensors on CUDA with SYNCBN_BACKEND=triton, got cpu: move the model"
    ):
        backends.select(x)
    monkeypatch.setenv("SYNCBN_BACKEND", "cuda")
    with pytest.raises(
        ValueError, match="expected SYNCBN_BACKEND to be one of auto, torch, compiled, triton, got 'cuda'"
    ):
        backends.select(x)


def test_where_triton_cannot_launch_it_says_so_once(triton_launch, monkeypatch, device):
    def fail(*arguments, **constexprs):
        raise RuntimeError("Failed to find C compiler.\nInstall one.")

    triton_launch.can_run.cache_clear()
    assert triton_launch.can_run(torch.device(device))
    triton_launch.can_run.cache_clear()
    monkeypatch.setattr(triton_launch, "_launch", fail)
    with pytest.warns(
        UserWarning, match=r"runs in plain PyTorch on \w+, Triton launches no kernels \(RuntimeError: Fail"
    ):
        assert not triton_launch.can_run(torch.device(device))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton_launch.can_run(torch.device(device))
    triton_launch.can_run.cache_clear()


def test_where_triton_is_missing_plain_pytorch_serves_and_asking_for_triton_says_so(monkeypatch):
    monkeypatch.setattr(backends, "_triton_launch", lambda: None)
    monkeypatch.setenv("SYNCBN_BACKEND", "triton")
    with pytest.raises(ValueError, match="expected Triton to be installed, got none: install triton"):
        backends.select(torch.randn(4, 3))
    monkeypatch.setenv("SYNCBN_BACKEND", "auto")
    on_cuda = torch.empty(4, 3, device="meta")
    monkeypatch.setattr(type(on_cuda), "is_cuda", True, raising=False)
    assert backends.select(on_cuda) is backends.PLAIN
