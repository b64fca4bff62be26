"""Code written for torch's layers works with ours: filters by class, torch.fx, the same methods and arguments."""

import copy
import io

import lightning
import pytest
import timm.layers
import torch
import torch.distributed as dist
import torchvision
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from ranks import run_ranks
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx
from torch.distributed.device_mesh import init_device_mesh
from torch.fx.experimental.optimization import fuse

import syncbn
from syncbn.lightning import SyncBatchNormPlugin

PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.parametrize("dims", PLAIN)
def test_a_converted_layer_stays_an_instance_of_its_class_and_checks_its_input(dims):
    layer = syncbn.convert_sync_batchnorm(PLAIN[dims](3))
    assert isinstance(layer, (PLAIN[dims], syncbn.SyncBatchNorm))
    assert isinstance(layer, PLAIN[dims])
    assert isinstance(layer, syncbn.SyncBatchNorm)
    assert not any(isinstance(layer, other) for d, other in PLAIN.items() if d != dims)
    with pytest.raises(ValueError, match=f"expected {dims + 2}D|expected 2D or 3D"):
        layer(torch.randn(2, 3, *[2] * (dims + 1)))
    assert type(pickled(layer)) is type(copy.deepcopy(layer)) is type(layer)


def pickled(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_timm_freezes_every_layer_of_a_converted_network():
    plain = torchvision.models.resnet18()
    model = syncbn.convert_sync_batchnorm(copy.deepcopy(plain))
    for network in (plain, model):
        freeze_batch_norm_2d(network)
    kinds = [type(module) for module in model.modules()]
    assert kinds == [type(module) for module in plain.modules()]
    assert sum("Frozen" in kind.__name__ for kind in kinds) == 20
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), plain(x))


def test_parameters_are_grouped_by_class_as_for_torchs_layers():
    model = torchvision.models.resnet18()
    norms = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)

    def without_decay(network):
        return [n for n, m in network.named_modules() if isinstance(m, norms)]

    before = without_decay(model)
    assert len(before) == 20
    assert without_decay(syncbn.convert_sync_batchnorm(model)) == before


def test_update_bn_resets_and_averages_the_statistics():
    model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))
    batches = torch.randn(5, 8, 3)
    torch.optim.swa_utils.update_bn(batches, model)
    torch.testing.assert_close(model[0].running_mean, batches.mean((0, 1)))
    assert model[0].momentum == 0.1


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Conv2d(4, 5, 3)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        return self.norm(self.second(self.first(x))).relu()


def calls(graph_module: torch.fx.GraphModule) -> list[str]:
    return [f"{node.op} {node.target}" for node in graph_module.graph.nodes if node.op.startswith("call")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("convert_first", [True, False])
def test_symbolic_trace_records_one_call_per_layer(training, convert_first):
    torch.manual_seed(0)
    plain, x = Network().train(training), torch.randn(2, 3, 8, 8)
    expected = calls(torch.fx.symbolic_trace(plain))
    model = copy.deepcopy(plain)
    model = syncbn.convert_sync_batchnorm(model) if convert_first else model
    traced = torch.fx.symbolic_trace(model)
    traced = traced if convert_first else syncbn.convert_sync_batchnorm(traced)
    assert calls(traced) == expected
    torch.testing.assert_close(traced(x), plain(x))
    torch.testing.assert_close(traced.state_dict(), plain.state_dict())
    assert sum(isinstance(m, syncbn.SyncBatchNorm) for m in traced.modules()) == 2


def test_a_traced_call_keeps_residual_and_mask():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = syncbn.SyncBatchNorm(3, activation="relu")

        def forward(self, x, residual, mask):
            return self.norm(x, residual=residual, mask=mask)

    model = Residual()
    x, residual = torch.randn(2, 4, 3, 2)
    mask = torch.tensor([True, True, False, True]).view(4, 1, 1)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x, residual, mask), model(x, residual, mask))


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnForward(syncbn.SyncBatchNorm):
    def forward(self, x):
        return super().forward(x) * 2


class Keyword(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, values):
        return self.norm(x=values)


def test_a_converted_subclass_is_one_call_also_with_keyword_arguments():
    model, x = Keyword(syncbn.convert_sync_batchnorm(Doubled(3))), torch.randn(2, 3, 4, 4)
    traced = torch.fx.symbolic_trace(model)
    assert calls(traced) == ["call_module norm"]
    torch.testing.assert_close(traced(x), Keyword(Doubled(3))(x))


def test_what_cannot_be_traced_as_one_call_is_refused():
    with pytest.raises(TypeError, match=r"one call, got OwnForward .* let is_leaf_module of the Tracer return True"):
        torch.fx.symbolic_trace(nn.Sequential(OwnForward(3)))
    with pytest.raises(TypeError, match=r"got the layer itself to trace: .* trace torch\.nn\.Sequential\(layer\)"):
        torch.fx.symbolic_trace(syncbn.SyncBatchNorm(3))


