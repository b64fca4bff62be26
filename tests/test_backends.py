"""The contract of the ops: every backend, on parts of the batch or on the whole batch, against the oracle."""

import copy
import sys
import warnings

import numpy as np
import pytest
import torch
from contract import CASES, Case, check_training_step, check_variance
from slow import all_but
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import syncbn
from syncbn import backends, reference
from syncbn.activations import ACTIVATIONS
from syncbn.backends import cpu
from syncbn.statistics import Epilogue, Running


@pytest.fixture(autouse=True)
def no_minimum(monkeypatch):
    """Let every backend handle small tensors."""
    monkeypatch.setattr(cpu, "MIN_ELEMENTS", 1)


IN_FLOAT64 = [case._replace(dtype=torch.float64) for case in CASES[:9]]


@pytest.mark.parametrize("case", [*CASES, *IN_FLOAT64], ids=str)
def test_the_ops_in_turn_are_a_training_pass(case):
    check_training_step(backends.PLAIN, case)


@pytest.mark.parametrize("longest_run", [20, cpu.MAX_RUN])
@pytest.mark.parametrize("case", [*CASES, *IN_FLOAT64], ids=str)
def test_the_ops_on_cpu_in_turn_are_a_training_pass(case, longest_run, monkeypatch):
    monkeypatch.setattr(cpu, "MAX_RUN", longest_run)
    monkeypatch.setattr(cpu, "MIN_RUN", 2)
    cpu.parts_of_run.cache_clear()
    is_served = case.dtype in (torch.float32, torch.float64) and not case.channels_last and not case.mask
    if not is_served or 0 in case.split or np.prod(case.shape[2:]) == 1:
        pytest.skip("plain operations serve it")
    check_training_step(backends.CPU, case)
    cpu.parts_of_run.cache_clear()


SMALLER = {(2, 3, 64, 40): (2, 3, 16, 40), (5, 6, 13, 31): (3, 6, 5, 31)}  # shapes that take the interpreter 10 s


INTERPRETED = [c._replace(shape=SMALLER.get(c.shape, c.shape)) for c in CASES]


@pytest.mark.parametrize("case", all_but(INTERPRETED[::4], INTERPRETED), ids=str)
def test_the_ops_of_triton_in_turn_are_a_training_pass(case, small_tiles, device):
    check_training_step(small_tiles, case, device)


@pytest.mark.parametrize("case", [Case(), Case((3, 2, 70), split=(1, 2)), Case(channels_last=True)], ids=str)
def test_the_ops_of_triton_with_tiles_and_offsets_for_large_activations(case, triton_launch, device, monkeypatch):
    monkeypatch.setattr(triton_launch, "INT32_OFFSETS", 0)
    triton_launch.plan.cache_clear()
    check_training_step(triton_launch, case, device)
    triton_launch.plan.cache_clear()


MEANS_AND_STDS = [(0, 1), (1e2, 1), (1e4, 1), (1, 1e-4), (0, 1e-5), (0.1, 1e-5), (-1e4, 1)]


class OnCpu:
    """The backend that `select` returns for each tensor on CPU."""

    def __getattr__(self, op):
        return lambda *args, **kwargs: getattr(backends.select(next(a for a in args if a.dim() > 1)), op)(
            *args, **kwargs
        )


@pytest.mark.parametrize("mean, std", MEANS_AND_STDS)
@pytest.mark.parametrize("name", ["torch", "cpu", "triton"])
def test_the_variance_has_six_digits_at_any_mean_and_scale(name, mean, std, request, device):
    own = {"torch": backends.PLAIN, "cpu": OnCpu()}
    backend = own.get(name) or request.getfixturevalue("triton_launch")
    assert check_variance(backend, mean, std, (6, 3, 31, 30), device if name == "triton" else "cpu") < 1e-6


def variance_of(x):
    """Return the batch variance of a layer in training, in float64."""
    running = Running(*torch.zeros(2, x.shape[1], dtype=torch.float64), None, 1.0)
    backend = backends.select(x)
    backend.normalize(x, backend.pack_stats(x, None), None, None, Epilogue(), eps=1e-5, ranks=1, running=running)
    n = x.numel() // x.shape[1]
    return running.var * (n - 1) / n


# ATen's CPU kernels sum a run of contiguous positions in float32; a run of 2^20 positions loses four digits.
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


