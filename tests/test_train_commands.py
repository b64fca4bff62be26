"""What a trained checkpoint is used for, started as a user does: evaluate, export, predict, sweep, several nodes."""

import csv
import itertools
import json
import os
import re
import socket
import sys
from functools import partial

import onnx
import pytest
import torch
from cli import REPOSITORY, TORCHRUN, TRAIN, call, popen, start
from onnx.reference import ReferenceEvaluator
from PIL import Image
from ranks import run_ranks
from sklearn.datasets import load_digits
from slow import all_but
from torch import nn

from train import commands, export
from train.evaluation import Findings
from train.norms import batch_norm
from train.preact_resnet import preact_resnet

# evaluated and exported with the fused layer of this project, so that plain BatchNorm has something to differ in
SHORT = [
    *("model.width=4", "norm.activation=relu", "data.num_train=600", "trainer.max_epochs=2"),
    *("logger=none", "callbacks.progress=null"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on 2 ranks: its directory and the last line it printed."""
    directory = tmp_path_factory.mktemp("trained")
    done = start([*TORCHRUN, *TRAIN, *SHORT, "run_name=run"], directory)
    assert done.returncode == 0, done.stderr
    return directory / "outputs" / "run", done.stdout.splitlines()[-1]


def counts(line):
    return re.search(r"correct=(\d+) total=(\d+)", line).groups()


def evaluate(checkpoint, batch_size):
    run = commands.from_checkpoint(checkpoint, [f"data.eval_batch_size={batch_size}", "trainer.accelerator=cpu"])
    findings = Findings(run.data.num_classes)
    trainer = commands.trainer_for(run.config, [findings])
    trainer.test(run.model, datamodule=run.data, verbose=False)
    metrics = trainer.callback_metrics
    return int(metrics["test_correct"]), int(metrics["test_total"]), findings.confusion.tolist(), findings.mistakes


def evaluate_on_rank(checkpoint, batch_size):
    os.environ.update(LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"], TORCHELASTIC_RUN_ID="test")
    return evaluate(checkpoint, batch_size)[:3]


def test_every_number_of_ranks_and_every_batch_size_counts_as_training_did(trained):
    directory, line = trained
    checkpoint = directory / "checkpoints" / "last.ckpt"
    correct, total, confusion, mistakes = evaluate(checkpoint, 512)
    assert (str(correct), str(total)) == counts(line)
    assert sum(confusion[label][label] for label in range(10)) == correct
    assert [sum(row) for row in confusion] == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert all(mistake.label != mistake.predicted for mistake in mistakes)
    for batch_size in (1, 100):
        assert evaluate(checkpoint, batch_size)[:3] == (correct, total, confusion)
    for world_size, batch_size in ((3, 97),):  # two ranks have the test below
        for rank in run_ranks(world_size, evaluate_on_rank, checkpoint, batch_size):
            assert rank == (correct, total, confusion)


def test_the_command_evaluates_under_torchrun_and_leaves_the_classes_and_pictures(trained, tmp_path):
    directory, line = trained
    command = ["-m", "train.evaluate", f"checkpoint={directory}/checkpoints/last.ckpt", f"output={tmp_path}"]
    done = start([*TORCHRUN, *command, "data.eval_batch_size=50"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert counts(done.stdout.splitlines()[-1]) == counts(line)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert sum(row["correct"] for row in written["per_class"]) == written["correct"]
    assert 0 < written["test_accuracy"] < written["top5_accuracy"] <= 1
    assert {"confusion.png", "mistakes.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_synchronized_checkpoint_loads_into_plain_batchnorm(trained):
    state = torch.load(trained[0] / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    network = preact_resnet(20, nn.BatchNorm2d, num_classes=10, in_channels=1, image_size=8, width=4)
    network.load_state_dict({name.removeprefix("network."): value for name, value in state.items()}, strict=True)
    run = commands.from_checkpoint(trained[0] / "checkpoints" / "best.ckpt")
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(network.eval()(images), run.model(images), rtol=1e-5, atol=1e-6)


KINDS = list(itertools.product(export.SUFFIX, ["false", "true"]))


@pytest.mark.parametrize("kind, fold", all_but([("torch", "false"), ("onnx", "true")], KINDS))
def test_an_exported_network_computes_the_same_for_any_batch(kind, fold, trained, tmp_path, monkeypatch):
    checkpoint = trained[0] / "checkpoints" / "best.ckpt"
    output = tmp_path / f"network{export.SUFFIX[kind]}"
    call("export", [f"checkpoint={checkpoint}", f"format={kind}", f"output={output}", f"fold={fold}"])
    images = torch.randn(5, 1, 8, 8)
    run = commands.from_checkpoint(checkpoint)
    with torch.no_grad():
        expected = run.model(images)
        if kind == "onnx":
            (found,) = ReferenceEvaluator(onnx.load(output)).run(None, {"images": images.numpy()})
            found = torch.from_numpy(found)
        elif kind == "exported_program":
            found = torch.export.load(output).module()(images)
        else:
            load = torch.jit.load if kind == "torchscript" else partial(torch.load, weights_only=False)
            found = load(output)(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    beside = json.loads(output.with_name(f"{output.name}.json").read_text())
    assert beside["mean"] == [0.3053]
    assert beside["input"] == ["N", 1, 8, 8]


@pytest.mark.parametrize(
    "activation, temperature", [("relu", 1.0), ("leaky_relu", 0.5), ("silu", 2.0), ("identity", 2.0)]
)
def test_export_replaces_fused_layers_by_torchs_own(activation, temperature):
    def factory(num_channels):
        return batch_norm(num_channels, activation, temperature)

    network = preact_resnet(20, factory, num_classes=3, width=4)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 8, 8)
    for fold in (False, True):
        found = export.plain(network, fold)
        assert {type(module).__module__.split(".")[0] for module in found.modules()} <= {"torch"}
        assert any(isinstance(module, nn.BatchNorm2d) for module in found.modules())
        torch.testing.assert_close(found(images), network.eval()(images), rtol=1e-4, atol=1e-5)


def test_folding_leaves_only_the_norms_without_a_convolution_before_them():
    network = preact_resnet(20, nn.BatchNorm2d, num_classes=3, width=4)
    norms = [
        sum(isinstance(module, nn.BatchNorm2d) for module in export.plain(network, fold).modules())
        for fold in (False, True)
    ]
    assert norms == [19, 9]  # the second norm of each of 9 units, and the first unit's first, follow a convolution


def test_predict_prints_label_and_probability_of_each_file(trained, tmp_path):
    digits = load_digits()
    for i in range(3):
        Image.fromarray((digits.images[i] * 255 / 16).astype("uint8")).save(tmp_path / f"{i}.png")
    Image.fromarray((digits.images[0] * 65535 / 16).astype("uint16")).save(tmp_path / "0_of_16_bits.png")
    Image.new("RGB", (31, 17), (200, 10, 10)).save(tmp_path / "other.png")
    files = [str(path) for path in sorted(tmp_path.glob("*.png"))]
    done = start(["-m", "train.predict", f"checkpoint={trained[0]}/checkpoints/best.ckpt", *files], tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == files
    assert lines[0][1] == lines[1][1]  # of 8 and of 16 bits
    assert abs(float(lines[0][2]) - float(lines[1][2])) < 0.01
    assert all(label in "0123456789" and 0.1 <= float(probability) <= 1 for _, label, probability in lines)


def predicted(trained, *arguments):
    """Predict with a command that must succeed, and return what it prints."""
    done = start(["-m", "train.predict", f"checkpoint={trained[0]}/checkpoints/best.ckpt", *arguments], trained[0])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_bad_file_is_named_and_the_others_are_predicted(trained, tmp_path):
    good = [tmp_path / "a.png", tmp_path / "z.png"]
    for path in good:
        Image.new("L", (8, 8), 100).save(path)
    (tmp_path / "broken.png").write_bytes(good[0].read_bytes()[:50])
    (tmp_path / "empty").mkdir()
    bad = [tmp_path / "nothing.png", tmp_path / "broken.png", tmp_path / "empty"]
    arguments = [f"checkpoint={trained[0]}/checkpoints/best.ckpt", good[0], *bad, good[1]]
    done = start(["-m", "train.predict", *map(str, arguments)], tmp_path)
    assert done.returncode == 1
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [str(path) for path in good]
    errors = done.stderr.splitlines()
    assert errors[0] == f"error: there is no image {bad[0]}: check the name, and its target if it is a link"
    assert re.fullmatch(rf"error: {bad[1]} cannot be read \(.+\): replace or remove the file", errors[1])
    assert errors[2].startswith(f"error: there is no image in {bad[2]}: images end in .jpg, ")
    assert errors[3:] == ["error: not every image could be read, 3 failed: see the lines above"]


def test_predict_searches_a_directory_as_the_data_set_does(trained, tmp_path):
    shown = ["0.png", "a b/1.JPG", "a b/c/2.gif"]
    for name in [*shown, ".hidden.png", ".git/3.png", "__MACOSX/4.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100).save(tmp_path / name)
    assert [line.split("\t")[0] for line in predicted(trained, str(tmp_path))] == [
        f"{tmp_path}/{name}" for name in shown
    ]


def test_predictions_are_written_as_csv_with_the_next_labels(trained, tmp_path):
    digits = load_digits()
    names = ["a,b.png", 'quo"te.png', "c.png"]
    for i, name in enumerate(names):
        Image.fromarray((digits.images[i] * 255 / 16).astype("uint8")).save(tmp_path / name)
    (tmp_path / "broken.png").write_text("no image")
    command = ["-m", "train.predict", f"checkpoint={trained[0]}/checkpoints/best.ckpt", str(tmp_path), "top_k=3"]
    done = start([*command, f"output={tmp_path}/out (1)=x/p.csv", "batch_size=2", "trainer=cpu"], tmp_path)
    assert done.returncode == 1
    assert "broken.png cannot be read" in done.stderr
    with (tmp_path / "out (1)=x" / "p.csv").open(newline="") as file:
        rows = {row["file"].removeprefix(f"{tmp_path}/"): row for row in csv.DictReader(file)}
    assert list(rows) == sorted([*names, "broken.png"])
    assert "cannot be read" in rows["broken.png"].pop("error")
    assert set(rows.pop("broken.png").values()) == {f"{tmp_path}/broken.png", ""}
    run = commands.from_checkpoint(trained[0] / "checkpoints" / "best.ckpt")
    for i, name in enumerate(names):
        values = torch.from_numpy(digits.images[i] * 255 / 16).to(torch.uint8)[None, None] / 255
        expected = run.model((values - 0.3053) / 0.3761).softmax(dim=1)[0].topk(3)
        row = rows[name]
        assert [int(row[f"label{rank}"]) for rank in ("", "_2", "_3")] == expected.indices.tolist()
        found = [float(row[f"probability{rank}"]) for rank in ("", "_2", "_3")]
        assert found == pytest.approx(expected.values.tolist(), abs=1e-5)
        assert row["error"] == ""


def test_overrides_of_a_command_have_hydras_grammar_and_choices_of_groups(trained, tmp_path):
    (tmp_path / "own" / "trainer").mkdir(parents=True)
    (tmp_path / "own" / "trainer" / "mine.yaml").write_text("defaults: [cpu]\nlimit_test_batches: 1\n")
    checkpoint = f"checkpoint={trained[0]}/checkpoints/best.ckpt"
    command = ["-m", "train.evaluate", checkpoint, "--config-dir", "own", "trainer=mine", f"output={tmp_path}/out"]
    done = start([*TORCHRUN, *command, "data.eval_batch_size=7", "~data.shuffle", "+data.shuffle=false"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert counts(done.stdout.splitlines()[-1])[1] == "7"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own"]  # Hydra writes nothing
    shown = start([*TORCHRUN, *command, "data.eval_batch_size=7", "--cfg", "job"], tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("eval_batch_size: 7") == 1
    assert "limit_test_batches: 1" in shown.stdout


def test_predict_takes_any_file_name(trained, tmp_path, monkeypatch, capsys):
    names = ["a b.png", "a=b.png", "ünï 数.png", "-x.png", "--y=z.png", "./checkpoint=c.png", "line\nbreak.png"]
    for name in names:
        Image.new("L", (8, 8), 100).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    call("predict", [f"checkpoint={trained[0]}/checkpoints/best.ckpt", *names])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [*names[:-1], r"line\nbreak.png"]
    assert len({tuple(line.split("\t")[1:]) for line in lines}) == 1


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        ("evaluate", [], "checkpoint=... is needed"),
        ("evaluate", ["checkpoint=nowhere.ckpt"], "there is no checkpoint nowhere.ckpt"),
        ("evaluate", ["checkpoint=broken.ckpt"], "broken.ckpt is damaged or not a checkpoint"),
        ("evaluate", ["checkpoint={last}", "data.eval_bach_size=3"], "no such key, use data.eval_batch_size=3"),
        ("evaluate", ["checkpoint={last}", "model.width=8"], "is of another model: stem.weight has shape"),
        ("export", ["checkpoint={last}", "format=tflite"], "format must be one of torch, torchscript"),
        ("export", ["checkpoint={last}", "formt=onnx"], "'formt': there is no such key, use format=onnx"),
        ("export", ["checkpoint={last}", "onnx"], "train.export takes KEY=VALUE, got onnx"),
        ("evaluate", ["checkpoint={last}", "trainr=cpu"], "no such key, use trainer=cpu"),
        ("evaluate", ["checkpoint={last}", "trainer.devices=3"], "must be the number of processes on this node"),
        ("predict", ["checkpoint={last}", "top_k=11", "x.png"], "top_k must be a whole number from 1 to 10, got 11"),
        ("predict", ["checkpoint={last}", "top_k=a", "x.png"], "top_k must be a whole number from 1 to 10, got a"),
        ("predict", ["checkpoint={last}", "batch_size=0", "x.png"], "batch_size must be a whole number from 1, got 0"),
        ("export", ["checkpoint={last}", "fold=yes"], "fold must be true or false, got yes"),
        ("evaluate", ["checkpoint"], "train.evaluate takes KEY=VALUE, got checkpoint"),
        ("predict", ["checkpoint={last}"], "name the image files"),
        ("predict", ["checkpoint={last}", "nothing.png"], "not every image could be read, 1 failed: see the lines"),
    ],
)
def test_what_a_user_gets_wrong_is_one_sentence(command, arguments, message, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.ckpt").write_bytes(b"PK\x03\x04 cut off")
    last = trained[0] / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit) as caught:
        call(command, [argument.format(last=last) for argument in arguments])
    sentence = str(caught.value)
    assert sentence.startswith("error: ")
    assert message in sentence
    assert "\n" not in sentence


def test_a_sweep_continues_after_a_failed_job_and_again_where_it_was_cut_off(tmp_path):
    jobs = ["norm=local,nonsense", "model=mlp", "trainer.max_epochs=1", "logger=none", "+trainer.limit_train_batches=2"]
    command = [str(REPOSITORY / "scripts" / "sweep.py"), "--nproc", "2", "--output", "sweep", *jobs]
    done = start(command, tmp_path)
    assert done.returncode == 1
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        rows = {row["job"]: row for row in csv.DictReader(file)}
    assert rows["norm=local"]["state"] == "done"
    assert rows["norm=local"]["total"] == "360"
    assert rows["norm=nonsense"]["state"] == "failed"
    assert "Could not find 'norm/nonsense'" in (tmp_path / "sweep" / "norm=nonsense" / "output.log").read_text()
    assert (tmp_path / "sweep" / "sweep.png").exists()
    before = (tmp_path / "sweep" / "norm=local" / "result.json").stat().st_mtime_ns
    again = start([part.replace(",nonsense", ",layer") for part in command], tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "sweep" / "norm=local" / "result.json").stat().st_mtime_ns == before
    other = start([part.replace("max_epochs=1", "max_epochs=3") for part in command], tmp_path)
    assert other.returncode == 1
    assert "has a job with other settings" in other.stderr
    assert "Traceback" not in other.stderr


def test_two_nodes_of_two_ranks_share_one_run(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    node = [
        *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d"),
        *(f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--local-addr=127.0.0.1"),
        *("-m", "train", "model=mlp", "norm.group=node", "trainer.max_epochs=1", "+trainer.limit_train_batches=3"),
    ]
    nodes = [popen(node, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=150) for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], outputs
    printed = outputs[0][0] + outputs[1][0]
    assert "BN batch = 2 x 16 = 32 over group node" in printed
    assert len(re.findall(r"^RESULT .* world_size=4 ", printed, flags=re.MULTILINE)) == 1
    (directory,) = (tmp_path / "outputs").iterdir()
    assert "| world | 4 ranks on 2 nodes |" in (directory / "report.md").read_text()


@pytest.mark.slow
def test_hydras_own_sweep_works_for_single_processes(tmp_path):
    jobs = ["norm=local,layer", "model=mlp", "trainer.max_epochs=1", "+trainer.limit_train_batches=2", "run_name=s"]
    # the tests' one run by an interpreter that has imported nothing before
    done = start([*TRAIN, "-m", *jobs], tmp_path, python=sys.executable)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RESULT") == 2
    assert {path.name for path in (tmp_path / "outputs" / "s").iterdir()} >= {"0", "1"}
