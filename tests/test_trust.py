"""A checkpoint from anyone may be evaluated, exported and used: it builds nothing but what is on the list."""

import copy
import operator
from functools import cache, reduce
from pathlib import Path

import pytest
import torch
import yaml
from cli import call
from hydra.utils import get_object
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from train import commands, mlp, run, trust
from train.distenv import Refusal

CONF = Path(__file__).parents[1] / "conf"
SMALL = ["model=mlp", "model.widths=[4]", "trainer=cpu", "logger=none", "callbacks.progress=null", "run_name=run"]


class OwnNetwork(mlp.MLP):
    """A class that is on no list."""


class LeavesAFile:
    """Its unpickling writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@cache
def untrained():
    """Return a small network without training, and its configuration as a checkpoint stores it."""
    model, _ = run.build_model(run.compose(SMALL))
    return model.state_dict(), model.config


def configuration(changes):
    """Return that configuration with changes by dotted name."""
    config = copy.deepcopy(untrained()[1])
    for key, value in changes.items():
        *parents, name = key.split(".")
        reduce(operator.getitem, parents, config)[name] = value
    return config


def checkpoint_file(directory, changes):
    """Write a checkpoint of that network whose configuration has the changes."""
    path = directory / "x.ckpt"
    torch.save({"state_dict": untrained()[0], "config": configuration(changes)}, path)
    return path


def start(command, *arguments):
    """Run a command in this process; return its sentence if it refuses, otherwise None."""
    try:
        call(command, arguments)
    except SystemExit as end:
        return str(end.code)
    return None


def targets(node):
    """Yield every mapping with a `_target_`."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for child in node.values():
            yield from targets(child)
    elif isinstance(node, list):
        for child in node:
            yield from targets(child)


def test_every_choice_of_our_configuration_may_be_in_a_checkpoint():
    files = [path for path in sorted(CONF.rglob("*.yaml")) if path.name != "train.yaml"]
    nodes = [node for path in files for node in targets(yaml.safe_load(path.read_text()))]
    names = {node["path"] if node["_target_"] == "hydra.utils.get_class" else node["_target_"] for node in nodes}
    names -= {"???"}  # of a network of the user's own
    assert len(names) > 30
    assert [name for name in sorted(names) if not trust.may_be_built(name)] == []


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=imagenet_preact50", "mixing=mixup_cutmix", "callbacks=ema"],
        ["experiment=cifar10_preact18_one_cycle", "callbacks=watch", "norm=group"],
        ["data=mnist", "model=mlp", "norm=none", "optimizer=adamw", "debug=profiler", "callbacks=recalibrate"],
        ["data=fake", "norm=layer", "scheduler=steps", "callbacks=timing", "debug=overfit"],
    ],
)
def test_composed_configurations_may_be_in_a_checkpoint(overrides):
    trust.check(Path("x.ckpt"), OmegaConf.to_container(run.compose(overrides)))


@pytest.mark.parametrize("name", sorted(trust.NAMES))
def test_every_listed_name_is_defined_in_its_own_package(name):
    package = name.split(".")[0]
    pytest.importorskip(package)
    found = get_object(name)
    assert callable(found)
    assert found.__module__.split(".")[0] == package


@pytest.mark.parametrize(
    "name",
    [
        *("torch.nn.Identity", "torch.nn.BatchNorm2d", "torch.nn.modules.activation.GELU", "syncbn.BatchNorm"),
        *("torch.optim.SGD", "torch.optim.Adagrad", "torch.optim.lr_scheduler.StepLR"),
        *("torchvision.models.resnet18", "torchvision.models.get_model", "torchvision.models.resnet.Bottleneck"),
        *("torchvision.transforms.v2.ColorJitter", "torchvision.transforms.InterpolationMode"),
    ],
)
def test_the_building_blocks_of_torch_torchvision_and_this_project_may_be_named(name):
    assert trust.may_be_built(name)
    assert callable(get_object(name))


