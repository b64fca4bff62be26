"""fuse(model): what becomes a unit, what does not and why, and that the model stays what it was."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from ranks import run_ranks
from slow import all_but
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock

import syncbn
from syncbn.function import NormActConvFunction
from train.preact_resnet import preact_resnet


class Recorded:
    """Counts, while active, the calls of units that ran as one Function."""

    def __enter__(self) -> "Recorded":
        self.calls, self.original = 0, NormActConvFunction.apply

        def counted(*args):
            self.calls += 1
            return self.original(*args)

        NormActConvFunction.apply = counted
        return self

    def __exit__(self, *_: object) -> None:
        del NormActConvFunction.apply


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return output, gradients for a random cotangent, and buffers."""
    x = x.detach().clone().requires_grad_()
    y = model(x)
    leaves = {"x": x, **dict(model.named_parameters())}
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True)
    return {"output": y.detach()} | dict(zip(leaves, grads, strict=True)) | dict(model.named_buffers())


def assert_same(fused: nn.Module, model: nn.Module, x: torch.Tensor, tolerance: float = 1e-12) -> None:
    found, expected = step(fused, x), step(model, x)
    for name, value in expected.items():
        scale = max(1.0, value.double().abs().max().item())
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach() if tensor.is_leaf else tensor  # keeps the storage, so that no address comes back

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    assert y.requires_grad
    return sum(kept.values())


# --- whole networks

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, float]] = {  # fused, of how many, bytes kept at most
    "torchvision resnet50": (lambda: torchvision.models.resnet50(num_classes=5), 32, 53, 0.86),
    "torchvision densenet121": (lambda: torchvision.models.densenet121(num_classes=5), 119, 121, 0.6),
    "timm resnetv2_50": (lambda: timm.create_model("resnetv2_50", num_classes=5), 48, 49, 0.65),
    "pre-activation 50": (lambda: preact_resnet(50, nn.BatchNorm2d, num_classes=5, fused=False), 48, 49, 0.55),
}


NORMS = {"sync": syncbn.convert_sync_batchnorm, "local": lambda model: model}
QUICK = [("torchvision resnet50", "sync"), ("pre-activation 50", "local")]


@pytest.mark.parametrize("name, norm", all_but(QUICK, itertools.product(NETWORKS, NORMS)))
def test_a_fused_network_is_the_same_network_and_keeps_less(name, norm):
    make, fused_norms, norms, bar = NETWORKS[name]
    torch.manual_seed(0)
    model = NORMS[norm](make().double())
    fused = syncbn.fuse(model)
    report = syncbn.fusion_report(fused)
    assert (len(report.fused), len(report.fused) + len(report.left)) == (fused_norms, norms)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert all(own is theirs for own, theirs in zip(fused.parameters(), model.parameters(), strict=True))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with Recorded() as recorded:
        fused(x)
    assert recorded.calls == fused_norms
    assert kept_bytes(fused, x) <= bar * kept_bytes(model, x)
    twin = copy.deepcopy(model)
    assert_same(fused, twin, x)
    twin.eval()
    torch.testing.assert_close(fused.eval()(x), twin(x), rtol=1e-12, atol=1e-12)


def test_a_network_made_of_units_is_one_that_fuse_finds_nothing_more_in():
    torch.manual_seed(0)
    units, modules = (preact_resnet(18, nn.BatchNorm2d, num_classes=5, fused=fused, width=8) for fused in (True, False))
    modules.load_state_dict(units.state_dict())
    x = torch.randn(2, 3, 32, 32)
    counts = []
    for model in (units, syncbn.fuse(modules), syncbn.fuse(units)):
        with Recorded() as recorded:
            model(x)
        counts.append(recorded.calls)
    assert counts == [15, 15, 15]  # of 17 norms; the first is read by an addition too, the last by the mean


