"""Fine-tuning: weights from a file, a new head, frozen parts, rates by layer; on two ranks, from resume to export."""

import argparse
import json
import os
import re

import numpy as np
import pytest
import torch
import torchvision
from cli import TORCHRUN, TRAIN, call, start
from safetensors.torch import save_file
from slow import all_but
from test_identity import write_images
from torch import nn

from train import finetune, pretrained, resume, run
from train.distenv import Refusal
from train.optim import build_optimizer, parameter_groups


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    made = torchvision.models.resnet18(num_classes=7)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return made


def resnet18(num_classes=7, **arguments):
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=num_classes, **arguments)


def assert_taken(found, expected, without=("fc.",)):
    for name, value in expected.state_dict().items():
        if not name.startswith(without):
            torch.testing.assert_close(found.state_dict()[name], value, rtol=0, atol=0)


def wrapped(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


FILES = {
    "a state_dict": lambda weights: weights,
    "a checkpoint of torchvision's trainer": lambda weights: {
        "model": wrapped(weights, "module."),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1),
    },
    "a checkpoint of timm's trainer": lambda weights: {
        "epoch": 3,
        "state_dict": weights,
        "metric": np.float64(71.5),
        "args": argparse.Namespace(lr=0.1),
    },
    "a compiled network": lambda weights: {"model_state_dict": wrapped(weights, "_orig_mod.")},
    "a wrapper of a wrapper": lambda weights: {"state_dict": {"model": wrapped(weights, "model.module.backbone.")}},
    "half precision": lambda weights: {name: value.half() for name, value in weights.items()},
    "no counters": lambda weights: {name: value for name, value in weights.items() if "num_batches" not in name},
    "more than the network": lambda weights: wrapped(weights, "model.") | {"loss.weight": torch.ones(7)},
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_are_read_from_a_file_as_other_trainers_write_it(kind, network, tmp_path):
    torch.save(FILES[kind](network.state_dict()), tmp_path / "weights.pth")
    found = resnet18()
    loaded = pretrained.load(found, tmp_path / "weights.pth", 7)
    assert loaded.new == []
    assert loaded.classes is None
    expected = network
    if kind == "half precision":
        expected = resnet18()
        expected.load_state_dict({name: value.half().float() for name, value in network.state_dict().items()})
    assert_taken(found, expected, ("nothing",))


def test_weights_are_read_from_safetensors_and_from_our_own_checkpoints(network, tmp_path):
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    found = resnet18()
    pretrained.load(found, tmp_path / "weights.safetensors", 7)
    assert_taken(found, network, ("nothing",))
    torch.save({"state_dict": wrapped(network.state_dict(), "network."), "config": {}}, tmp_path / "last.ckpt")
    pretrained.load(found := resnet18(), tmp_path / "last.ckpt", 7)
    assert_taken(found, network, ("nothing",))


@pytest.mark.parametrize("kind", ["another number of classes", "no head"])
def test_a_head_for_other_classes_is_new_and_the_rest_is_taken(kind, network, tmp_path):
    weights = network.state_dict()
    if kind == "no head":
        weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    torch.save(weights, tmp_path / "weights.pth")
    found, fresh = resnet18(2), resnet18(2)
    loaded = pretrained.load(found, tmp_path / "weights.pth", 2)
    assert_taken(found, network)
    torch.testing.assert_close(found.fc.weight, fresh.fc.weight, rtol=0, atol=0)
    assert loaded.new == ["fc.weight", "fc.bias"]
    assert loaded.classes == (None if kind == "no head" else 7)
    assert "new head fc" in loaded.line(tmp_path)


HEADS = {
    "torchvision": ["densenet121", "googlenet", "squeezenet1_1", "mobilenet_v3_small", "efficientnet_b0"],
    "timm": ["resnet18d", "deit_tiny_distilled_patch16_224", "convnext_atto", "regnety_002", "levit_128s"],
}


QUICK = [("torchvision", "mobilenet_v3_small"), ("timm", "levit_128s")]


@pytest.mark.parametrize("library, name", all_but(QUICK, [(kind, name) for kind in HEADS for name in HEADS[kind]]))
def test_the_head_of_other_networks_is_found_and_the_backbone_can_be_frozen(library, name, tmp_path):
    size = ["data.image_size=64"] if name == "levit_128s" else []
    overrides = ["data=fake", "run_name=x", f"model={library}", f"model.name={name}", *size]
    many = run.build_model(run.compose([*overrides, "data.num_classes=12"]))[0].network
    torch.save(many.state_dict(), tmp_path / "weights.pth")
    file = f"model.pretrained={tmp_path}/weights.pth"
    model = run.build_model(run.compose([*overrides, "data.num_classes=3", file, "finetune.freeze=backbone"]))[0]
    head = pretrained.heads(model.network, 3)
    assert head
    parts = {parameter: parameter.rpartition(".")[0] in head for parameter, _ in model.network.named_parameters()}
    taken, weights = model.network.state_dict(), many.state_dict()
    for parameter, value in model.network.named_parameters():
        assert value.requires_grad == parts[parameter]
        if not parts[parameter]:
            torch.testing.assert_close(taken[parameter], weights[parameter], rtol=0, atol=0)
    model.train()
    assert not any(module.training for module in model.network.modules() if isinstance(module, nn.BatchNorm2d))


def test_an_old_file_of_torchvisions_densenet_is_read(tmp_path):
    made = torchvision.models.densenet121(num_classes=3)
    old = {re.sub(r"(norm|conv)([12])\.", r"\1.\2.", name): value for name, value in made.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "weights.pth")
    found = torchvision.models.densenet121(num_classes=3)
    pretrained.load(found, tmp_path / "weights.pth", 3)
    assert_taken(found, made, ("nothing",))


def test_auxiliary_classifiers_are_left_out_and_a_first_convolution_is_adapted(tmp_path):
    made = torchvision.models.googlenet(num_classes=3, aux_logits=True, init_weights=False)
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    gray = ["data.in_channels=1", "data.mean=[0.5]", "data.std=[0.5]", "data=fake", "data.num_classes=3", "run_name=x"]
    overrides = [*gray, "model=torchvision", "model.name=googlenet", f"model.pretrained={tmp_path}/weights.pth"]
    found = run.build_model(run.compose(overrides))[0].network
    first = "conv1.conv.weight"
    torch.testing.assert_close(found.state_dict()[first], made.state_dict()[first].sum(1, keepdim=True))
    assert_taken(found, made, ("aux", "conv1."))


class Malicious:
    def __reduce__(self):
        return (os.system, ("touch /tmp/never",))


def bad_files(network, folder):
    weights = network.state_dict()
    wider = torchvision.models.resnet18(num_classes=7, width_per_group=64)
    wider.layer4[1].conv2 = nn.Conv2d(512, 512, 1, bias=False)
    contents = {
        "other.pth": torchvision.models.resnet34(num_classes=7).state_dict(),
        "smaller.pth": {name: value for name, value in weights.items() if not name.startswith("layer4.1")},
        "shape.pth": wider.state_dict(),
        "nan.pth": weights | {"bn1.bias": torch.full((64,), torch.nan)},
        "empty_dict.pth": {},
        "numbers.pth": {"epoch": 3, "model": {"lr": 0.1}},
        "list.pth": [1, 2],
        "module.pth": network,
        "code.pth": {"state_dict": weights, "hook": Malicious()},
    }
    for name, content in contents.items():
        torch.save(content, folder / name)
    (folder / "text.pth").write_text("weights")
    (folder / "empty.pth").touch()
    (folder / "text.safetensors").write_text("weights")
    whole = (folder / "nan.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])


BAD = {
    "other.pth": "is of another network: layer1.2.conv1.weight has shape (64, 64, 3, 3) in the file and none in the",
    "smaller.pth": "is of another network: layer4.1.conv1.weight has shape none in the file and (512, 512, 3, 3) in",
    "shape.pth": "layer4.1.conv2.weight has shape (512, 512, 1, 1) in the file and (512, 512, 3, 3) in the network",
    "nan.pth": "has values in bn1.bias that are not finite",
    "empty_dict.pth": "has no weights: expected a state_dict",
    "numbers.pth": "has no weights: expected a state_dict",
    "list.pth": "has no weights: expected a state_dict",
    "module.pth": "contains objects of torch.nn.modules",
    "code.pth": "contains objects of posix.system, which are not built",
    "text.pth": "is damaged or not a file of weights",
    "empty.pth": "is damaged or not a file of weights",
    "cut.pth": "is damaged or not a file of weights",
    "text.safetensors": "is damaged or not a safetensors file",
    "missing.pth": "there is no file",
    "https://example.org/weights.pth": "must be a local file",
    ".": "is a directory",
}


def test_a_file_that_cannot_be_used_is_refused_and_changes_nothing(network, tmp_path):
    bad_files(network, tmp_path)
    found, fresh = resnet18(), resnet18()
    for name, sentence in BAD.items():
        path = name if "://" in name else tmp_path / name
        with pytest.raises(Refusal) as caught:
            pretrained.load(found, pretrained.Path(path), 7)
        assert sentence in str(caught.value), name
        assert "\n" not in str(caught.value)
    assert_taken(found, fresh, ("nothing",))
    assert not os.path.exists("/tmp/never")


def test_weights_of_batch_norm_are_refused_for_another_norm(network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    overrides = ["model=torchvision", "data=fake", "data.num_classes=7", "norm=group", "run_name=x"]
    with pytest.raises(Refusal, match="its weights are for batch normalization, use norm=sync or norm=local"):
        run.build_model(run.compose([*overrides, f"model.pretrained={tmp_path}/weights.pth"]))


def trained(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_parts_are_frozen_by_name_and_pattern_and_stay_in_evaluation():
    network = resnet18()
    everything = trained(network)
    frozen = finetune.freeze(network, ["conv1", "bn1", "layer[12]", "fc.bias"], ["fc"])
    left = {name for name in everything if name.startswith(("layer3", "layer4", "fc.weight"))}
    assert trained(network) == left
    assert network.bn1 in frozen
    assert network.layer2[1].bn2 in frozen
    assert not network.layer1.training
    assert network.layer3.training

    network = resnet18()
    assert set(finetune.freeze(network, "statistics", ["fc"])) == {m for m in network.modules() if _is_norm(m)}
    assert trained(network) == everything

    network = resnet18()
    finetune.freeze(network, "norms", ["fc"])
    assert trained(network) == {name for name in everything if "bn" not in name and "downsample.1" not in name}

    vit = torchvision.models.vit_b_16(image_size=32, num_classes=3)
    finetune.freeze(vit, ["encoder.pos_embedding", "norms"], ["heads.head"])
    assert not vit.encoder.pos_embedding.requires_grad
    assert not vit.encoder.ln.weight.requires_grad
    assert vit.encoder.layers[0].mlp[0].weight.requires_grad


def _is_norm(module):
    return isinstance(module, nn.BatchNorm2d)


def test_a_dropout_that_serves_the_head_still_drops():
    network = torchvision.models.mobilenet_v3_small(num_classes=3)
    finetune.freeze(network, "backbone", ["classifier.3"])
    assert network.classifier[2].training
    assert not network.classifier[0].training
    assert trained(network) == {"classifier.3.weight", "classifier.3.bias"}


@pytest.mark.parametrize(
    "names, sentence",
    [
        (["layer5"], "finetune.freeze names layer5, which the network does not have: use layer"),
        ("*", "leaves nothing to train"),
        (["backbone", "head", "fc"], "finetune.freeze names head, which the network does not have"),
    ],
)
def test_a_wrong_part_is_refused(names, sentence):
    with pytest.raises(Refusal, match=re.escape(sentence)):
        finetune.freeze(resnet18(), names, ["fc"])


def test_rates_fall_by_block_and_factors_come_on_top():
    network = resnet18()
    found = finetune.rates(network, 0.5, {"layer4.*": 3.0, "head": 10.0}, ["fc"])
    assert found["fc.weight"] == 10
    assert found["layer4.1.conv1.weight"] == pytest.approx(3 * 0.5)
    assert found["layer4.0.bn1.weight"] == pytest.approx(3 * 0.5**2)
    assert found["layer1.0.conv2.weight"] == pytest.approx(0.5**8)
    assert found["bn1.weight"] == found["conv1.weight"] == pytest.approx(0.5**9)
    vit = torchvision.models.vit_b_16(image_size=32, num_classes=3)
    found = finetune.rates(vit, 0.5, {}, ["heads.head"])
    assert found["heads.head.weight"] == 1
    assert found["encoder.layers.encoder_layer_11.mlp.0.weight"] == 0.5
    assert found["encoder.layers.encoder_layer_0.ln_1.weight"] == 0.5**12
    assert found["conv_proj.weight"] == found["class_token"] == found["encoder.pos_embedding"] == 0.5**13
    with pytest.raises(Refusal, match=r"finetune\.rates names layer9"):
        finetune.rates(network, 1.0, {"layer9": 2.0}, ["fc"])


def test_the_optimizer_gets_the_rates_highest_first_and_no_frozen_parameter():
    network = resnet18()
    finetune.freeze(network, "layer1", ["fc"])
    rates = finetune.rates(network, 1.0, {"head": 10.0}, ["fc"])
    groups = parameter_groups(network, 0.1, 0.01, rates)
    found = [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups]
    assert [rate for rate, _, _ in found] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert [decay for _, decay, _ in found] == [0.1, 0.0, 0.1, 0.0]
    assert sum(number for _, _, number in found) == len(trained(network))
    optimizer = build_optimizer(
        network, factory=torch.optim.SGD, global_batch_size=256, lr_per_256=0.5, rates=rates | {"conv1.weight": 2.0}
    )
    assert [group["lr"] for group in optimizer.param_groups] == [5.0, 5.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        (["callbacks=recalibrate", "finetune.freeze=statistics"], "leave one of them out"),
        (["callbacks=ema", "finetune.freeze=[layer1]"], "set callbacks.ema.recalibrate_batches=0"),
        (["finetune.layer_decay=0"], "finetune.layer_decay must be a number above 0 and up to 1, got 0"),
        (["finetune.layer_decay=1.1"], "finetune.layer_decay must be a number above 0 and up to 1, got 1.1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, sentence):
    config = run.compose(["trainer=cpu", "run_name=x", *overrides])
    with pytest.raises(Refusal, match=re.escape(sentence)):
        run.build(config)


RUN = [
    *("experiment=finetune", "data.num_classes=2", "data.image_size=32", "data.eval_transforms=[]"),
    *("data.num_workers=0", "data.global_batch_size=4", "data.val_fraction=0.25", "scheduler=constant"),
    *("finetune.freeze=[bn1]", "finetune.layer_decay=0.7", "logger=csv", "trainer=cpu", "callbacks.progress=null"),
]


@pytest.mark.slow
def test_a_network_is_fine_tuned_on_two_ranks_resumed_exactly_evaluated_used_and_exported(network, tmp_path, capsys):
    for part in ("train", "val"):
        write_images(tmp_path / "images" / part, ["apple", "pear"])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    overrides = [*RUN, f"data.root={tmp_path}/images", "model.pretrained=weights.pth"]

    def fit(name, epochs):
        return start(
            [*TORCHRUN, *TRAIN, *overrides, f"run_name={name}", f"trainer.max_epochs={epochs}", "resume=auto"], tmp_path
        )

    whole = fit("whole", 2)
    assert whole.returncode == 0, whole.stderr
    assert "pretrained: 120 tensors from weights.pth, new head fc (the file has 7 classes)" in whole.stdout
    assert fit("parts", 1).returncode == 0
    (tmp_path / "weights.pth").unlink()
    parts = fit("parts", 2)
    assert parts.returncode == 0, parts.stderr
    ends = [resume.load(tmp_path / f"outputs/{name}/checkpoints/last.ckpt") for name in ("whole", "parts")]
    torch.testing.assert_close(ends[1]["state_dict"], ends[0]["state_dict"], rtol=0, atol=0)
    weights = ends[0]["state_dict"]
    for name, value in network.bn1.state_dict().items():
        torch.testing.assert_close(weights[f"network.bn1.{name}"], value, rtol=0, atol=0)
    assert not torch.equal(weights["network.layer1.0.bn1.running_mean"], network.layer1[0].bn1.running_mean)
    assert weights["network.fc.weight"].shape == (2, 512)

    checkpoint = f"checkpoint={tmp_path}/outputs/whole/checkpoints/last.ckpt"
    call("evaluate", [checkpoint, f"output={tmp_path}/found"])
    figures = json.loads((tmp_path / "found/evaluation.json").read_text())
    assert figures["total"] == 8
    capsys.readouterr()
    call("predict", [checkpoint, tmp_path / "images/val"])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if "\t" in line]
    assert sum(label == file.split("/")[-2] for file, label, _ in lines) == figures["correct"]
    call("export", [checkpoint, "format=onnx", "fold=true"])
    assert "differs by" in capsys.readouterr().out


def test_a_file_that_is_missing_ends_a_run_before_it_writes_anything(tmp_path):
    directory = tmp_path / "run"
    with pytest.raises(Refusal, match=r"there is no file none\.pth: name one with model\.pretrained=FILE"):
        run.fit(run.compose([*RUN, "model.pretrained=none.pth", f"run_dir={directory}"]))
    assert not directory.exists()