OUTSIDE = [
    *("shutil.copyfile", "os.system", "builtins.eval", "eval", "subprocess.run", "pathlib.Path.unlink", "", "torch.nn"),
    *("torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "torch.nn.functional.torch.load"),
    *(
        "torch.nn.Module.load_state_dict",
        "torch.nn.Linear.__init__",
        "torch.nn.Linear.__class__",
        "torch.nn.init.ones_",
    ),
    *("torch.optim.swa_utils.update_bn", "torch.optim.optimizer.Callable", "torch.nn.utils.parametrize.cached"),
    *("train.run.os.system", "train.report.subprocess.run", "train.resume.load", "train.run.fit", "train.run.Path"),
    *("train.export.export", "train.plugins.AtomicFiles", "train.distenv.leave", "train.data.ImageData.from_datasets"),
    *("train.pictures.draw_curves", "train.commands.from_checkpoint", "train.optim.nn.Module", "train.__main__.task"),
    *("syncbn.module.torch.load", "syncbn.convert_sync_batchnorm", "syncbn.BatchNorm.load_state_dict", "syncbn"),
    *("torchvision.datasets.utils.download_and_extract_archive", "torchvision.datasets.LSUN", "torchvision.datasets"),
    *("torchvision.transforms.functional.torch.load", "torchvision.transforms.v2.functional.to_image"),
    *("torchvision.models.resnet.load_state_dict_from_url", "torchvision.models.register_model"),
    *("torchvision.models.get_weight", "torchvision.models.WeightsEnum", "torchvision.models._api.Weights"),
    *("timm.models.load_checkpoint", "timm.models.load_state_dict_from_hf", "timm.create_model.__globals__.get"),
    *("lightning.pytorch.Trainer.save_checkpoint", "lightning.pytorch.LightningModule.load_from_checkpoint"),
    *("lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.plugins.TorchCheckpointIO.remove_checkpoint"),
    *("hydra.utils.get_method", "hydra.utils.get_object", "hydra.utils.instantiate", "hydra._internal.utils._locate"),
    *("functools.partial", "functools.reduce", "operator.methodcaller", "importlib.import_module"),
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_everything_else_is_refused_with_its_name_and_place(name):
    with pytest.raises(Refusal, match=r"x.ckpt names .* in mixing._target_: nothing was built; .*trust=true") as caught:
        trust.check(Path("x.ckpt"), configuration({"mixing": {"_target_": name, "_partial_": True}}))
    assert f"names {name} in" in str(caught.value)


COPY = {"_target_": "shutil.copyfile", "src": "a", "dst": "b"}
IN_A_LIST = {"_target_": "torch.nn.Sequential", "_args_": [[COPY]]}
IN_A_MAPPING = {"_target_": "torch.nn.Identity", "_partial_": True, "deep": {"er": COPY}}
CLASS = {"_target_": "hydra.utils.get_class"}


@pytest.mark.parametrize(
    "changes, place",
    [
        ({"model.widths": COPY}, "model.widths._target_"),
        ({"data.eval_transforms": [COPY]}, "data.eval_transforms[0]._target_"),
        ({"data.eval_transforms": [[IN_A_LIST]]}, "data.eval_transforms[0][0]._args_[0][0]._target_"),
        ({"norm": IN_A_MAPPING}, "norm.deep.er._target_"),
        ({"optimizer.factory.params": COPY | {"_partial_": True}}, "optimizer.factory.params._target_"),
        ({"hidden": {"node": COPY}, "mixing": "${hidden.node}"}, "._target_"),
        ({"data.source.factory": CLASS | {"path": "subprocess.Popen"}}, "subprocess.Popen in data.source.factory.path"),
        ({"hidden": "os.system", "mixing": CLASS | {"path": "${hidden}"}}, "os.system in mixing.path"),
        ({"mixing": CLASS | {"_args_": ["subprocess.Popen"]}}, "mixing.path"),
        ({"mixing": CLASS | {"_partial_": True}}, "mixing.path"),
        ({"mixing": CLASS | {"path": "torch.nn.Identity", "_args_": ["subprocess.Popen"]}}, "mixing.path"),
        ({"mixing": {"_target_": ["shutil.copyfile"]}}, "mixing._target_"),
        ({"mixing": {"_target_": None}}, "mixing._target_"),
        ({"mixing": {"_target_": {"_target_": "train.mixing.Mixing"}}}, "mixing._target_"),
    ],
)
def test_no_place_of_the_configuration_is_overlooked(changes, place):
    with pytest.raises(Refusal, match="nothing was built") as caught:
        trust.check(Path("x.ckpt"), configuration(changes))
    assert place in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        *("${oc.env:HOME}", "${oc.decode:'1'}", "${oc.create:{a: 1}}", "${hydra:runtime.cwd}", "${now:%Y}"),
        *("${oc.dict.values:trainer}", "${${run_name}:HOME}", "${oc.${run_name}:HOME}", "${ oc.env:HOME}"),
        *(r"\${oc.env:HOME}", "a/${run_name}/${oc.env:HOME}", "${run_stamp:1}"),
    ],
)
def test_a_checkpoint_may_refer_to_its_own_values_but_call_no_resolver(value):
    with pytest.raises(Refusal, match=r"names the interpolation .* in data.root: nothing was built"):
        trust.check(Path("x.ckpt"), configuration({"data.root": value}))