def train_on_ranks(fused: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).double()
    model = syncbn.convert_sync_batchnorm(model)
    model = DistributedDataParallel(syncbn.fuse(model) if fused else model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for _ in range(2):
        x = torch.randn(2 + torch.distributed.get_rank(), 3, 32, 32, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return model.module.state_dict()


def test_a_fused_network_trains_under_ddp_as_the_network_it_was():
    for found, expected in zip(run_ranks(2, train_on_ranks, True), run_ranks(2, train_on_ranks, False), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# --- chains


class Chain(nn.Module):
    """conv1, norm, activation, conv2; the activation is a function of the norm's output."""

    def __init__(self, activate: Callable, module: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3)
        self.norm = nn.BatchNorm2d(4) if norm is None else norm
        self.act = module
        self.activate = activate
        nn.init.normal_(self.conv1.weight, std=3.0)

    def forward(self, x):
        return self.conv2(self.activate(self, self.norm(self.conv1(x))))


def module(self, y):
    return self.act(y)


FUSED = {
    "nothing": (lambda self, y: y, None, "conv2"),
    "nn.ReLU": (module, nn.ReLU(), "relu -> conv2"),
    "nn.ReLU in place": (module, nn.ReLU(inplace=True), "relu -> conv2"),
    "nn.Identity, nn.ReLU": (module, nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity()), "relu -> conv2"),
    "F.relu": (lambda self, y: F.relu(y), None, "relu -> conv2"),
    "F.relu in place": (lambda self, y: F.relu(y, inplace=True), None, "relu -> conv2"),
    "F.relu in place, by position": (lambda self, y: F.relu(y, True), None, "relu -> conv2"),
    "F.relu_": (lambda self, y: F.relu_(y), None, "relu -> conv2"),
    "torch.relu": (lambda self, y: torch.relu(y), None, "relu -> conv2"),
    "torch.relu_": (lambda self, y: torch.relu_(y), None, "relu -> conv2"),
    "method": (lambda self, y: y.relu(), None, "relu -> conv2"),
    "method in place": (lambda self, y: y.relu_(), None, "relu -> conv2"),
    "nn.ReLU6": (module, nn.ReLU6(), "relu6 -> conv2"),
    "F.relu6": (lambda self, y: F.relu6(y), None, "relu6 -> conv2"),
    "nn.SiLU": (module, nn.SiLU(inplace=True), "silu -> conv2"),
    "F.silu": (lambda self, y: F.silu(y), None, "silu -> conv2"),
    "nn.GELU": (module, nn.GELU(), "gelu -> conv2"),
    "F.gelu": (lambda self, y: F.gelu(y), None, "gelu -> conv2"),
    "nn.Hardswish": (module, nn.Hardswish(), "hardswish -> conv2"),
    "F.hardswish": (lambda self, y: F.hardswish(y, inplace=True), None, "hardswish -> conv2"),
    "nn.LeakyReLU": (module, nn.LeakyReLU(), "leaky_relu -> conv2"),
    "F.leaky_relu": (lambda self, y: F.leaky_relu(y, 0.01), None, "leaky_relu -> conv2"),
}


@pytest.mark.parametrize("name", FUSED)
def test_an_activation_is_recognized_as_module_function_and_method(name):
    activate, act, expected = FUSED[name]
    model = Chain(activate, act).double()
    fused = syncbn.fuse(copy.deepcopy(model))
    assert syncbn.fusion_report(fused).fused == {"norm": expected}
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with Recorded() as recorded:
        fused(x)
    assert recorded.calls == 1
    model(x)
    assert_same(fused, model, x)


class NotRelu(nn.ReLU):
    def forward(self, input):
        return super().forward(input) + 1


LEFT = {
    "another slope": (module, nn.LeakyReLU(0.2), "act (LeakyReLU)"),
    "another slope, function": (lambda self, y: F.leaky_relu(y, 0.2), None, "leaky_relu"),
    "tanh approximation": (module, nn.GELU(approximate="tanh"), "act (GELU)"),
    "tanh approximation, function": (lambda self, y: F.gelu(y, approximate="tanh"), None, "gelu"),
    "sigmoid": (module, nn.Sigmoid(), "act (Sigmoid)"),
    "subclass": (module, NotRelu(), "add"),
    "dropout": (lambda self, y: F.dropout(y.relu(), 0.0), None, "dropout"),
    "pooling": (lambda self, y: F.avg_pool2d(y.relu(), 1), None, "avg_pool2d"),
    "two activations": (lambda self, y: F.silu(y.relu()), None, "silu"),
    "sum": (lambda self, y: y.relu() + y, None, "relu"),
}


@pytest.mark.parametrize("name", LEFT)
def test_anything_else_is_left_as_it_is_and_named(name):
    activate, act, reader = LEFT[name]
    model = Chain(activate, act).double()
    fused = syncbn.fuse(copy.deepcopy(model))
    report = syncbn.fusion_report(fused)
    assert not report.fused
    assert reader in report.left["norm"], report.left
    assert "norm: left, " in str(report)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert_same(fused, model, x)


class Doubled(nn.Conv2d):
    def forward(self, input):
        return 2 * super().forward(input)


class OwnForward(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) + 1


class Various(nn.Module):
    """Chains that cannot be fused, and the one at the end that can."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("returned", "twice", "own", "doubled", "reflect", "residual", "unused", "good", "functional"):
            self.add_module(f"norm_{name}", nn.BatchNorm2d(4))
        self.norm_own = OwnForward(4)
        self.norm_skipped = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 1)
        self.doubled = Doubled(4, 4, 1)
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.good = nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        returned = self.norm_returned(x)
        x = self.conv(returned)
        x = self.conv(self.norm_twice(x).relu())
        x = self.conv(self.norm_twice(x).relu())
        x = self.conv(self.norm_own(x))
        x = self.doubled(self.norm_doubled(x).relu())
        x = self.reflect(self.norm_reflect(x).relu())
        h = self.norm_residual(x).relu()
        x = self.conv(h) + h
        self.norm_unused(x)
        x = F.conv2d(self.norm_functional(x), self.weight)
        y = F.relu(self.norm_good(x), inplace=True)
        return self.good(y) + self.shortcut(y) + returned


def test_the_report_says_of_each_norm_why_it_was_left():
    model = Various().double()
    fused = syncbn.fuse(copy.deepcopy(model))
    report = syncbn.fusion_report(fused)
    assert report.fused == {"norm_twice": "relu -> conv", "norm_good": "relu -> good, shortcut"}
    assert report.left == {
        "norm_returned": "it is read by add, which is no convolution",
        "norm_own": "OwnForward does something else than normalize and activate",
        "norm_doubled": "doubled is a Doubled, not one of torch's convolutions",
        "norm_reflect": "reflect pads with other values than zeros, or by different amounts on both sides",
        "norm_residual": "it is read by add, which is no convolution",
        "norm_unused": "nothing reads its output",
        "norm_functional": "it is read by conv2d, which is no convolution",
        "norm_skipped": "it is not called in the forward pass that torch.fx traced",
    }
    assert str(report).startswith("2 of 10 batch normalizations fused\n  norm_twice -> relu -> conv\n")
    assert_same(fused, model, torch.randn(2, 4, 6, 6, dtype=torch.float64))


# --- the model stays what it was


def small() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 5, 3))
    return nn.Sequential(block, nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1), nn.Flatten())


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))


def test_the_model_itself_is_unchanged_and_shares_its_parameters():
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fused = syncbn.fuse(model)
    assert type(model) is nn.Sequential
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        fused.get_parameter("0.0.weight").add_(1)
    assert torch.equal(model[0][0].weight, before["0.0.weight"] + 1)
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict", "fused again", "traced again"])
def test_copies_of_a_fused_model_compute_the_same(how):
    fused = syncbn.fuse(small())
    if how == "deepcopy":
        twin = copy.deepcopy(fused)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(fused))
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    elif how == "state_dict":
        twin = syncbn.fuse(nn.Sequential(*small()))
        assert twin.load_state_dict(fused.state_dict()) == ([], [])
    elif how == "fused again":
        twin = syncbn.fuse(copy.deepcopy(fused))
    else:
        twin = fx.symbolic_trace(copy.deepcopy(fused))
    assert list(twin.state_dict()) == list(fused.state_dict())
    with Recorded() as recorded:
        found = step(twin, images())
    assert recorded.calls == 2
    torch.testing.assert_close(found, step(fused, images()), rtol=0, atol=0)
    if how != "traced again":
        assert len(syncbn.fusion_report(twin).fused) == 2


@pytest.mark.parametrize("order", ["convert, fuse", "fuse, convert"])
def test_a_fused_model_is_converted_reverted_and_switched_to_evaluation(order):
    plain = small().double()
    model = copy.deepcopy(plain)
    if order == "convert, fuse":
        model = syncbn.fuse(syncbn.convert_sync_batchnorm(model))
    else:
        model = syncbn.convert_sync_batchnorm(syncbn.fuse(model))
    assert sum(isinstance(m, syncbn.SyncBatchNorm) for m in model.modules()) == 2
    with Recorded() as recorded:
        found = step(model, images(torch.float64))
    assert recorded.calls == 2
    torch.testing.assert_close(list(found.values()), list(step(plain, images(torch.float64)).values()))
    syncbn.revert_sync_batchnorm(model)
    assert not any(isinstance(m, syncbn.SyncBatchNorm) for m in model.modules())
    with Recorded() as recorded:
        model(images(torch.float64))
    assert recorded.calls == 1 + 1
    plain(images(torch.float64))
    torch.testing.assert_close(model.eval()(images(torch.float64)), plain.eval()(images(torch.float64)))


def test_a_fused_model_compiles_exports_and_keeps_hooks():
    torch.compiler.reset()
    model = small()
    calls = []
    model[0][1].register_forward_hook(lambda *_: calls.append("hook"))
    fused = syncbn.fuse(model)
    expected = model(images())
    calls.clear()
    torch.testing.assert_close(fused(images()), expected)
    assert calls == ["hook"]
    model[0][1]._forward_hooks.clear()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected)
    fused.eval()
    program = torch.export.export(fused, (images(),)).module()
    torch.testing.assert_close(program(images()), fused(images()))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_every_module_stays(training):
    model = nn.Sequential(small(), nn.Dropout(0.5)).train(training)
    model[0][0][1].train(not training)  # a frozen norm, say
    model[1].train(not training)
    before = {name: module.training for name, module in model.named_modules()}
    fused = syncbn.fuse(model)
    for modules in (model, fused):
        assert {name: m.training for name, m in modules.named_modules()}.items() <= before.items()


def hooked(where: str) -> tuple[nn.Module, list[str]]:
    model, calls = nn.Sequential(small()), []

    def double(module, args, output):
        calls.append(where)
        return 2 * output

    if where == "forward":
        relu = model.get_submodule("0.0.2")
        original = relu.forward
        relu.forward = lambda x: double(relu, x, original(x))
    elif where == "identity":
        model.get_submodule("0.0")[1] = nn.Sequential(nn.BatchNorm2d(4), nn.Identity())
        model.get_submodule("0.0.1.1").register_forward_hook(double)
    else:
        model.get_submodule(where).register_forward_hook(double)
    return model, calls


@pytest.mark.parametrize(
    "where, fused", [("0.0.2", ["0.1"]), ("0.0", ["0.1"]), ("forward", ["0.1"]), ("identity", ["0.1"]), ("0", [])]
)
def test_activations_and_containers_with_hooks_are_called_as_they_are(where, fused):
    model, calls = hooked(where)
    result = syncbn.fuse(model)
    report = syncbn.fusion_report(result)
    assert list(report.fused) == fused
    if where in ("0", "0.0"):
        assert f"it is inside {where}, which has hooks" in report.left["0.0.1"]
    calls.clear()
    found = result(images())
    assert len(calls) == 1
    torch.testing.assert_close(found, model(images()))
    assert list(result.state_dict()) == list(model.state_dict())


def test_hooks_and_a_forward_of_the_model_itself_are_refused():
    for prepare in (lambda m: m.register_forward_hook(print), lambda m: setattr(m, "forward", m.forward)):
        model = small()
        prepare(model)
        with pytest.raises(
            TypeError, match="expected a model whose call is the forward of its class, got a Sequential"
        ):
            syncbn.fuse(model)


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        x = x * 1
        y = self.norm(x)
        x.square_()
        return self.conv(y.relu())


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_an_input_that_is_overwritten_behind_the_norm(training):
    model = Overwrites().train(training)
    torch.testing.assert_close(syncbn.fuse(copy.deepcopy(model))(images()), model(images()))


class Alone(nn.Module):
    """A norm that is called twice, once in front of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.conv(input=self.norm(input=self.norm(x).sin()))


def test_a_norm_with_another_call_is_left():
    model = Alone()
    fused = syncbn.fuse(copy.deepcopy(model))
    assert syncbn.fusion_report(fused) == ({}, {"norm": "it is read by sin, which is no convolution"})
    assert_same(fused.double(), model.double(), images(torch.float64))


class Keywords(Alone):
    def forward(self, x):
        return self.conv(input=self.norm(input=x))


def test_inputs_by_keyword_are_recognized():
    model = Keywords()
    fused = syncbn.fuse(copy.deepcopy(model))
    assert syncbn.fusion_report(fused).fused == {"norm": "conv"}
    assert_same(fused.double(), model.double(), images(torch.float64))


class Optional(Alone):
    def forward(self, x, scale=None, *, features=False, size=2):
        x = self.norm(x) if scale is None else self.norm(x) * scale
        x = x if features else self.conv(x)
        return x[:size]


def test_optional_arguments_are_fixed_at_their_defaults_and_others_refused():
    model = Optional()
    fused = syncbn.fuse(copy.deepcopy(model))
    assert syncbn.fusion_report(fused).fused == {"norm": "conv"}
    torch.testing.assert_close(fused(images()), model(images()))
    torch.testing.assert_close(fused(images(), None, size=2), model(images()))
    with pytest.raises(ValueError, match=r"expected scale=None, at which syncbn\.fuse has fixed this argument, got 3"):
        fused(images(), 3)
    with pytest.raises(ValueError, match=r"expected features=False"):
        fused(images(), features=True)


class Switches(nn.Module):
    def __init__(self, context: Callable) -> None:
        super().__init__()
        self.stem, self.rest, self.context = nn.Conv2d(3, 3, 1), small(), context

    def forward(self, x):
        with self.context():
            x = self.stem(x)
        return self.rest(x)


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu"), torch.inference_mode])
def test_a_forward_that_switches_modes_is_refused(context):
    with pytest.raises(TypeError, match="its forward switches gradients, inference mode or autocast"):
        syncbn.fuse(Switches(context))
    with context():
        syncbn.fuse(small())  # the caller may


class Keys(nn.Module):
    """Parameters and buffers of its own, read or not, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unused, self.scale, self.none = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1)), None
        self.register_buffer("count", torch.ones(1))
        self.register_buffer("table", torch.ones(1), persistent=False)
        self.blocks = nn.ModuleDict({"b": small(), "a": nn.Conv2d(3, 3, 1)})
        self.again, self.tied = self.blocks["a"], self.scale

    def forward(self, x):
        return self.blocks["b"](self.again(x) * self.table) * self.scale + self.count


def test_all_keys_of_the_state_dict_stay_in_order():
    model = Keys()
    fused = syncbn.fuse(model)
    pickled = pickle.loads(pickle.dumps(fused))
    pickled.tied = pickled.scale  # torch.fx traces again, and has one name for a parameter
    assert set(pickled.state_dict()) == set(model.state_dict())
    for twin in (fused, copy.deepcopy(fused)):
        assert list(twin.state_dict()) == list(model.state_dict())
        assert twin.load_state_dict(model.state_dict()) == ([], [])
        assert [name for name, _ in twin.named_buffers()] == [name for name, _ in model.named_buffers()]
    assert_same(fused.double(), model.double(), images(torch.float64))


def test_a_unit_itself_can_be_fused():
    norm = syncbn.SyncBatchNorm(3, activation="relu")
    for unit in (
        syncbn.NormActConv(norm, nn.Conv2d(3, 2, 1)),
        syncbn.NormActConv(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)),
    ):
        fused = syncbn.fuse(unit)
        assert list(syncbn.fusion_report(fused).fused) == ["norm"]
        assert_same(fused.double(), copy.deepcopy(unit).double(), images(torch.float64))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = small()

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


def test_a_model_that_torch_fx_cannot_trace_is_refused_and_unchanged():
    model = Branching()
    with pytest.raises(
        TypeError, match=r"expected a model that torch.fx can trace, got TraceError: .* give fuse the part"
    ):
        syncbn.fuse(model)
    model.inner = syncbn.fuse(model.inner)
    with Recorded() as recorded:
        model(images().abs())
    assert recorded.calls == 2


def test_a_report_belongs_to_a_fused_model():
    with pytest.raises(ValueError, match=r"expected a model that syncbn\.fuse returned, got Sequential"):
        syncbn.fusion_report(small())