def test_the_variance_has_six_digits_where_the_batch_cannot_be_split_evenly():
    means = 1 + torch.rand(257, dtype=torch.float64)
    for mean_over_std in (0, 1e4, 1e6):
        x = (torch.randn(1031, 257, dtype=torch.float64) * 30 + 30 * mean_over_std * means).float()  # 1031 is prime
        rtol = max(1e-6, 1e-15 * mean_over_std**2)  # error of the float64 vector
        np.testing.assert_allclose(variance_of(x), x.double().numpy().var(0), rtol=rtol)
        x = x.T[:4, :1021].reshape(1, 2, 2 * 1021)[:, :, : 2 * 1021 - 3].contiguous()  # 2039 is prime, and contiguous
        np.testing.assert_allclose(variance_of(x), x.double().numpy().var((0, 2)), rtol=rtol)


def test_a_first_image_unlike_the_others_costs_no_accuracy():
    x = torch.randn(20, 3, 10, 10)
    x[0] += 1e5
    for layout in (torch.contiguous_format, torch.channels_last):
        found = variance_of(x.contiguous(memory_format=layout))
        np.testing.assert_allclose(found, x.double().var((0, 2, 3), correction=0), rtol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("name", ["torch", "cpu", "triton"])
def test_a_constant_channel_yields_the_bias_and_finite_gradients(name, eps, ranks, request, device):
    backend = {"torch": backends.PLAIN, "cpu": backends.CPU}.get(name) or request.getfixturevalue("triton_launch")
    device = device if name == "triton" else "cpu"
    constants = torch.tensor([0.1, -1 / 3, 7e4, 0.0, 1e-30, 3.0], device=device)
    xs = [constants.view(1, 6, 1).expand(1 + rank % 3, 6, 5).contiguous() for rank in range(ranks)]
    packed = sum(backend.pack_stats(x, None) for x in xs)
    weight, bias = torch.randn(2, 6, device=device)
    y, count, channels = backend.normalize(xs[0], packed, weight, bias, Epilogue(), eps=eps, ranks=ranks, running=None)
    torch.testing.assert_close(y, bias.view(1, 6, 1).expand(y.shape), rtol=0, atol=1e-6)
    grad_output = torch.randn_like(y)
    reduced = backend.backward_reduce(grad_output, xs[0], channels, Epilogue(), backends.OutputMask(True, True, False))
    grad_input = backend.backward_elemt(grad_output, xs[0], channels, Epilogue(), reduced, count=count)
    scale = (eps**-0.5 if eps else 0) * weight.abs().max().item()
    assert grad_input.abs().max() <= 2 * scale * grad_output.abs().max()
    assert reduced.grad_weight.abs().max() < 1e-2


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_what_works_in_place_may_follow_the_layer(name, monkeypatch):
    monkeypatch.setenv("SYNCBN_BACKEND", name)
    x = torch.randn(4, 5, 6, 7)
    results = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(5, 5, 1), syncbn.SyncBatchNorm(5), torch.nn.ReLU(inplace=inplace))
        model(x).square().sum().backward()
        results.append(model[0].weight.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_the_memory_of_the_caller_stays_resizable_as_fsdp_needs_it(name, monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, name)
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64, activation="relu")  # NumPy dtypes share memory with NumPy
    x = torch.randn(4, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    syncbn.assert_replicas_equal(layer)
    gradients = [x.grad, layer.weight.grad, layer.bias.grad]
    assert all(t.untyped_storage().resizable() for t in [*layer.state_dict().values(), x, y, *gradients])


def test_the_default_device_of_the_first_call_does_not_matter(monkeypatch):
    x = torch.randn(4, 5, 6, 7)
    layer = syncbn.SyncBatchNorm(5)
    with torch.device("meta"):
        y = layer(x)
    torch.testing.assert_close(layer(x), y)


# A variance above 65504 overflows float16, but its contribution to the average may not.
@pytest.mark.parametrize("name", ["torch", "auto"])
@pytest.mark.parametrize("momentum, expected", [(0.0, 1), (0.1, 16_000)])
def test_running_statistics_are_rounded_once_they_have_moved(name, momentum, expected, monkeypatch):
    monkeypatch.setenv("SYNCBN_BACKEND", name)
    layer = syncbn.SyncBatchNorm(3, momentum=momentum).half()
    layer((torch.randn(4, 3, 8, 8) * 400).half())
    assert (layer.running_var / expected - 1).abs().max() < 0.3


def test_a_negative_view_is_read_as_what_it_stands_for():
    x = torch._neg_view(torch.randn(4, 5, 6, 7) + 3)
    layer = syncbn.SyncBatchNorm(5, momentum=1.0)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))


