"""Networks of torchvision and timm, and of the user's own: built, trained, saved and evaluated by an override."""

import builtins
import copy

import pytest
import timm
import torch
import torchvision
from hydra.errors import InstantiationException
from slow import all_but
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from train import commands, errors, models, resume, run, trust
from train.distenv import Refusal
from train.norms import group_norm

TORCHVISION = {  # name: (height and width, further arguments)
    "resnet18": (32, {}),
    "shufflenet_v2_x0_5": (32, {}),
    "densenet121": (32, {}),
    "googlenet": (32, {}),
    "inception_v3": (75, {}),
    "mobilenet_v3_small": (32, {}),
    "efficientnet_b0": (32, {"stochastic_depth_prob": 0.1}),
    "squeezenet1_1": (32, {}),
}
TIMM = {
    "resnet18d": (32, {"drop_path_rate": 0.1}),
    "seresnet18": (32, {}),
    "densenet121": (32, {}),
    "efficientnet_lite0": (32, {}),
    "mobilenetv4_conv_small": (32, {}),
    "regnety_002": (32, {}),
    "convnext_atto": (32, {}),
    "vit_tiny_patch16_224": (32, {"drop_rate": 0.1}),
    "deit_tiny_distilled_patch16_224": (32, {}),
    "levit_128s": (64, {}),
    "ghostnet_050": (32, {}),
    "resnext26ts": (32, {}),
}
NETWORKS = [("torchvision", name) for name in TORCHVISION] + [("timm", name) for name in TIMM]
RUN = [
    *("data=fake", "data.num_classes=6", "data.source.num_train=10", "data.source.num_test=5", "data.val_fraction=0.2"),
    *("data.global_batch_size=4", "trainer.max_epochs=1", "trainer=cpu", "logger=none", "callbacks.progress=null"),
]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("train.pictures.attempt", lambda *arguments: None)


def network(*overrides):
    return run.build_model(run.compose(["data=fake", "run_name=x", *overrides]))[0].network


def refusal(*overrides):
    with pytest.raises((Refusal, InstantiationException)) as caught:
        network(*overrides)
    sentence = errors.refusal_in(caught.value)
    assert sentence
    assert "\n" not in sentence
    return sentence


QUICK = [("torchvision", name) for name in ("resnet18", "shufflenet_v2_x0_5", "squeezenet1_1")]
QUICK += [("timm", name) for name in ("resnet18d", "vit_tiny_patch16_224", "regnety_002")]


