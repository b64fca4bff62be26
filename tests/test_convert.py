"""convert_sync_batchnorm and revert_sync_batchnorm keep all state, in either direction."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torchvision
from ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn import convert_sync_batchnorm, revert_sync_batchnorm


class BatchNormReLU(nn.BatchNorm2d):
    """A subclass that overrides the forward and the constructor."""

    def __init__(self, num_features, slope):
        super().__init__(num_features)
        self.slope = slope

    def forward(self, x):
        return nn.functional.leaky_relu(super().forward(x), self.slope)


class BatchNormTwice(nn.BatchNorm2d):
    """A subclass that calls torch's function itself."""

    def forward(self, x):
        y = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return 2 * y


class BatchNormNative(nn.BatchNorm2d):
    """A subclass that calls the function below torch's function, and counts batches itself."""

    def forward(self, x):
        self.num_batches_tracked.add_(1)
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.training, 0.1, self.eps, False
        )


class OwnFormula(nn.BatchNorm2d):
    """A subclass that never reaches torch's batch normalization."""

    def forward(self, x):
        return x - x.mean((0, 2, 3), keepdim=True)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ModuleDict({"a": nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm1d(2)]), "b": nn.BatchNorm3d(3)}),
        nn.Sequential(nn.Sequential(BatchNormReLU(4, 0.2))),
    )


def identities(module: nn.Module) -> dict[str, int]:
    tensors = (*module.named_modules(), *module.named_parameters(), *module.named_buffers())
    return {name: id(value) for name, value in tensors}


def test_every_batch_norm_is_converted_and_every_class_comes_back():
    model = network()
    classes = [type(module) for module in model.modules()]
    before, state = identities(model), list(model.state_dict())
    assert convert_sync_batchnorm(model) is model
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(layers) == 4
    assert all(isinstance(layer, syncbn.SyncBatchNorm) for layer in layers)
    plain = (nn.BatchNorm2d, nn.BatchNorm1d, nn.BatchNorm3d, BatchNormReLU)
    assert [next(c for c in plain if isinstance(layer, c)) for layer in layers[:3]] == list(plain[:3])
    assert isinstance(layers[3], BatchNormReLU)
    assert identities(model) == before  # the same modules, parameters and buffers, not copies
    assert list(model.state_dict()) == state
    assert revert_sync_batchnorm(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert identities(model) == before


def test_reverting_leaves_no_trace_in_any_module():
    model = network()
    before = [set(vars(module)) for module in model.modules()]
    revert_sync_batchnorm(convert_sync_batchnorm(model))
    assert [set(vars(module)) for module in model.modules()] == before


def test_both_directions_are_idempotent():
    model = convert_sync_batchnorm(convert_sync_batchnorm(network()))
    classes = [type(module) for module in network().modules()]
    assert [type(module) for module in revert_sync_batchnorm(revert_sync_batchnorm(model)).modules()] == classes
    untouched = network()
    assert [type(module) for module in revert_sync_batchnorm(untouched).modules()] == classes


@pytest.mark.parametrize("plain", [nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.SyncBatchNorm(3)])
def test_the_module_itself_is_converted_when_it_is_a_batch_norm(plain):
    expected = type(plain)
    assert isinstance(convert_sync_batchnorm(plain), syncbn.SyncBatchNorm)
    assert isinstance(plain, expected) or expected is nn.SyncBatchNorm  # DDP refuses torch's layer on CPU
    assert type(revert_sync_batchnorm(plain)) is expected


def test_flags_dtypes_and_attributes_survive():
    layer = nn.BatchNorm2d(3, eps=0.1, momentum=None, dtype=torch.bfloat16).eval()
    layer.weight.requires_grad_(False)
    layer.note = "kept"
    convert_sync_batchnorm(layer)
    for _ in range(2):
        assert not layer.training
        assert not layer.weight.requires_grad
        assert layer.bias.requires_grad
        assert (layer.eps, layer.momentum, layer.note) == (0.1, None, "kept")
        assert layer.weight.dtype == layer.running_mean.dtype == torch.bfloat16
        revert_sync_batchnorm(layer)


def test_hooks_still_run_and_their_handles_still_remove_them():
    layer, seen = nn.BatchNorm1d(3), []
    handles = [
        layer.register_forward_hook(lambda *_: seen.append("forward")),
        layer.register_forward_pre_hook(lambda *_: seen.append("pre")),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
        layer.register_state_dict_pre_hook(lambda *_: seen.append("state")),
    ]
    for change in (convert_sync_batchnorm, revert_sync_batchnorm):
        change(layer)
        layer(torch.randn(4, 3, requires_grad=True)).square().mean().backward()
        layer.state_dict()
        assert seen == ["pre", "forward", "backward", "state"]
        seen.clear()
    for handle in handles:
        handle.remove()
    layer(torch.randn(4, 3))
    assert seen == []


def test_a_module_registered_twice_stays_one_module():
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU(), shared), "b": shared})
    for change in (convert_sync_batchnorm, revert_sync_batchnorm):
        change(model)
        assert model["a"][0] is model["a"][2] is model["b"] is shared
    assert type(shared) is nn.BatchNorm1d