def test_float64_has_its_whole_range():
    x = torch.randn(40, 5, dtype=torch.float64) * 1e36 + 1e39
    y = syncbn.SyncBatchNorm(5, eps=0, dtype=torch.float64)(x)
    np.testing.assert_allclose(y.detach(), reference.batch_norm(x.numpy() / 1e36, eps=0).output, atol=1e-9)


def gradient(x):
    x = x.detach().requires_grad_()
    y = syncbn.sync_batch_norm(x, None, None, training=True, activation="relu")
    return torch.autograd.grad(y.pow(3).sum(), x)[0]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_whoever_records_operations_one_by_one_gets_all_of_them():
    x, other = torch.randn(2, 4, 5, 6, 7)
    recorded = make_fx(gradient)(x)
    layer = syncbn.SyncBatchNorm(5)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    torch.testing.assert_close(recorded(other), gradient(other))
    torch.testing.assert_close(traced(other), layer(other))
    with FlopCounterMode(display=False):
        torch.testing.assert_close(layer(x), syncbn.SyncBatchNorm(5)(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_each_traced_call_in_training_counts_one_batch_and_has_the_right_gradients():
    layer, x = syncbn.SyncBatchNorm(5), torch.randn(4, 5, 6, 7)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    before = layer.num_batches_tracked.item()
    leaf, twin = x.clone().requires_grad_(), syncbn.SyncBatchNorm(5)
    grad_output = torch.randn(x.shape)
    grads = [
        torch.autograd.grad(f(leaf), [leaf, *m.parameters()], grad_output) for f, m in ((traced, layer), (twin, twin))
    ]
    torch.testing.assert_close(*grads)
    assert layer.num_batches_tracked == before + 1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("with_mask", [False, True])
def test_running_statistics_of_a_recorded_training_step_join_no_graph(momentum, with_mask):
    layer, twin = (syncbn.SyncBatchNorm(5, momentum=momentum, activation="silu") for _ in range(2))
    x, other = torch.randn(2, 4, 5, 6, 7)
    mask = torch.rand(4, 1, 6, 7) < 0.5 if with_mask else None
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    recorded = make_fx(lambda x: layer(x, mask=mask))(x)
    layer.load_state_dict(state)
    for _ in range(2):
        leaf = other.clone().requires_grad_()
        recorded(leaf).square().sum().backward()
        twin(other, mask=mask)
    assert not any(buffer.requires_grad for buffer in layer.buffers())
    torch.testing.assert_close(copy.deepcopy(layer).state_dict(), twin.state_dict())
    assert leaf.grad.abs().max() > 0
    torch.testing.assert_close(layer.eval()(other), twin.eval()(other))


@pytest.mark.parametrize("own", [backends.PLAIN, backends.CPU], ids=["torch", "cpu"])
def test_a_negative_view_as_weight_is_read_as_what_it_stands_for(own):
    weight, x = torch.rand(5), torch.randn(4, 5, 6, 7)
    packed = own.pack_stats(x, None)
    results = [
        own.normalize(x, packed, values, None, Epilogue(), eps=1e-5, ranks=1, running=None)[0]
        for values in (-weight, torch._neg_view(weight))
    ]
    torch.testing.assert_close(*results)


def test_a_step_begun_by_one_backend_is_finished_by_it(monkeypatch):
    layer, x = syncbn.SyncBatchNorm(5, activation="relu"), torch.randn(4, 5, 6, 7, requires_grad=True)
    grad_output = torch.randn(x.shape)
    (expected,) = torch.autograd.grad(layer(x), x, grad_output)
    y = layer(x)
    monkeypatch.setenv("SYNCBN_BACKEND", "none of them")  # not read again
    assert torch.equal(torch.autograd.grad(y, x, grad_output)[0], expected)


def test_an_activation_keeps_nan_and_a_refused_count_moves_nothing(triton_launch, device):
    packed = torch.full((7,), torch.nan, dtype=torch.float64, device=device)
    running = Running(torch.zeros(3, device=device), torch.ones(3, device=device), None, 0.1)
    x = torch.randn(4, 3, device=device)
    for activation in ACTIVATIONS:
        epilogue = Epilogue(activation=activation)
        y, count, _ = triton_launch.normalize(x, packed, None, None, epilogue, eps=1e-5, ranks=2, running=running)
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
    packed = triton_launch.pack_stats(x, None)
    triton_launch.normalize(x, packed, None, None, Epilogue(), eps=1e-5, ranks=1, running=running)
    assert running.num_batches_tracked.item() == moved
    assert bool((running.mean != 0).all()) == bool((running.var != 1).all()) == moved


def test_select_follows_the_environment(monkeypatch, triton_launch):
    x = torch.randn(4, 3)
    monkeypatch.delenv("SYNCBN_BACKEND", raising=False)
    image = torch.randn(4, 3, 2, 2)
    assert backends.select(image) is backends.CPU
    for other in (x, image.to("meta"), image.contiguous(memory_format=torch.channels_last), image[:0]):
        assert backends.select(other) is backends.PLAIN
    assert backends.select(image, torch.ones(4, 1, 2, 2, dtype=torch.bool)) is backends.PLAIN
    assert backends.select(image.bfloat16()) is backends.PLAIN
    monkeypatch.setattr(cpu, "MIN_ELEMENTS", image.numel() + 1)
    assert backends.select(image) is backends.PLAIN
    monkeypatch.setenv("SYNCBN_BACKEND", "torch")
    assert backends.select(x) is backends.PLAIN
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
    with pytest.raises(ValueError, match="expected SYNCBN_BACKEND to be one of auto, torch, triton, got 'cuda'"):
        backends.select(x)


def test_where_triton_cannot_launch_it_says_so_once(triton_launch, monkeypatch, device):
    def fail(*arguments, **constexprs):
        raise RuntimeError("Failed to find C compiler.\nInstall one.")

    triton_launch.can_run.cache_clear()
    assert triton_launch.can_run(torch.device(device))
    triton_launch.can_run.cache_clear()
    monkeypatch.setattr(triton_launch, "launch", fail)
    with pytest.warns(
        UserWarning, match=r"runs in plain PyTorch on \w+, Triton launches no kernels \(RuntimeError: Fail"
    ):
        assert not triton_launch.can_run(torch.device(device))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton_launch.can_run(torch.device(device))
    triton_launch.can_run.cache_clear()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory")])
def test_being_out_of_memory_is_raised_and_not_remembered(triton_launch, monkeypatch, device, error):
    def fail(*arguments, **constexprs):
        raise error

    triton_launch.can_run.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(triton_launch, "launch", fail)
        with pytest.raises(type(error), match=str(error).split()[-1]):
            triton_launch.can_run(torch.device(device))
    assert triton_launch.can_run(torch.device(device))


def test_where_triton_is_missing_plain_pytorch_serves_and_asking_for_triton_says_so(monkeypatch):
    backends.is_triton_installed.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("SYNCBN_BACKEND", "triton")
    with pytest.raises(ValueError, match="expected Triton to be installed, got none: install triton"):
        backends.select(torch.randn(4, 3))
    monkeypatch.setenv("SYNCBN_BACKEND", "auto")
    on_cuda = torch.empty(4, 3, device="meta")
    monkeypatch.setattr(type(on_cuda), "is_cuda", True, raising=False)
    assert backends.select(on_cuda) is backends.PLAIN
    backends.is_triton_installed.cache_clear()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", ["torch", "auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_infinite_input_gives_torchs_running_statistics(name, dtype, monkeypatch, request):
    if name == "triton":
        if dtype == torch.float64:
            pytest.skip("plain operations serve float64")
        request.getfixturevalue("small_tiles")
    monkeypatch.setenv("SYNCBN_BACKEND", name)
    x = torch.randn(4, 6, 5, 3).to(dtype)
    for channel, values in enumerate(
        [[torch.inf], [-torch.inf], [torch.inf, -torch.inf], [torch.nan], [torch.inf, torch.nan]]
    ):
        for sample, value in enumerate(values):
            x[2 * sample, channel, 4, 2] = value
    x[0, 0, 0, 0] = torch.inf  # in the first tile too
    layer, expected = syncbn.SyncBatchNorm(6, momentum=0.3), torch.nn.BatchNorm2d(6, momentum=0.3)
    layer, expected = (m.double() if dtype == torch.float64 else m for m in (layer, expected))
    y, wanted = layer(x), expected(x)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(layer.state_dict(), expected.state_dict(), equal_nan=True, **tolerance)
    torch.testing.assert_close(y, wanted, equal_nan=True, **tolerance)