@pytest.mark.parametrize("library, name", all_but(QUICK, NETWORKS))
def test_a_network_takes_two_steps_is_validated_saved_and_evaluated(library, name, tmp_path):
    size, arguments = (TORCHVISION if library == "torchvision" else TIMM)[name]
    further = [f"+model.{key}={value}" for key, value in arguments.items()]
    config = run.compose(
        [*RUN, f"model={library}", f"model.name={name}", f"data.image_size={size}", f"run_dir={tmp_path}", *further]
    )
    metrics = run.fit(config)
    assert metrics["val_loss"] > 0
    assert metrics["test_total"] == 5
    checkpoint = resume.load(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 2

    config, restored, data, _ = commands.from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    trainer = commands.trainer_for(config, [])
    trainer.test(restored, datamodule=data, verbose=False)
    assert float(trainer.callback_metrics["test_loss"]) == metrics["test_loss"]
    assert restored.network.state_dict().keys() == {key.removeprefix("network.") for key in checkpoint["state_dict"]}


BATCH_NORMS = ["torchvision resnet18", "torchvision densenet121", "timm resnet18d", "timm regnety_002"]


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_another_norm_replaces_every_batch_norm_and_keeps_activations_and_initial_scales(name):
    library, own = name.split()
    overrides = [f"model={library}", f"model.name={own}"]
    torch.manual_seed(0)
    plain = network(*overrides)
    torch.manual_seed(0)
    grouped = network(*overrides, "norm=group")
    norms = [layer for layer in plain.modules() if isinstance(layer, _BatchNorm)]
    found = [layer for layer in grouped.modules() if isinstance(layer, nn.GroupNorm)]
    assert not any(isinstance(layer, _BatchNorm) for layer in grouped.modules())
    assert [layer.num_channels for layer in found] == [layer.num_features for layer in norms]
    for before, after in zip(norms, found, strict=True):
        torch.testing.assert_close(after.weight, before.weight, rtol=0, atol=0)  # timm starts some at 0
    for kind in (nn.ReLU, nn.SiLU):
        counts = [sum(isinstance(layer, kind) for layer in one.modules()) for one in (plain, grouped)]
        assert counts[0] == counts[1]
    assert not any(isinstance(layer, nn.GroupNorm | _BatchNorm) for layer in network(*overrides, "norm=none").modules())


def test_timms_layer_with_an_activation_becomes_a_norm_and_the_same_activation():
    layer = timm.layers.BatchNormAct2d(6, act_layer=nn.SiLU)
    replaced = nn.Sequential(copy.deepcopy(layer))
    models.replace_norms(replaced, nn.InstanceNorm2d, "x")
    x = torch.randn(3, 6, 5, 5)
    torch.testing.assert_close(replaced(x), nn.functional.silu(nn.InstanceNorm2d(6)(x)))


class Own(nn.Module):
    """A network as a user writes it: it knows nothing of the trainer."""

    def __init__(self, num_classes=10, width=4, output="logits"):
        super().__init__()
        self.head = nn.LazyLinear(num_classes)
        self.conv = nn.Conv2d(3, width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.output = output

    def forward(self, x):
        logits = self.head(self.bn(self.conv(x)).relu().mean((2, 3)))
        return {"logits": logits, "tuple": (logits, logits), "map": logits[:, :, None, None]}[self.output]


class OwnWithNorm(Own):
    def __init__(self, num_classes=10, norm_layer=nn.BatchNorm2d):
        super().__init__(num_classes)
        self.bn = norm_layer(4)


def no_module(num_classes):
    return "network"


OWN = "model=own", f"model._target_={__name__}.Own"


def test_a_network_of_the_users_own_gets_the_norm_in_its_constructor_or_afterwards():
    assert type(network(*OWN, "+model.width=8").bn) is nn.BatchNorm2d
    assert network(*OWN, "norm=group").bn.num_channels == 4
    taking = "model=own", f"model._target_={__name__}.OwnWithNorm"
    layer = network(*taking, "norm.activation=relu", "norm.temperature=2").bn
    assert (layer.activation, layer.temperature) == ("relu", 2)
    named = "model=own", "model._target_=torchvision.models.resnet18"
    assert isinstance(network(*named), torchvision.models.ResNet)


def test_a_network_of_the_users_own_is_trained_and_evaluated_if_it_is_trusted(tmp_path):
    metrics = run.fit(run.compose([*RUN, *OWN, f"run_dir={tmp_path}"]))
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(Refusal, match=r"Own in model\._target_: nothing was built"):
        commands.from_checkpoint(path)
    with trust.everything():
        config, restored, data, _ = commands.from_checkpoint(path)
    trainer = commands.trainer_for(config, [])
    trainer.test(restored, datamodule=data, verbose=False)
    assert float(trainer.callback_metrics["test_loss"]) == metrics["test_loss"]


REFUSED = {
    "model=torchvision model.name=resnet19": "model.name must be a classifier of torchvision.models, got resnet19: "
    "the nearest are resnet18",
    "model=torchvision model.name=fcn_resnet50": "must be a classifier of torchvision.models",
    "model=timm model.name=resnetv2_51": "must be a model of timm, got resnetv2_51: the nearest are resnetv2_50",
    "model=timm model.name=hf-hub:someone/model": "model.name must be a model of timm",
    "model=torchvision +model.widht=3": "unexpected keyword argument 'widht'",
    "model=timm +model.drop_path=much": "unexpected keyword argument 'drop_path'",
    "model=torchvision +model.weights=DEFAULT": "use model.pretrained=FILE",
    "model=timm +model.checkpoint_path=x.pth": "use model.pretrained=FILE",
    "model=timm +model.pretrained_cfg_overlay={url:x}": "use model.pretrained=FILE",
    "model=torchvision model.name=vit_b_16 data.image_size=32 norm=group": "no batch normalization that GroupNorm",
    "model=torchvision norm.activation=relu": "norm.activation and norm.temperature are for networks that take a norm",
    "model=torchvision norm=local norm.temperature=2": "norm.activation and norm.temperature",
    "model=torchvision model.name=alexnet": "does not run on an image of 3 x 32 x 32",
    "model=torchvision model.name=vit_b_16 data.image_size=50": "cannot be built",
    "model=timm +model.global_pool=''": "does not run on an image of 3 x 32 x 32",
    f"{OWN[0]} {OWN[1]} +model.output=tuple": "got tuple: leave out its auxiliary outputs",
    f"{OWN[0]} {OWN[1]} +model.output=map": "got (1, 10, 1, 1) for 1 image(s)",
    f"{OWN[0]} {OWN[1]} model.num_classes=3": "must return logits of shape (N, 10), got (1, 3)",
    f"model=own model._target_={__name__}.no_module": "must build a torch.nn.Module",
    f"model=own model._target_={__name__}.missing": "missing",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_be_built_is_refused_in_a_sentence(overrides):
    assert REFUSED[overrides] in refusal(*overrides.split())


def test_a_subclass_of_batch_norm_that_is_not_known_is_not_replaced():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(Refusal, match="GroupNorm cannot replace Scaled at 0, use norm=sync or norm=local"):
        models.replace_norms(nn.Sequential(Scaled(3)), group_norm, "mine")


def test_timm_is_named_where_it_is_missing(monkeypatch):
    real = builtins.__import__

    def without_timm(name, *arguments, **keywords):
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    assert "model=timm needs the package timm (No module named 'timm'): pip install timm" in refusal("model=timm")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
@pytest.mark.parametrize("channels", [1, 4])
def test_another_number_of_channels_replaces_the_first_convolution(library, channels):
    of_channels = [f"data.in_channels={channels}", "data.mean=[0.5]", "data.std=[0.25]", f"model={library}"]
    built = network(*of_channels)
    assert built.get_submodule(models.first_convolution(built)).in_channels == channels


def test_a_gray_image_gives_what_it_gave_as_rgb():
    rgb = torch.randn(2, 1, 8, 8).expand(2, 3, 8, 8)
    weight = torch.randn(5, 3, 3, 3)
    gray = torch.nn.functional.conv2d(rgb[:, :1], models.adapt_input(weight, 1))
    torch.testing.assert_close(gray, torch.nn.functional.conv2d(rgb, weight), rtol=1e-5, atol=1e-5)
    assert models.adapt_input(weight, 7).shape == (5, 7, 3, 3)


def test_compiled_networks_of_others_may_break_into_graphs(monkeypatch):
    seen = {}
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: seen.update({type(self).__name__: options}))
    network("model=torchvision", "compile=true")
    network("model=preact_resnet20", "model.width=4", "compile=true")
    assert seen == {"ResNet": {"fullgraph": False}, "PreActResNet": {"fullgraph": True}}


def test_a_network_without_batch_norm_says_so():
    norm = run.instantiate(run.compose(["run_name=x"]).norm)
    assert "the network has no batch normalization" in norm.batch(2, nn.Linear(2, 2)).line
    assert "frozen" in norm.batch(2, nn.BatchNorm2d(2).eval()).line
    assert norm.batch(2, nn.BatchNorm2d(2)).line.startswith("BN batch = 1 x 2 = 2")