def test_parameters_shared_between_layers_stay_shared_and_an_optimizer_keeps_training_them():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert_sync_batchnorm(model)
    assert model[0].weight is model[1].weight
    before = model[0].weight.clone()
    model(torch.randn(4, 3)).pow(3).mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_a_subclass_keeps_its_forward_and_its_check_of_dimensions():
    torch.manual_seed(0)
    plain, x = BatchNormReLU(4, 0.2), torch.randn(5, 4, 3, 3)
    synced = convert_sync_batchnorm(copy.deepcopy(plain))
    assert isinstance(synced, BatchNormReLU)
    assert isinstance(synced, syncbn.SyncBatchNorm)
    torch.testing.assert_close(synced(x), plain(x), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="expected 4D input"):
        synced(torch.randn(5, 4))


def on_ranks(sizes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 4, 3, 3).split(sizes)[dist.get_rank()]
    layers = convert_sync_batchnorm(nn.Sequential(BatchNormReLU(4, 0.2), BatchNormNative(4), BatchNormTwice(4)))
    return layers(x), layers[2].running_var


def test_subclasses_with_a_forward_of_their_own_are_synchronized():
    torch.manual_seed(0)
    layers = nn.Sequential(BatchNormReLU(4, 0.2), BatchNormNative(4), BatchNormTwice(4))
    expected = layers(torch.randn(7, 4, 3, 3)).detach()
    ranks = run_ranks(2, on_ranks, (2, 5))
    torch.testing.assert_close(torch.cat([y for y, _ in ranks]).detach(), expected, rtol=0, atol=2e-6)
    for _, running_var in ranks:
        torch.testing.assert_close(running_var, layers[2].running_var)


def test_a_converted_layer_still_wants_the_dimensions_of_its_class():
    layer = convert_sync_batchnorm(nn.BatchNorm2d(3))
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(5, 3))


def test_a_subclass_that_computes_on_its_own_is_refused_and_nothing_is_changed():
    model = nn.Sequential(nn.BatchNorm2d(3), OwnFormula(3))
    with pytest.raises(TypeError, match=r"calls super\(\).forward\(\) or .* got OwnFormula at '1'"):
        convert_sync_batchnorm(model)
    assert [type(module) for module in model] == [nn.BatchNorm2d, OwnFormula]


class CallsOwnFormula(OwnFormula):
    """A subclass whose super().forward() ends before torch's."""

    def forward(self, x):
        return super().forward(x)


class TorchSubclass(nn.SyncBatchNorm):
    """A subclass of torch's synchronized layer."""


def with_a_forward_of_the_instance() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.forward = nn.BatchNorm2d(3).forward
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (CallsOwnFormula(3), "got CallsOwnFormula at '1'"),
        (TorchSubclass(3), "got TorchSubclass at '1'"),
        (with_a_forward_of_the_instance(), "got a BatchNorm2d at '1' with a forward set on the instance"),
        (torch.jit.script(nn.BatchNorm2d(3)), "got a scripted BatchNorm2d at '1': convert the model before"),
    ],
    ids=["super() ends early", "subclass of torch's", "instance's forward", "scripted"],
)
def test_a_layer_that_would_stay_unsynchronized_without_a_word_is_refused(layer, message):
    model = nn.Sequential(nn.BatchNorm2d(3), layer)
    with pytest.raises(TypeError, match=message):
        convert_sync_batchnorm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_layer_whose_class_changed_after_the_conversion_is_not_reverted():
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    with pytest.raises(TypeError, match="got ParametrizedSyncBatchNorm2d at '1': undo what changed its class first"):
        revert_sync_batchnorm(model)
    assert isinstance(model[0], syncbn.SyncBatchNorm)
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    revert_sync_batchnorm(model)
    assert [type(layer) for layer in model] == [nn.BatchNorm2d, nn.BatchNorm2d]


def test_a_checkpointed_subclass_that_counts_batches_itself_counts_each_once():
    layer = convert_sync_batchnorm(BatchNormNative(4))
    x = torch.randn(5, 4, 3, 3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).square().mean().backward()
    assert layer.num_batches_tracked == 1