@pytest.mark.parametrize("target", ["${run_name}", "train.${run_name}", "${model._target_}", "${accelerator:}"])
def test_a_target_is_a_name_and_no_interpolation(target):
    with pytest.raises(Refusal, match=r"names the interpolation .* in mixing._target_"):
        trust.check(Path("x.ckpt"), configuration({"mixing": {"_target_": target}}))


def test_an_interpolation_cannot_be_composed_of_parts():
    parts = {"dollar": "$", "rest": "{oc.env:HOME}", "data.root": "${dollar}${rest}"}
    with pytest.raises(Refusal, match=r"names \$\{oc.env:HOME\} in data.root, which is composed"):
        trust.check(Path("x.ckpt"), configuration(parts))


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"model_name": "hf-hub:someone/network"}, "hf-hub:someone/network in model.model_name"),
        ({"model_name": "local-dir:/tmp/x"}, "local-dir:/tmp/x in model.model_name"),
        ({"model_name": "${hidden}", "hidden": "hf-hub:someone/network"}, "hf-hub:someone/network in model.model_name"),
        ({"model_name": "resnet18", "checkpoint_path": "x.pth"}, "checkpoint_path of timm.create_model in model"),
        ({"model_name": "resnet18", "pretrained_cfg": {"file": "x.pth"}}, "pretrained_cfg of timm.create_model"),
        ({"model_name": "resnet18", "pretrained_cfg_overlay": {"url": "x"}}, "pretrained_cfg_overlay of timm"),
        ({"_args_": ["hf-hub:someone/network"]}, "_args_ of timm.create_model"),
    ],
)
def test_timm_builds_its_own_networks_and_loads_no_file_that_a_checkpoint_names(arguments, named):
    hidden = {"hidden": arguments.get("hidden")}
    node = {"_target_": "timm.create_model", **{name: arguments[name] for name in arguments if name != "hidden"}}
    with pytest.raises(Refusal, match="nothing was built") as caught:
        trust.check(Path("x.ckpt"), {"model": node, **hidden})
    assert named in str(caught.value)


def test_timm_builds_a_network_by_name():
    trust.check(Path("x.ckpt"), {"model": {"_target_": "timm.create_model", "model_name": "resnetv2_50.a1h_in1k"}})


@pytest.mark.parametrize(
    "config, message",
    [
        ("a: 1", "must contain a configuration of names and values, got str"),
        ([COPY], "must contain a configuration of names and values, got list"),
        (None, "must contain a configuration of names and values, got NoneType"),
        ({"a": "${b}", "b": "${a}"}, "the configuration in x.ckpt cannot be resolved"),
        ({"a": "${nowhere}"}, "the configuration in x.ckpt cannot be resolved"),
    ],
)
def test_what_is_no_configuration_is_refused(config, message):
    with pytest.raises(Refusal, match=message):
        trust.check(Path("x.ckpt"), config)


def test_a_configuration_nested_too_deeply_is_refused():
    config = {}
    for _ in range(2000):
        config = {"a": config}
    with pytest.raises(Refusal, match="cannot be resolved"):
        trust.check(Path("x.ckpt"), config)


