"""Every configuration file is composed and instantiated."""

from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException, MissingConfigException
from slow import all_but

import conf
from train import errors, run, settings
from train.distenv import Refusal

ROOT = Path(conf.__file__).parent
GROUPS = (
    *("data", "model", "norm", "optimizer", "scheduler", "mixing", "trainer", "callbacks", "logger", "experiment"),
    "debug",
)
PRIMARY = ("train", "evaluate", "export", "predict")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((ROOT / group).glob("*.yaml"))]


def test_every_file_belongs_to_a_group_and_every_group_has_files():
    in_groups = {ROOT / group / f"{name}.yaml" for group, name in CHOICES}
    assert set(ROOT.rglob("*.yaml")) == {*(ROOT / f"{name}.yaml" for name in PRIMARY), *in_groups}
    assert {group for group, _ in CHOICES} == set(GROUPS)


DEEP = ("101", "110", "152", "164", "200", "164_modern", "paper")


@pytest.mark.parametrize("group, name", all_but([c for c in CHOICES if not c[1].endswith(DEEP)], CHOICES))
def test_every_choice_builds_a_run(group, name, tmp_path):
    if (group, name) in {("trainer", "gpu"), ("norm", "torch_sync")} and not torch.cuda.is_available():
        pytest.skip("there is no GPU to build a trainer for")
    if group == "logger" and name in ("wandb", "mlflow"):
        pytest.importorskip(name)
    has_width = group in ("model", "experiment") and name not in ("mlp", "torchvision", "timm", "own", "finetune")
    needed = {"own": ["model._target_=torchvision.models.resnet18", "data=fake"], "finetune": ["model.pretrained=null"]}
    further = ["model.width=4"] if has_width else needed.get(name, [])
    config = run.compose([f"{group}={name}", f"run_dir={tmp_path}", *further])
    settings.check_keys(config)
    trainer, model, data = run.build(config)
    images = torch.randn(2, *data.collate.image_shape)
    with torch.compiler.set_stance("force_eager"):  # deep networks take minutes
        assert model(images).shape == (2, data.num_classes)
    optimizer = model.make_optimizer(model.network)
    model.make_scheduler(optimizer, total_steps=10, steps_per_epoch=5)
    assert trainer.num_devices == 1


@pytest.mark.parametrize("name", ["sync", "torch_sync", "local", "group", "layer", "none"])
def test_norm_is_an_axis_of_its_own(name):
    assert ("norm", name) in CHOICES
    assert run.compose([f"norm={name}"]).model == run.compose([]).model


@pytest.mark.parametrize("fused", [True, False])
def test_networks_are_made_of_units_unless_that_is_switched_off_and_checkpoints_say_which(fused, tmp_path):
    overrides = ["model=preact_resnet20", "model.width=4", "trainer=cpu", f"run_dir={tmp_path}"]
    _, model, _ = run.build(run.compose(overrides if fused else [*overrides, "model.fused=false"]))
    assert {unit.fused for stage in model.network.stages for unit in stage} == {fused}
    assert model.config["model"]["fused"] == fused  # every checkpoint has the configuration


def test_the_experiment_of_the_defaults_is_the_default():
    assert run.compose(["experiment=digits", "run_name=x"]) == run.compose(["run_name=x"])


def test_an_unknown_choice_names_the_choices():
    with pytest.raises(MissingConfigException) as caught:
        run.compose(["norm=nonsense"])
    assert all(name in str(caught.value) for name in ("group", "layer", "local", "none", "sync"))


@pytest.mark.parametrize(
    "override, expected",
    [
        (
            "model.depth=19",
            "train.preact_resnet.preact_resnet: depth must be one of [18, 20, 34, 50, 56, 101, 110, 152, 164, 200], "
            "got 19: use `PreActResNet` for other stages",
        ),
        ("norm.temperature=-1", "expected temperature above 0, got -1: 1 leaves the output as it is"),
        ("model=mlp model.widths=[]", "train.mlp.MLP: widths must name at least one layer, each of at least 1, got []"),
        ("model=mlp model.dropout=2", "train.mlp.MLP: dropout probability has to be between 0 and 1, but got 2"),
        ("norm=group norm.layer.num_groups=0", "norm.layer.num_groups must be 1 or more, got 0"),
        ("norm=group norm.layer.num_groups=-3", "norm.layer.num_groups must be 1 or more, got -3"),
    ],
)
def test_a_value_that_a_constructor_refuses_is_said_in_one_line(override, expected, monkeypatch):
    with pytest.raises((InstantiationException, Refusal)) as caught:
        run.build(run.compose([*override.split(), "run_name=x"]))
    sentence = errors.refusal_in(caught.value)
    assert sentence.endswith(expected)
    assert "Error in call" not in sentence
    assert "\n" not in sentence
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert errors.refusal_in(caught.value) is None


def test_an_error_of_the_program_is_not_taken_for_one_of_the_user():
    assert errors.refusal_in(KeyError("x")) is None
