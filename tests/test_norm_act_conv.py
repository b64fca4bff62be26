"""NormActConv equals norm, activation and convolutions called in turn; what it keeps and when it communicates."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn import norm_act_conv
from syncbn.activations import ACTIVATIONS
from syncbn.function import NormActConvFunction
from syncbn.module import SyncBatchNorm2d

CHANNELS = 4


class Case(NamedTuple):
    """A unit and its input."""

    convs: Callable[[], list[nn.Module]]
    shape: tuple[int, ...] = (3, CHANNELS, 7, 6)
    activation: str = "relu"
    layout: torch.memory_format = torch.contiguous_format


def conv2d(out_channels: int = 5, kernel_size: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(CHANNELS, out_channels, kernel_size, **options)


CASES = {
    "one": Case(lambda: [conv2d(bias=False)]),
    "bias": Case(lambda: [conv2d(padding=1)]),
    "shortcut": Case(lambda: [conv2d(padding=1, stride=2), conv2d(6, 1, stride=2, bias=False)]),
    "three": Case(lambda: [conv2d(), conv2d(2, (1, 5), dilation=(2, 1)), conv2d(3, 1)]),
    "groups": Case(lambda: [conv2d(8, groups=2, bias=False)]),
    "depthwise": Case(lambda: [conv2d(CHANNELS, groups=CHANNELS)]),
    "same": Case(lambda: [conv2d(padding="same", dilation=2)]),
    "valid": Case(lambda: [conv2d(padding="valid")]),
    "1d": Case(lambda: [nn.Conv1d(CHANNELS, 3, 3, padding=1, stride=2)], (5, CHANNELS, 9)),
    "3d": Case(lambda: [nn.Conv3d(CHANNELS, 3, (1, 2, 3), stride=(1, 2, 1))], (2, CHANNELS, 2, 5, 4)),
    "channels last": Case(lambda: [conv2d(padding=1), conv2d(2, 1)], layout=torch.channels_last),
    "channels last 3d": Case(
        lambda: [nn.Conv3d(CHANNELS, 3, 2)], (2, CHANNELS, 2, 5, 4), layout=torch.channels_last_3d
    ),
    "large": Case(lambda: [conv2d(2, 1)], (2, CHANNELS, 32, 1024 + 32)),  # the CPU backend
    **{activation: Case(lambda: [conv2d()], activation=activation) for activation in ACTIVATIONS},
}
TORCH_NORMS: dict[int, type] = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


class InTurn(nn.Module):
    """What the unit computes, of torch's own layers; the parameters have the same names."""

    def __init__(self, norm: nn.Module, convs: list[nn.Module], activation: str) -> None:
        super().__init__()
        self.norm, self.convs, self.activation = norm, nn.ModuleList(convs), activation

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.norm(x)
        y = y if self.activation == "identity" else getattr(F, self.activation)(y)
        return tuple(conv(y) for conv in self.convs)


def in_turn(case: Case, dtype: torch.dtype = torch.float64) -> InTurn:
    torch.manual_seed(0)
    norm = TORCH_NORMS[len(case.shape)](CHANNELS)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return InTurn(norm, case.convs(), case.activation).to(dtype)


def unit_like(plain: InTurn, norm_class: Callable[..., nn.Module] = syncbn.SyncBatchNorm) -> syncbn.NormActConv:
    """Return the unit with copies of the parameters."""
    options = {"activation": plain.activation} if norm_class in (syncbn.SyncBatchNorm, syncbn.BatchNorm) else {}
    others = {} if options else {"activation": plain.activation}
    unit = syncbn.NormActConv(norm_class(CHANNELS, **options), *copy.deepcopy(plain.convs), **others)
    unit.to(plain.norm.weight.dtype).load_state_dict(plain.state_dict())
    return unit