@pytest.mark.parametrize("training", [True, False])
def test_a_feature_extractor_names_the_same_nodes(training):
    x = torch.randn(2, 3, 32, 32)
    plain = torchvision.models.resnet18().train(training)
    model = syncbn.convert_sync_batchnorm(copy.deepcopy(plain))
    names = torchvision.models.feature_extraction.get_graph_node_names
    assert names(model) == names(plain)
    wanted = {"layer1.0.bn1": "norm", "layer2": "block"}
    features = [
        torchvision.models.feature_extraction.create_feature_extractor(network, wanted)(x) for network in (model, plain)
    ]
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-5)


def test_fusing_a_traced_network_changes_no_result():
    model, x = syncbn.convert_sync_batchnorm(Network()), torch.randn(2, 3, 8, 8)
    model(x)
    model.eval()
    expected = model(x)
    torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-4, atol=1e-5)
    fused = fuse(syncbn.revert_sync_batchnorm(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_prepare_fx_traces_a_converted_network():
    model, x = syncbn.convert_sync_batchnorm(Network()).eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    prepared = quantize_fx.prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
    torch.testing.assert_close(prepared(x), expected)
    assert sum(call.endswith(("first.1", "norm")) for call in calls(prepared)) == 2


def test_the_class_converts_as_torchs_class_does():
    model = syncbn.SyncBatchNorm.convert_sync_batchnorm(Network(), process_group=None)
    assert sum(isinstance(module, syncbn.SyncBatchNorm) for module in model.modules()) == 2


def test_a_lazy_layer_takes_its_size_from_the_first_input():
    lazy = syncbn.LazySyncBatchNorm(momentum=0.5, activation="relu", bias=False)
    x = torch.randn(4, 3, 5)
    y = lazy(x)
    twin = syncbn.SyncBatchNorm(3, momentum=0.5, activation="relu", bias=False)
    assert type(lazy) is syncbn.SyncBatchNorm
    torch.testing.assert_close(y, twin(x))
    torch.testing.assert_close(lazy.state_dict(), twin.state_dict())
    assert repr(lazy) == repr(twin)
    with pytest.raises(ValueError, match="expected activation to be one of"):
        syncbn.LazySyncBatchNorm(activation="selu")


@pytest.mark.parametrize(
    "make", [syncbn.LazySyncBatchNorm, lambda **o: syncbn.convert_sync_batchnorm(nn.LazyBatchNorm1d(**o))]
)
@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"affine": False, "track_running_stats": False}], ids=str)
def test_a_lazy_layer_may_load_a_state_before_its_first_batch(make, loaded, options):
    twin, x = syncbn.SyncBatchNorm(3, **options), torch.randn(4, 3, 5)
    twin(x)
    lazy = make(**options)
    if loaded:
        lazy.load_state_dict(twin.state_dict())
    else:
        lazy(x)
    torch.testing.assert_close(lazy(x), twin(x))
    torch.testing.assert_close(lazy.state_dict(), twin.state_dict())
    assert lazy.num_features == 3
    with pytest.raises(
        ValueError, match=r"expected input of shape \(N, C\) or \(N, C, ...\), got \(3,\): add the batch"
    ):
        make(**options)(torch.randn(3))


def statistics_over_a_mesh() -> tuple[float, float, str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    x = torch.full((2, 1), float(dist.get_rank())) + torch.tensor([[0.0], [1.0]])
    layer = syncbn.SyncBatchNorm(1, momentum=1.0, process_group=mesh["data"])
    converted = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(1, momentum=1.0), mesh["model"])
    layer(x)
    converted(x)
    mean, var = torch.zeros(1), torch.ones(1)
    syncbn.sync_batch_norm(x, mean, var, training=True, momentum=1.0, process_group=mesh["data"])
    torch.testing.assert_close(mean, layer.running_mean)
    try:
        syncbn.SyncBatchNorm(1, process_group=mesh)
    except ValueError as error:
        return layer.running_mean.item(), converted.running_mean.item(), str(error)
    return layer.running_mean.item(), converted.running_mean.item(), "accepted"


def test_a_device_mesh_of_one_dimension_is_a_group():
    ranks = run_ranks(4, statistics_over_a_mesh)
    assert [found[:2] for found in ranks] == [(1.5, 1.0), (2.5, 1.0), (1.5, 3.0), (2.5, 3.0)]
    assert "expected a DeviceMesh with one dimension, got dimensions ('data', 'model') of sizes (2, 2)" in ranks[0][2]


def test_the_version_is_that_of_the_distribution():
    assert syncbn.__version__.count(".") == 2


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.kinds = []

    def training_step(self, batch, index):
        self.kinds.append(type(self.model[1]).__name__)
        return self.model(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm])