def test_a_converted_subclass_that_calls_the_function_compiles_in_one_graph():
    torch.manual_seed(0)
    x = torch.randn(5, 4, 3, 3)
    layer = convert_sync_batchnorm(BatchNormTwice(4))
    expected = copy.deepcopy(layer)(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("tool", ["parametrizations", "fully_shard"])
def test_a_class_that_a_tool_has_generated_is_refused_with_what_to_do_first(tool, fake_group):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    if tool == "parametrizations":
        nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    else:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        torch.distributed.fsdp.fully_shard(model[1], mesh=mesh)
    generated = type(model[1])
    with pytest.raises(TypeError, match=f"a {generated.__name__} at '1', .* generated: convert the model first"):
        convert_sync_batchnorm(model)
    assert [type(layer) for layer in model] == [nn.BatchNorm2d, generated]


class LocalLazy(nn.LazyBatchNorm2d):
    """A lazy subclass that becomes a subclass."""

    cls_to_become = BatchNormReLU

    def __init__(self, momentum):
        super().__init__(momentum=momentum)
        self.slope = 0.5


@pytest.mark.parametrize(
    "lazy, plain",
    [
        (nn.LazyBatchNorm1d, nn.BatchNorm1d),
        (nn.LazyBatchNorm2d, nn.BatchNorm2d),
        (nn.LazyBatchNorm3d, nn.BatchNorm3d),
        (LocalLazy, BatchNormReLU),
    ],
)
def test_a_lazy_layer_is_synchronized_once_it_is_initialized(lazy, plain):
    dims = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, BatchNormReLU: 2}[plain]
    x = torch.randn(4, 3, *[2] * dims)
    model = convert_sync_batchnorm(nn.Sequential(lazy(momentum=0.5)))
    assert isinstance(model[0], (lazy, syncbn.SyncBatchNorm))
    assert type(revert_sync_batchnorm(model)[0]) is lazy
    torch.testing.assert_close(convert_sync_batchnorm(model)(x), lazy(momentum=0.5)(x))
    y = model(x)
    assert not isinstance(model[0], nn.modules.lazy.LazyModuleMixin)
    assert isinstance(model[0], plain)
    assert isinstance(model[0], syncbn.SyncBatchNorm)
    torch.testing.assert_close(model[0].running_mean, x.mean((0, *range(2, x.dim()))) * 0.75)
    assert type(revert_sync_batchnorm(model)[0]) is plain
    torch.testing.assert_close(model(x), y)


def test_a_layer_constructed_as_synchronized_reverts_to_one_for_any_dimensions():
    layer = syncbn.SyncBatchNorm(3)
    layer(torch.randn(4, 3, 5))
    state = layer.state_dict()
    revert_sync_batchnorm(layer)
    assert type(layer) is syncbn.BatchNorm
    for shape in [(4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2)]:
        assert layer(torch.randn(shape)).shape == shape
    assert list(layer.state_dict()) == list(state)
    assert type(convert_sync_batchnorm(layer)) is syncbn.SyncBatchNorm
    with pytest.raises(ValueError, match="expected input of shape"):
        revert_sync_batchnorm(layer)(torch.randn(3))


def test_converted_models_are_copied_pickled_and_saved():
    model = convert_sync_batchnorm(network())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert twin[2][0][0].slope == 0.2
        assert [type(m) for m in revert_sync_batchnorm(twin).modules()] == [type(m) for m in network().modules()]


def test_a_real_network_evaluates_bit_for_bit_alike_converted_and_reverted():
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=10), torch.randn(2, 3, 64, 64)
    model(x)
    expected = model.eval()(x)
    assert torch.equal(convert_sync_batchnorm(model)(x), expected)
    assert sum(isinstance(m, syncbn.SyncBatchNorm) for m in model.modules()) == 20
    assert torch.equal(revert_sync_batchnorm(model)(x), expected)


class WithoutAForward(nn.BatchNorm1d):
    """A subclass that overrides nothing of the forward pass."""

    note = "kept"


def running_mean_of_a_subclass_without_a_forward() -> list[float]:
    layer = convert_sync_batchnorm(WithoutAForward(3, momentum=1.0))
    layer(torch.arange(12.0).view(4, 3) + 10 * dist.get_rank())
    return layer.running_mean.tolist()


def test_a_subclass_without_a_forward_of_its_own_is_synchronized():
    assert run_ranks(2, running_mean_of_a_subclass_without_a_forward) == [[9.5, 10.5, 11.5]] * 2


class Ghost(nn.BatchNorm2d):
    """Ghost batch normalization: two halves of the batch side by side as channels."""

    def forward(self, x):
        N, C, *size = x.shape
        weight, bias = self.weight.repeat(2), self.bias.repeat(2)
        y = nn.functional.batch_norm(x.reshape(N // 2, 2 * C, *size), None, None, weight, bias, True)
        return y.view(x.shape)


def test_a_subclass_may_normalize_another_number_of_channels():
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(convert_sync_batchnorm(Ghost(3))(x), Ghost(3)(x))