def as_tuple(outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def is_fused(unit: nn.Module, *args, **kwargs) -> bool:
    first = as_tuple(unit(*args, **kwargs))[0]
    return first.grad_fn is not None and first.grad_fn.name() == f"{NormActConvFunction.__name__}Backward"


def input_of(case: Case, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = (3 + 2 * torch.randn(case.shape, dtype=torch.float64, generator=generator)).to(dtype)
    return x.to(memory_format=case.layout).requires_grad_()


def step(module: nn.Module, x: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """Return outputs, gradients for random cotangents, and buffers."""
    x = x.detach().clone().requires_grad_()
    outputs = as_tuple(module(x))
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.dtype) for y in outputs]
    leaves = {"x": x, **dict(module.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, **options)
    found = {f"output {index}": y for index, y in enumerate(outputs)}
    return found | {f"grad of {name}": g for name, g in zip(leaves, grads, strict=True)} | dict(module.named_buffers())


# --- one process


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("norm", [syncbn.SyncBatchNorm, syncbn.BatchNorm, None], ids=["sync", "local", "torch"])
def test_the_unit_equals_its_modules_called_in_turn(name, norm):
    case = CASES[name]
    plain, x = in_turn(case), input_of(case)
    unit = unit_like(plain, norm or TORCH_NORMS[len(case.shape)])
    assert is_fused(copy.deepcopy(unit), x)
    torch.testing.assert_close(step(unit, x), step(plain, x), rtol=1e-12, atol=1e-12)
    plain.eval()
    unit.eval()
    assert not is_fused(unit, x)
    torch.testing.assert_close(step(unit, x), step(plain, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["one", "shortcut", "channels last", "channels last 3d", "depthwise"])
def test_outputs_and_gradients_have_the_layout_of_the_plain_modules(name):
    case = CASES[name]
    plain, x = in_turn(case), input_of(case)
    plain.to(memory_format=case.layout if len(case.shape) == 4 else torch.contiguous_format)
    unit = unit_like(plain)
    unit.load_state_dict(plain.state_dict())
    unit.to(memory_format=case.layout if len(case.shape) == 4 else torch.contiguous_format)
    strides = [{key: value.stride() for key, value in step(module, x).items()} for module in (unit, plain)]
    assert strides[0] == strides[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_dtype_equals_float64_up_to_its_rounding(dtype):
    case = CASES["shortcut"]
    plain, x = in_turn(case, dtype), input_of(case, dtype)
    unit = unit_like(plain)
    unit.norm.float()
    found, expected = step(unit, x), step(plain.double(), x.double())
    for name, value in found.items():
        wanted = torch.float32 if "norm" in name and "num" not in name else value.dtype if "num" in name else dtype
        assert value.dtype == wanted, name
        if "num" not in name:
            scale = expected[name].abs().max().item()
            bound = 8 * torch.finfo(dtype).eps * max(scale, 1)
            assert (value.double() - expected[name]).abs().max() <= bound, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtypes_and_values_of_the_plain_modules(dtype):
    case = CASES["shortcut"]
    plain = in_turn(case, torch.float32)
    unit, x = unit_like(plain), input_of(case, torch.float32)

    def forward(module):
        with torch.autocast("cpu", dtype=dtype):
            return module(x)

    assert is_fused(lambda: forward(copy.deepcopy(unit)))

    def run(module):
        outputs = forward(module)
        cotangents = [torch.ones_like(y) * torch.arange(y.shape[-1]) for y in outputs]
        leaves = {"x": x, **dict(module.named_parameters())}
        grads = torch.autograd.grad(outputs, list(leaves.values()), [c.to(dtype) for c in cotangents])
        return [*outputs, *grads]

    for found, expected in zip(run(unit), run(plain), strict=True):
        assert found.dtype == expected.dtype
        bound = 16 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_autocast_leaves_float64_alone():
    case = CASES["one"]
    unit, x = unit_like(in_turn(case)), input_of(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = step(in_turn(case), x)
        torch.testing.assert_close(step(unit, x), expected, rtol=1e-12, atol=1e-12)


LEAVES = ["x", "norm.weight", "norm.bias", "convs.0.weight", "convs.0.bias", "convs.1.weight"]


@pytest.mark.parametrize("needed", [c for n in range(1, 7) for c in itertools.combinations(LEAVES, n)], ids=" ".join)
def test_only_the_gradients_that_are_needed_are_computed_and_they_are_the_same(needed):
    case = CASES["shortcut"]
    plain, x = in_turn(case), input_of(case)
    unit, twin = unit_like(plain), x.detach().clone()
    x = x.detach()
    found = []
    for module, own in ((unit, x), (plain, twin)):
        leaves = {"x": own, **dict(module.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in needed)
        generator = torch.Generator().manual_seed(2)
        outputs = module(own)
        cotangents = [torch.randn(y.shape, dtype=y.dtype, generator=generator) for y in outputs]
        # of the plain modules, an output may need no gradient
        pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[0].requires_grad]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        found.append({name: leaf.grad for name, leaf in leaves.items()})
    assert {name for name, grad in found[0].items() if grad is not None} == set(needed)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_no_loss_reads_gets_no_gradient_for_its_convolution(used):
    case = CASES["shortcut"]
    plain, x = in_turn(case), input_of(case)
    unit = unit_like(plain)
    for module in (unit, plain):
        module(x)[used].square().sum().backward()
    grads = [{name: p.grad for name, p in module.named_parameters()} for module in (unit, plain)]
    assert grads[0][f"convs.{1 - used}.weight"] is None
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


def test_norms_without_affine_without_running_statistics_and_with_a_cumulative_average():
    case = CASES["one"]
    for options in ({"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"eps": 0.5}):
        norms = nn.BatchNorm2d(CHANNELS, **options), syncbn.SyncBatchNorm(CHANNELS, **options)
        torch.manual_seed(0)
        convs = case.convs()
        plain, unit = InTurn(norms[0], convs, "relu"), syncbn.NormActConv(norms[1], *convs, activation="relu")
        for mode in (True, True, False):
            found, expected = (step(module.double().train(mode), input_of(case)) for module in (unit, plain))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_residual_mask_and_temperature_are_those_of_the_layer():
    case = CASES["shortcut"]
    x, residual = input_of(case), torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(case.shape[0], 1, *case.shape[2:]) > 0.3
    norm = syncbn.SyncBatchNorm(CHANNELS, activation="silu", temperature=2.0, dtype=torch.float64)
    convs = nn.ModuleList(case.convs()).double()
    unit = syncbn.NormActConv(norm, *convs)
    assert is_fused(unit, x, residual, mask)
    leaves = [x, residual, *unit.parameters()]
    found, expected = unit(x, residual, mask), [conv(norm(x, residual, mask)) for conv in convs]
    cotangents = [torch.randn_like(y) for y in expected]
    torch.testing.assert_close(found, tuple(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, cotangents),
        torch.autograd.grad(expected, leaves, cotangents),
        rtol=1e-12,
        atol=1e-12,
    )


def test_the_functional_form_is_the_unit_in_training_and_in_evaluation():
    case = CASES["three"]
    plain, x = in_turn(case), input_of(case)
    norm = plain.norm
    convolutions = [
        syncbn.Convolution(c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups) for c in plain.convs
    ]
    for training in (True, False):
        plain.train(training)
        buffers = norm.running_mean.clone(), norm.running_var.clone()
        found = syncbn.sync_norm_act_conv(
            x, *buffers, norm.weight, norm.bias, convolutions, training, activation=case.activation
        )
        expected = plain(x)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(buffers, (norm.running_mean, norm.running_var))
        cotangents = [torch.randn_like(y) for y in expected]
        leaves = [x, *plain.parameters()]
        grads = [torch.autograd.grad(outputs, leaves, cotangents) for outputs in (found, expected)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="expected at least one convolution, got none"):
        syncbn.sync_norm_act_conv(x, None, None, None, None, [], True)


# --- what is kept


def kept_storages(run: Callable[[], object]) -> list[torch.Tensor]:
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return list(kept.values())


@pytest.mark.parametrize("norm", [syncbn.SyncBatchNorm, syncbn.BatchNorm, nn.BatchNorm2d])
@pytest.mark.parametrize("name", ["one", "shortcut", "channels last", "gelu", "large"])
def test_of_the_activations_only_the_input_is_kept(name, norm):
    case = CASES[name]
    unit, x = unit_like(in_turn(case), norm), input_of(case)
    own = {tensor.data_ptr() for tensor in (*unit.parameters(), *unit.buffers())}
    kept = [tensor for tensor in kept_storages(lambda: unit(x)) if tensor.data_ptr() not in own]
    assert [tensor.data_ptr() for tensor in kept if tensor.numel() >= x.numel()] == [x.data_ptr()]
    assert sum(tensor.numel() for tensor in kept) - x.numel() <= 6 * CHANNELS + 1


def test_a_parameter_that_is_changed_before_backward_raises_as_for_plain_modules():
    case = CASES["one"]
    for name in ("convs.0.weight", "norm.weight"):
        unit = unit_like(in_turn(case))
        y = unit(input_of(case))
        with torch.no_grad():
            unit.get_parameter(name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_backward_twice_needs_retain_graph():
    case = CASES["one"]
    unit, x = unit_like(in_turn(case)), input_of(case)
    y = unit(x).square().sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    y.backward()
    torch.testing.assert_close(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


# --- where the modules are called in turn


def plain_copy(unit: syncbn.NormActConv) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Return what the unit should compute, by calls of its modules."""

    def run(x):
        y = ACTIVATIONS[unit.activation].apply(unit.norm(x))
        return tuple(conv(y) for conv in unit.convs)

    return run


class Doubled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class Shifted(syncbn.SyncBatchNorm):
    def forward(self, input, residual=None, mask=None):
        return super().forward(input, residual, mask) + 1


def with_hook(part: str, kind: str) -> syncbn.NormActConv:
    unit = unit_like(in_turn(CASES["shortcut"]))
    module = unit.get_submodule(part)
    if kind == "forward":
        module.register_forward_hook(lambda m, args, output: output * 2)
    if kind == "pre":
        module.register_forward_pre_hook(lambda m, args: (args[0].square(),))
    if kind == "backward":
        module.register_full_backward_hook(lambda m, grads, _: tuple(3 * g for g in grads))
    if kind == "backward pre":
        module.register_full_backward_pre_hook(lambda m, grads: tuple(3 * g for g in grads))
    if kind == "instance":
        original = module.forward
        module.forward = lambda x: original(x) * 2
    return unit


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward pre", "instance"])
@pytest.mark.parametrize("part", ["norm", "convs.0", "convs.1"])
def test_hooks_on_the_modules_run(part, kind):
    x = input_of(CASES["shortcut"])
    unit = with_hook(part, kind)
    assert not is_fused(copy.deepcopy(unit) if kind != "instance" else unit, x)
    outputs, expected = unit(x), plain_copy(unit)(x)
    plain = unit_like(in_turn(CASES["shortcut"]))
    changed = any((a - b).abs().max() > 1e-3 for a, b in zip(outputs, plain(x), strict=True))
    assert changed == (not kind.startswith("backward"))
    grads = [
        torch.autograd.grad(y, [x, *unit.parameters()], [torch.ones_like(t) for t in y]) for y in (outputs, expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_a_hook_for_all_modules_runs_for_each():
    unit, x = unit_like(in_turn(CASES["shortcut"])), input_of(CASES["shortcut"])
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    try:
        assert not is_fused(unit, x)
    finally:
        handle.remove()
    assert calls[:3] == ["SyncBatchNorm", "Conv2d", "Conv2d"]
    assert is_fused(unit, x)


def parametrized(how: str) -> syncbn.NormActConv:
    unit = unit_like(in_turn(CASES["shortcut"]))
    if how == "weight_norm":
        parametrizations.weight_norm(unit.convs[0])
    if how == "spectral_norm":
        parametrizations.spectral_norm(unit.convs[0])
    if how == "norm":
        parametrize.register_parametrization(unit.norm, "weight", nn.Softplus())
    if how == "subclass of convolution":
        unit.convs[0].__class__ = Doubled
    if how == "subclass of norm":
        unit.norm.__class__ = Shifted
    if how == "reflect":
        unit.convs[0] = conv2d(3, padding=1, padding_mode="reflect").double()
    if how == "unequal same":
        unit.convs[0] = conv2d(3, 2, padding="same").double()
    return unit


@pytest.mark.parametrize(
    "how",
    ["weight_norm", "spectral_norm", "norm", "subclass of convolution", "subclass of norm", "reflect", "unequal same"],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
def test_modules_that_compute_something_else_are_called_in_turn(how):
    x, unit = input_of(CASES["shortcut"]), parametrized(how)
    twin = copy.deepcopy(unit)
    assert not is_fused(copy.deepcopy(unit), x)
    outputs, expected = unit(x), plain_copy(twin)(x)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-12)
    cotangents = [torch.randn_like(y) for y in outputs]
    grads = [
        torch.autograd.grad(y, [x, *module.parameters()], cotangents)
        for y, module in ((outputs, unit), (expected, twin))
    ]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, CHANNELS), nn.InstanceNorm2d(CHANNELS), nn.Identity(), None])
def test_any_other_norm_or_none_stands_in_front_of_the_activation(norm):
    x, conv = input_of(CASES["one"], torch.float32), conv2d()
    unit = syncbn.NormActConv(norm, conv, activation="relu")
    assert not is_fused(unit, x)
    expected = conv((x if norm is None else norm(x)).relu())
    torch.testing.assert_close(unit(x), expected)
    assert set(unit.state_dict()) >= {"convs.0.weight", "convs.0.bias"}


def test_the_hook_attributes_of_torch_have_the_names_that_the_unit_looks_at():
    names = norm_act_conv._HOOKS
    module = nn.Conv2d(1, 1, 1)
    module.register_forward_hook(print)
    module.register_forward_pre_hook(print)
    module.register_full_backward_hook(print)
    module.register_full_backward_pre_hook(print)
    found = {name for name, value in vars(module).items() if isinstance(value, dict) and print in value.values()}
    assert found == set(names)
    assert all(isinstance(getattr(nn.modules.module, name), dict) for name in norm_act_conv._GLOBAL_HOOKS)
    for name, register in zip(norm_act_conv._TENSOR_HOOKS, ("hook", "post_accumulate_grad_hook"), strict=True):
        weight = nn.Parameter(torch.ones(1))
        assert not getattr(weight, name)
        getattr(weight, f"register_{register}")(print)
        assert print in getattr(weight, name).values()


# --- errors


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((3, nn.Conv2d(4, 4, 1)), TypeError, "expected norm to be a module or None, got int"),
        ((nn.BatchNorm2d(4),), TypeError, r"expected one or more nn.Conv1d, .* got none"),
        ((nn.BatchNorm2d(4), nn.Linear(4, 4)), TypeError, r"after the norm, got Linear"),
        ((nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 1)), TypeError, r"after the norm, got ConvTranspose2d"),
        ((nn.BatchNorm2d(4), nn.Conv2d(8, 4, 1)), ValueError, r"convolutions of the 4 channels of the norm, got 8"),
    ],
)
def test_the_constructor_says_what_it_expects(arguments, error, message):
    with pytest.raises(error, match=message):
        syncbn.NormActConv(*arguments)


def test_an_activation_is_known_and_given_once():
    with pytest.raises(ValueError, match="expected activation"):
        syncbn.NormActConv(nn.BatchNorm2d(4), conv2d(), activation="swish")
    with pytest.raises(ValueError, match="expected one activation, got relu in the norm and activation='silu'"):
        syncbn.NormActConv(syncbn.SyncBatchNorm(4, activation="relu"), conv2d(), activation="silu")


@pytest.mark.parametrize("shape", [(2, CHANNELS + 1, 5, 5), (2, CHANNELS), (1, CHANNELS, 1, 1), (2, CHANNELS, 2, 2)])
def test_bad_input_raises_a_value_error_where_the_modules_raise(shape):
    unit = unit_like(in_turn(CASES["one"], torch.float32))
    x = torch.randn(shape)
    with pytest.raises(ValueError, match="expected"):
        unit(x)
    with pytest.raises((ValueError, RuntimeError)):
        plain_copy(unit)(x)


BAD = {  # arguments of sync_norm_act_conv or of its convolution
    "no convolution": ({"convolutions": []}, "expected at least one convolution, got none"),
    "channels": ({"weight": torch.ones(2, 3, 1, 1)}, r"expected input of shape \(N, 3, size, size\) for a convolution"),
    "dims": ({"weight": torch.ones(2, 4, 1)}, r"expected input of shape \(N, 4, size\) for a convolution"),
    "kernel": ({"weight": torch.ones(2, 4, 9, 1)}, "expected input at least as large as the kernel"),
    "dtype": ({"weight": torch.ones(2, 4, 1, 1).double()}, "expected parameters in torch.float32 on cpu"),
    "bias": ({"bias": torch.ones(2).double()}, "expected parameters in torch.float32 on cpu"),
    "device": ({"weight": torch.ones(2, 4, 1, 1, device="meta")}, "got torch.float32 on meta"),
    "padding": ({"padding": "full"}, "expected padding of numbers, 'same' or 'valid', got 'full'"),
    "same": ({"padding": "same", "weight": torch.ones(2, 4, 2, 2)}, "expected equally many zeros on both sides"),
    "stride": ({"stride": (1, 2, 3)}, "expected 2 numbers of stride, padding and dilation"),
}


def call_functional(options: dict, x: object, *, training: bool = True) -> None:
    options = dict(options)
    convolutions = options.pop("convolutions", None)
    if convolutions is None:
        convolutions = [syncbn.Convolution(**{"weight": torch.ones(2, 4, 1, 1)} | options)]
    syncbn.sync_norm_act_conv(x, torch.zeros(4), torch.ones(4), None, None, convolutions, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_the_functional_form_says_what_it_expects(name, training):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call_functional(options, torch.randn(2, 4, 5, 5), training=training)


def test_under_autocast_float64_weights_are_not_converted():
    unit = unit_like(in_turn(CASES["one"], torch.float32))
    unit.convs.double()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="expected parameters in"):
        unit(input_of(CASES["one"], torch.float32))


def test_call_fused_checks_what_the_unit_checks():
    conv, x = conv2d(), torch.randn(2, CHANNELS, 5, 5)
    norm = syncbn.BatchNorm(CHANNELS, activation="gelu")
    for training in (True, False):
        with pytest.raises(ValueError, match="expected one activation, got gelu in the norm and activation='silu'"):
            syncbn.call_fused(norm.train(training), [conv], x, activation="silu")
        with pytest.raises(ValueError, match="expected activation"):
            syncbn.call_fused(norm, [conv], x, activation="selu")
        with pytest.raises(TypeError, match="got none"):
            syncbn.call_fused(norm, [], x)
        plain = nn.BatchNorm2d(CHANNELS).train(training)
        with pytest.raises(TypeError, match="expected a layer of syncbn in front of a residual, got BatchNorm2d"):
            syncbn.call_fused(plain, [conv], x, x)
        with pytest.raises(TypeError, match="expected a layer of syncbn in front of a mask, got GroupNorm"):
            syncbn.call_fused(nn.GroupNorm(2, CHANNELS), [conv], x, mask=x > 0)
    torch.testing.assert_close(syncbn.call_fused(None, [conv], x, activation="relu"), (conv(x.relu()),))


def test_attributes_of_torchs_layer_are_not_taken_for_ours():
    norm, conv, x = nn.BatchNorm2d(CHANNELS), conv2d(), torch.randn(2, CHANNELS, 5, 5)
    expected = conv(norm(x))
    for activation, temperature in (("relu", 3.0), (nn.ReLU(), None)):
        norm.activation, norm.temperature = activation, temperature
        torch.testing.assert_close(syncbn.call_fused(norm, [conv], x)[0], expected)


def test_lazy_and_reconfigured_convolutions():
    x = torch.randn(2, CHANNELS, 6, 6)
    unit = syncbn.NormActConv(syncbn.SyncBatchNorm(CHANNELS), nn.LazyConv2d(3, 3))
    assert unit(x).shape == (2, 3, 4, 4)
    conv = conv2d()
    conv.padding, conv.stride, conv.dilation = 1, 2, 2
    norm = nn.BatchNorm2d(CHANNELS)
    found = syncbn.NormActConv(norm, conv)(x)
    assert found.grad_fn.name() == "NormActConvFunctionBackward"
    torch.testing.assert_close(found, conv(norm(x)))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_the_hook_of_a_parameter_runs_only_if_its_output_is_read(register):
    unit, x = unit_like(in_turn(CASES["shortcut"])), input_of(CASES["shortcut"])
    calls = []
    for conv in unit.convs:
        getattr(conv.weight, register)(lambda grad: calls.append(grad.shape))
    unit(x)[0].sum().backward()
    assert calls == [unit.convs[0].weight.shape]
    single = syncbn.NormActConv(unit.norm, unit.convs[0])
    assert is_fused(single, x)
    single(x).sum().backward()
    assert len(calls) == 2


def test_a_norm_may_be_called_alone_and_in_a_unit():
    norm, conv = nn.BatchNorm2d(CHANNELS), conv2d(CHANNELS, padding=1)
    twins = copy.deepcopy(norm), copy.deepcopy(conv)
    x = torch.randn(3, CHANNELS, 6, 6, requires_grad=True)
    found = syncbn.call_fused(norm, [conv], norm(x), activation="relu")[0]
    expected = twins[1](twins[0](twins[0](x)).relu())
    grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.state_dict(), twins[0].state_dict())


@pytest.mark.parametrize("hook", ["register_hook", "node", "prehook"])
def test_a_forward_pass_in_a_hook_at_the_unit_moves_statistics(hook):
    unit, other = unit_like(in_turn(CASES["one"])), syncbn.BatchNorm(CHANNELS, dtype=torch.float64)
    x = input_of(CASES["one"])
    y = unit(x)

    def run(*_):
        other(x.detach())

    register = {
        "register_hook": y.register_hook,
        "node": y.grad_fn.register_hook,
        "prehook": y.grad_fn.register_prehook,
    }
    register[hook](run)
    y.sum().backward()
    assert other.num_batches_tracked == 1


def test_scripting_is_refused():
    unit = unit_like(in_turn(CASES["one"])).eval()
    with pytest.raises(TypeError, match=r"expected torch's own layers for torch.jit.script, got a NormActConv"):
        torch.jit.script(unit)


# --- derivatives, tools


def test_second_derivatives_of_a_single_output_channel_in_channels_last():
    unit = syncbn.NormActConv(nn.BatchNorm2d(CHANNELS), conv2d(1)).double().to(memory_format=torch.channels_last)
    x = input_of(CASES["channels last"])
    leaves = [x, *unit.parameters()]
    found = torch.autograd.grad(unit(x).square().sum(), leaves, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(unit(x).square().sum(), leaves), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["shortcut", "depthwise", "1d", "silu", "gelu", "channels last"])
def test_first_and_second_derivatives_pass_gradcheck(name):
    case = CASES[name]._replace(shape=(2, *CASES[name].shape[1:]))
    plain = in_turn(case)
    norm, geometry = plain.norm, [(c.stride, c.padding, c.dilation, c.groups) for c in plain.convs]
    x = input_of(case)
    leaves = [
        x,
        norm.weight,
        norm.bias,
        *(p for conv in plain.convs for p in (conv.weight, conv.bias) if p is not None),
    ]

    def run(x, weight, bias, *parameters):
        given = iter(parameters)
        convolutions = [
            syncbn.Convolution(next(given), next(given) if conv.bias is not None else None, *options)
            for conv, options in zip(plain.convs, geometry, strict=True)
        ]
        return syncbn.sync_norm_act_conv(
            x, None, None, weight, bias, convolutions, training=True, activation=case.activation
        )

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_gradients_under_create_graph_are_the_same_with_parameters_frozen_or_not():
    case = CASES["shortcut"]
    for frozen in ((), ("norm.weight",), ("convs.0.weight", "convs.1.weight"), ("norm.bias", "convs.0.bias")):
        unit = unit_like(in_turn(case))
        for name in frozen:
            unit.get_parameter(name).requires_grad_(False)
        found, expected = (step(copy.deepcopy(unit), input_of(case), create_graph=how) for how in (True, False))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_transforms_of_torch_func_give_the_derivatives_of_the_plain_modules():
    case = CASES["shortcut"]
    plain, x = in_turn(case), input_of(case).detach()
    unit = unit_like(plain)

    def loss(module):
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

        def of(parameters, x):
            own = {name: buffer.clone() for name, buffer in buffers.items()}
            outputs = torch.func.functional_call(module, parameters | own, (x,))
            return sum(y.square().sum() for y in outputs)

        return of

    found, expected = (
        torch.func.grad(loss(module), (0, 1))(dict(module.named_parameters()), x) for module in (unit, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_neither_gradients_nor_statistics(use_reentrant):
    case = CASES["shortcut"]
    plain, x = in_turn(case), input_of(case)
    unit = unit_like(plain)

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.convs = unit.norm, unit.convs

        def forward(self, x):
            return checkpoint(unit, x, use_reentrant=use_reentrant)

    if use_reentrant:
        for module in (plain, unit):
            y = as_tuple(checkpoint(module, x, use_reentrant=True))
            sum(t.square().sum() for t in y).backward()
        found, expected = ([p.grad for p in module.parameters()] for module in (unit, plain))
    else:
        found, expected = step(Checkpointed(), x), step(plain, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert unit.norm.num_batches_tracked == 1


def test_copies_and_pickles_are_units_with_their_own_parameters():
    case = CASES["shortcut"]
    unit, x = unit_like(in_turn(case)), input_of(case)
    unit(x)
    expected = step(copy.deepcopy(unit), x)
    buffer = io.BytesIO()
    torch.save(unit, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit)), torch.load(buffer, weights_only=False)):
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in unit.parameters()}
        assert is_fused(copy.deepcopy(twin), x)
        torch.testing.assert_close(step(twin, x), expected, rtol=0, atol=0)


def test_a_compiled_unit_is_one_graph_of_plain_operations():
    torch.compiler.reset()
    case = CASES["shortcut"]
    plain, x = in_turn(case, torch.float32), input_of(case, torch.float32)
    unit = unit_like(plain)
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(list(step(compiled, x).values()), list(step(plain, x).values()), rtol=1e-4, atol=1e-4)


def test_export_and_onnx_see_the_modules_alone():
    unit, x = unit_like(in_turn(CASES["shortcut"], torch.float32)).eval(), input_of(CASES["shortcut"], torch.float32)
    expected = unit(x.detach())
    program = torch.export.export(unit, (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach()), expected)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("syncbn" in target or "autograd" in target for target in targets)
    traced = torch.jit.trace(unit, x.detach())
    torch.testing.assert_close(traced(x.detach()), expected)


def test_the_norm_inside_is_converted_and_reverted_in_place():
    case = CASES["shortcut"]
    plain, x = in_turn(case), input_of(case)
    model = nn.Sequential(unit_like(plain, nn.BatchNorm2d))
    expected = step(plain, x)
    converted = syncbn.convert_sync_batchnorm(model)
    assert type(converted[0].norm) is SyncBatchNorm2d
    assert is_fused(copy.deepcopy(converted), x)
    found = step(copy.deepcopy(converted), x)
    torch.testing.assert_close(list(found.values()), list(expected.values()), rtol=1e-12, atol=1e-12)
    reverted = syncbn.revert_sync_batchnorm(converted)
    assert type(reverted[0].norm) is nn.BatchNorm2d
    assert is_fused(reverted, x)