def test_a_refused_name_is_not_even_imported(tmp_path, monkeypatch):
    (tmp_path / "imported_by_its_name.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\ndef f(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert not trust.may_be_built("imported_by_its_name.f")
    assert not (tmp_path / "trace").exists()
    get_object("imported_by_its_name.f")
    assert (tmp_path / "trace").exists()


@pytest.fixture
def image(tmp_path):
    Image.new("L", (8, 8), 100).save(tmp_path / "image.png")
    return tmp_path / "image.png"


@pytest.mark.parametrize("command", ["evaluate", "export", "predict"])
def test_a_file_is_copied_only_for_a_checkpoint_that_the_user_trusts(command, tmp_path, image, monkeypatch, capsys):
    secret, target = tmp_path / "secret", tmp_path / "copy"
    secret.write_text("secret")
    mixing = {"_target_": "shutil.copyfile", "src": str(secret), "dst": str(target)}
    arguments = [
        f"checkpoint={checkpoint_file(tmp_path, {'mixing': mixing})}",
        *([image] if command == "predict" else []),
    ]
    assert "names shutil.copyfile in mixing._target_" in start(command, *arguments)
    assert "names shutil.copyfile" in start(command, *arguments, "trust=false")
    assert not target.exists()
    with trust.everything():
        commands.from_checkpoint(tmp_path / "x.ckpt")
    assert target.read_text() == "secret"


@pytest.mark.parametrize("command", ["evaluate", "export", "predict"])
def test_a_pickle_is_run_only_for_a_checkpoint_that_the_user_trusts(command, tmp_path, image, monkeypatch, capsys):
    trace = tmp_path / "trace"
    torch.save(LeavesAFile(trace), tmp_path / "pickle")
    mixing = {"_target_": "torch.load", "f": str(tmp_path / "pickle"), "weights_only": False}
    path = checkpoint_file(tmp_path, {"mixing": mixing})
    arguments = [f"checkpoint={path}", *([image] if command == "predict" else [])]
    assert "names torch.load in mixing._target_" in start(command, *arguments)
    assert not trace.exists()
    with trust.everything():
        commands.from_checkpoint(path)
    assert trace.exists()


def test_a_checkpoint_of_the_users_own_network_needs_trust(tmp_path, image, monkeypatch, capsys):
    path = checkpoint_file(tmp_path, {"model._target_": "test_trust.OwnNetwork"})
    sentence = start("predict", f"checkpoint={path}", image)
    assert "names test_trust.OwnNetwork in model._target_" in sentence
    assert "add trust=true" in sentence
    assert start("predict", f"checkpoint={path}", image, "trust=true") is None
    assert capsys.readouterr().out.startswith(str(image))
    assert start("export", f"checkpoint={path}", "trust=true") is None
    assert path.with_suffix(".pt").exists()
    with trust.everything():
        assert isinstance(commands.from_checkpoint(path).model.network, OwnNetwork)
    with pytest.raises(Refusal, match=r"test_trust\.OwnNetwork"):  # trust ends with its block
        commands.from_checkpoint(path)


@pytest.mark.parametrize("value", ["yes", "1", "null"])
def test_trust_is_true_or_false(value, tmp_path, monkeypatch, capsys):
    sentence = start("predict", f"checkpoint={tmp_path}/x.ckpt", "image.png", f"trust={value}")
    assert sentence == f"error: trust must be true or false, got {None if value == 'null' else value}"


def test_the_help_of_every_command_names_trust(monkeypatch, capsys):
    for command in ("evaluate", "export", "predict"):
        assert start(command, "--help") is None
        assert trust.OPTION in capsys.readouterr().out


def test_a_checkpoint_decides_nothing_about_hydra(tmp_path, image, monkeypatch, capsys):
    (tmp_path / "elsewhere" / "mixing").mkdir(parents=True)
    (tmp_path / "elsewhere" / "mixing" / "bad.yaml").write_text(f"_target_: os.mkdir\npath: {tmp_path}/trace\n")
    of_hydra = {"searchpath": [f"file://{tmp_path}/elsewhere"], "run": {"dir": f"{tmp_path}/written"}}
    changes = {"hydra": of_hydra, "defaults": ["_self_", {"mixing": "bad"}]}
    path = checkpoint_file(tmp_path, changes)
    assert start("predict", f"checkpoint={path}", image) is None
    assert commands.from_checkpoint(path).config.mixing is None
    assert not (tmp_path / "trace").exists()
    assert not (tmp_path / "written").exists()


def test_an_override_is_the_users_own(tmp_path):
    path = checkpoint_file(tmp_path, {})
    network = commands.from_checkpoint(path, ["model._target_=test_trust.OwnNetwork"]).model.network
    assert isinstance(network, OwnNetwork)
    assert isinstance(network, nn.Module)


def test_a_resumed_run_builds_nothing_that_the_file_names(tmp_path, monkeypatch):
    for name in ("train.callbacks.draw_curves", "train.pictures.draw_confusion", "train.pictures.draw_mistakes"):
        monkeypatch.setattr(name, lambda *arguments: None)
    overrides = [*SMALL, "trainer.max_epochs=1", "+trainer.limit_train_batches=2", f"run_dir={tmp_path}/run"]
    run.fit(run.compose(overrides))
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    copying = COPY | {"src": str(last), "dst": str(tmp_path / "copy")}
    checkpoint["config"] |= {"extra": copying, "logger": {"own": copying}}
    checkpoint["config"]["callbacks"]["own"] = copying
    torch.save(checkpoint, tmp_path / "x.ckpt")
    run.fit(run.compose([*overrides[:-1], f"run_dir={tmp_path}/other", f"resume={tmp_path}/x.ckpt"]))
    assert (tmp_path / "other" / "result.json").exists()
    assert not (tmp_path / "copy").exists()