def test_other_converters_do_not_replace_our_layers_without_a_word(convert):
    class Converted(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    for model in (
        syncbn.convert_sync_batchnorm(Network()),
        nn.Sequential(syncbn.SyncBatchNorm(3, activation="relu")),
        nn.Sequential(syncbn.convert_sync_batchnorm(Converted(3))),
        nn.Sequential(syncbn.LazySyncBatchNorm()),
    ):
        kinds = [type(module) for module in model.modules()]
        with pytest.raises(TypeError, match="expected a model without layers of syncbn to convert to torch"):
            convert(model)
        assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(TypeError, match=r"expected a layer without activation and temperature .* activation=relu"):
        convert(syncbn.BatchNorm(3, activation="relu"))
    model = convert(syncbn.revert_sync_batchnorm(syncbn.convert_sync_batchnorm(Network())))
    assert type(model.norm) is type(convert(syncbn.BatchNorm(3))) is nn.SyncBatchNorm


def test_quantization_tools_may_ask_for_and_set_a_qconfig():
    layer = syncbn.SyncBatchNorm(3)
    assert not hasattr(layer, "qconfig")
    layer.qconfig = "x86"
    assert copy.deepcopy(layer).qconfig == layer.qconfig == "x86"
    with pytest.raises(TypeError, match="expected a model without layers of syncbn"):
        nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    del layer.qconfig
    with pytest.raises(AttributeError):
        del layer.qconfig
    with pytest.raises(AttributeError, match="'SyncBatchNorm' object has no attribute 'qconfig'"):
        layer.qconfig  # noqa: B018


def train_a_converted_model_with_torchs_flag() -> str:
    model = syncbn.convert_sync_batchnorm(Regression())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 3)), batch_size=4)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", plugins=[TorchElasticEnvironment()], max_epochs=1,
        sync_batchnorm=True, **quiet,
    )  # fmt: skip
    try:
        trainer.fit(model, loader)
    except TypeError as error:
        return str(error)
    return "accepted"


@pytest.mark.filterwarnings("ignore")
def test_lightnings_flag_does_not_replace_the_layers_of_a_converted_model():
    for message in run_ranks(2, train_a_converted_model_with_torchs_flag):
        assert "so leave out this conversion (in Lightning sync_batchnorm=True)" in message


def train_with_lightning() -> tuple[list[str], str, torch.Tensor]:
    torch.manual_seed(dist.get_rank())
    model = Regression()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 3)), batch_size=4)
    plugins = [SyncBatchNormPlugin(), TorchElasticEnvironment()]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", plugins=plugins, max_epochs=1, **quiet)
    trainer.fit(model, loader)
    return model.kinds, type(model.model[1]).__name__, model.model[1].running_mean


@pytest.mark.filterwarnings("ignore")
def test_the_lightning_plugin_synchronizes_during_fit_and_reverts():
    first, second = run_ranks(2, train_with_lightning)
    for kinds, after, _ in (first, second):
        assert kinds == ["SyncBatchNorm1d"] * 2
        assert after == "BatchNorm1d"
    torch.testing.assert_close(first[2], second[2], rtol=0, atol=0)


def test_a_model_that_was_traced_can_be_reverted():
    x = torch.randn(2, 3, 8, 8)
    traced = torch.fx.symbolic_trace(syncbn.convert_sync_batchnorm(Network()))
    expected = traced(x)
    torch.testing.assert_close(syncbn.revert_sync_batchnorm(traced)(x), expected)


def test_a_layer_whose_input_is_a_buffer_is_traced():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3))
            self.register_buffer("values", torch.randn(4, 3))

        def forward(self, x, mask):
            return self.norm(self.values) + self.norm(self.values, mask=mask) + x

    model, x, mask = Buffered(), torch.randn(4, 3), torch.tensor([[True], [True], [False], [True]])
    assert calls(torch.fx.symbolic_trace(model)).count("call_module norm") == 2
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x, mask), model(x, mask))


@pytest.mark.parametrize("value", [nn.ReLU(), "silu", None, nn.Parameter(torch.ones(())), torch.ones(())])
@pytest.mark.parametrize("name", ["activation", "temperature", "process_group", "_group"])
def test_a_subclass_with_an_attribute_of_ours_is_refused(name, value):
    class Own(nn.BatchNorm2d):
        def __init__(self):
            super().__init__(3)
            setattr(self, name, value)

        def forward(self, x):
            return super().forward(x)

    with pytest.raises(TypeError, match=f"that a SyncBatchNorm has, got {name} in Own at '0': rename them"):
        syncbn.convert_sync_batchnorm(nn.Sequential(Own()))


def test_a_lazy_layer_takes_residual_and_mask_with_its_first_batch():
    x, residual, mask = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([[True], [True], [False], [True]])
    twin = syncbn.SyncBatchNorm(3)
    torch.testing.assert_close(syncbn.LazySyncBatchNorm()(x, residual, mask=mask), twin(x, residual, mask))
