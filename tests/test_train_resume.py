"""A run that was killed or stopped and resumed is the run that was not, bit for bit."""

import csv
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from cli import TORCHRUN, TRAIN, popen, start
from lightning.pytorch import Callback
from ranks import run_ranks
from slow import all_but

from train import distenv, resume, run, stop
from train.distenv import Refusal
from train.loggers import MetricsFile
from train.samplers import GlobalBatchSampler
from train.stop import Stopped, StopSignals, StopsTests

# Everything that has a state or draws random numbers: 2 epochs of 12 steps, running statistics of each rank's own.
STATEFUL = [
    *("model=mlp", "model.widths=[16,16]", "model.dropout=0.1", "norm=local", "mixing=mixup_cutmix"),
    *("data.num_train=800", "data.num_workers=1", "trainer.max_epochs=2", "trainer.log_every_n_steps=3"),
    *("callbacks=ema", "callbacks.ema.decay=0.9", "callbacks.ema.recalibrate_batches=2", "logger=csv"),
    *("callbacks.snapshots.every_n_steps=4", "run_name=run"),
]
STEPS = 24  # with snapshots after 0, 4, 8, 11, 12, 16, 20, 23 and all of them
CLOCK = {"images_per_second", "data_wait"}


def what_a_run_leaves(directory):
    """Everything in the last checkpoint that does not name the run or depend on the clock, and the metrics."""
    path = directory / "outputs" / "run"
    checkpoint = torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)
    kept = (
        "state_dict",
        "current_model_state",
        "optimizer_states",
        "lr_schedulers",
        "loops",
        "snapshot",
    )
    with (path / "csv" / "metrics.csv").open(newline="") as file:
        rows = [{name: value for name, value in row.items() if name not in CLOCK} for row in csv.DictReader(file)]
    return {name: checkpoint[name] for name in kept}, rows


def assert_identical(one, other, where=""):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert set(one) == set(other), where
        for key in one:
            assert_identical(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_identical(*pair, f"{where}.{index}")
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    done = start([*TORCHRUN, *TRAIN, *STATEFUL], directory)
    assert done.returncode == 0, done.stderr
    return what_a_run_leaves(directory)


DEATHS = {  # the rank that dies and the step after which it dies: the snapshot that the next life begins with
    (0, 5): 4,  # right after a snapshot, the rank that has written it
    (1, 10): 8,  # in the middle between two snapshots, the other rank
    (0, 19): 16,  # in the second epoch: another order of the images, and a best checkpoint is there
}


@pytest.mark.slow
def test_ranks_killed_in_three_lives_leave_no_trace_once_torchrun_has_restarted_the_run(uninterrupted, tmp_path):
    kill = f"+callbacks.kill={{_target_: saboteur.Killed, deaths: {[list(death) for death in DEATHS]}}}"
    done = start([*TORCHRUN, f"--max-restarts={len(DEATHS)}", *TRAIN, *STATEFUL, kill], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["run"]
    resumed = re.findall(r"resumed from .*, after step (\d+)", done.stdout)
    assert [int(step) for step in resumed] == list(DEATHS.values())
    left = what_a_run_leaves(tmp_path)
    assert_identical(left[0], uninterrupted[0])
    assert left[1] == uninterrupted[1]
    steps = [int(row["step"]) for row in left[1] if row["train_loss_step"]]
    assert steps == list(range(2, STEPS, 3))


def test_sigterm_and_sigint_save_and_stop_within_ten_seconds_and_the_resumed_run_is_the_same(uninterrupted, tmp_path):
    last = tmp_path / "outputs" / "run" / "checkpoints" / "last.ckpt"
    command = [*TORCHRUN, *TRAIN, *STATEFUL, "resume=auto"]
    for signum in (signal.SIGTERM, signal.SIGINT):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = popen([*command, "+callbacks.slow={_target_: saboteur.Slow, seconds: 0.1}"], tmp_path)
        while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == before):
            time.sleep(0.02)
        process.send_signal(signum)
        sent = time.monotonic()
        stdout, stderr = process.communicate(timeout=60)
        assert time.monotonic() - sent < 10
        assert process.returncode != 0
        assert f"stopped by {signum.name}: " in stdout, stderr
        assert "with resume=auto run_dir='outputs/run'" in stdout
    done = start(command, tmp_path)
    assert done.returncode == 0, done.stderr
    left = what_a_run_leaves(tmp_path)
    assert_identical(left[0], uninterrupted[0])
    assert left[1] == uninterrupted[1]


SMALL = [
    *("model=mlp", "model.widths=[16]", "scheduler=constant", "logger=csv", "trainer=cpu", "trainer.max_epochs=2"),
    *(
        "callbacks.snapshots.every_n_steps=3",
        "callbacks.progress=null",
        "run_name=run",
        "+trainer.limit_train_batches=8",
    ),
    *("trainer.precision=64-true", "data.global_batch_size=30", "+trainer.limit_val_batches=1"),
]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing would take most of the time of a run in this process."""
    monkeypatch.setattr("train.callbacks.draw_curves", lambda *arguments: None)
    monkeypatch.setattr("train.pictures.draw_confusion", lambda *arguments: None)
    monkeypatch.setattr("train.pictures.draw_mistakes", lambda *arguments: None)


class Interrupted(Exception):
    pass


class InterruptAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Interrupted


def fit(directory, *overrides, interrupt_at=None):
    """Fit in this process, or as a rank of `run_ranks`; return the weights in the last checkpoint."""
    if "WORLD_SIZE" in os.environ:
        os.environ.update(LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"], TORCHELASTIC_RUN_ID="test")
    if interrupt_at is not None:
        overrides += (f"+callbacks.interrupt={{_target_: test_train_resume.InterruptAt, step: {interrupt_at}}}",)
    config = run.compose([*SMALL, f"run_dir={directory}", *overrides])
    if interrupt_at is not None:
        with pytest.raises(Interrupted):
            run.fit(config)
        return None
    run.fit(config)
    return torch.load(Path(directory) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def interrupted_on_ranks(directory, step, overrides):
    fit(directory, *overrides, interrupt_at=step)
    # the ranks of a run are torn down together
    return torch.distributed.get_rank()


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    """A run interrupted on 2 ranks after 11 of 16 steps, with a snapshot after 11: 8 and 3."""
    directory = tmp_path_factory.mktemp("two_ranks")
    run_ranks(2, interrupted_on_ranks, directory, 12, [])
    return directory


def test_a_run_goes_on_with_the_same_images_on_another_number_of_ranks(of_two_ranks, tmp_path):
    expected = fit(tmp_path)
    continued = fit(of_two_ranks, "resume=auto")
    for name, weights in expected.items():
        torch.testing.assert_close(continued[name], weights, rtol=1e-9, atol=1e-12, msg=name)
    with (of_two_ranks / "csv" / "metrics.csv").open(newline="") as file:
        epochs = [row["epoch"] for row in csv.DictReader(file) if row["val_accuracy"]]
    assert epochs == ["0", "1"]


def snapshot(**changes):
    return {"world_size": 2, "global_batch_size": 30, "batch_idx": 3, "buffers": None} | changes


@pytest.mark.parametrize(
    "overrides, changes, reason",
    [
        ((), {"global_batch_size": 60}, "the global batch would change from 60 to 30 images"),
        (("norm=local",), {}, "BatchNorm is not over all ranks"),
        ((), {"buffers": [[], []]}, "BatchNorm is not over all ranks"),
        (("model.dropout=0.5",), {}, "every rank draws its own dropout masks"),
        (("mixing=mixup",), {}, "images are mixed within a rank"),
    ],
)
def test_another_number_of_ranks_is_refused_where_the_run_would_change(overrides, changes, reason):
    config = run.compose([*SMALL, *overrides])
    _, model, _data = run.build(config)
    checkpoint = {"config": model.config, "state_dict": model.state_dict(), "snapshot": snapshot(**changes)}
    with pytest.raises(Refusal, match=f"x.ckpt is of 2 ranks and there are 1: {reason}.*; start 2 ranks"):
        resume.check(Path("x.ckpt"), checkpoint, config, run.instantiate(config.norm), model.network, 30)


@pytest.mark.parametrize(
    "override, change",
    [
        ("seed=1", "seed was 0 and is 1"),
        ("model.widths=[17]", r"model.widths was \[16\] and is \[17\]"),
        ("optimizer=adamw", "optimizer.factory._target_ was torch.optim.SGD and is torch.optim.AdamW"),
        ("trainer.accumulate_grad_batches=2", "accumulate_grad_batches was 1 and is 2"),
        ("data.train_transforms=[]", r"data.train_transforms was \[.*\] and is \[\]"),
        ("data.mean=[0.1]", r"data.mean was \[0.3053\] and is \[0.1\]"),
        ("callbacks=ema", "callbacks.ema._target_ was None and is train.statistics.AveragedWeights"),
    ],
)
def test_what_would_change_the_course_of_a_run_is_refused_by_name(of_two_ranks, override, change):
    with pytest.raises(Refusal, match=rf"cannot be continued exactly: .*{change}"):
        fit(of_two_ranks, "resume=auto", override)


def test_a_directory_with_a_run_is_not_overwritten(of_two_ranks, tmp_path):
    with pytest.raises(Refusal, match="holds a run already: continue it with resume=auto, or choose another run_name"):
        fit(of_two_ranks)
    with pytest.raises(Refusal, match="holds a run already"):
        fit(of_two_ranks, f"resume={tmp_path}/other.ckpt")


@pytest.mark.parametrize("resume_from", ["null", "auto", "other.ckpt"])
def test_a_restart_continues_the_run_of_its_directory(resume_from, of_two_ranks, monkeypatch):
    monkeypatch.setattr(distenv, "life", lambda: distenv.Life("2", is_restart=True))
    config = run.compose([*SMALL, f"run_dir={of_two_ranks}", f"resume={resume_from}"])
    assert resume.find(config) == of_two_ranks / "checkpoints" / "last.ckpt"


def test_a_finished_run_of_averaged_weights_does_not_train_on_from_their_average(tmp_path):
    fit(tmp_path, "callbacks=ema", "trainer.max_epochs=1")
    with pytest.raises(Refusal, match="finished run whose weights have become their average: it cannot train for 2"):
        fit(tmp_path, "callbacks=ema", "trainer.max_epochs=2", "resume=auto")


@pytest.mark.parametrize(
    "first, then, message",
    [
        ("trainer.max_epochs=2", "trainer.max_epochs=1", "a run of 2 epochs, and trainer.max_epochs may grow .* got 1"),
        ("+trainer.max_steps=5", "+trainer.max_steps=4", "a run of 5 steps, and trainer.max_steps may grow .* got 4"),
        ("+trainer.max_steps=5", "+trainer.max_steps=0", "a run of 5 steps, and trainer.max_steps may grow .* got 0"),
    ],
)
def test_a_shorter_run_is_refused(first, then, message, tmp_path):
    fit(tmp_path, first)
    with pytest.raises(Refusal, match=message):
        fit(tmp_path, then, "resume=auto")


LIMITS = [(*limit, validated) for limit in [(7, 1), (8, 1), (9, 1), (16, 1), (4, 2), (5, 2)] for validated in (1, 0)]


@pytest.mark.parametrize("first, every, validated", all_but(LIMITS[::3], LIMITS))
def test_a_raised_limit_of_steps_continues_also_from_the_end_of_an_epoch(first, every, validated, tmp_path):
    more = [
        "trainer.max_epochs=-1",
        f"trainer.accumulate_grad_batches={every}",
        f"trainer.limit_val_batches={validated}",
    ]
    fit(tmp_path / "one", *more, "+trainer.max_steps=18")
    fit(tmp_path / "two", *more, f"+trainer.max_steps={first}")
    fit(tmp_path / "two", *more, "+trainer.max_steps=18", "resume=auto")
    one, two = (torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("one", "two"))
    assert one["global_step"] == two["global_step"] == 18
    for name in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_identical(one[name], two[name])


def test_another_logger_may_join_a_resumed_run(of_two_ranks, tmp_path):
    fit(tmp_path, "logger=default", "trainer.max_epochs=3", f"resume={of_two_ranks}/checkpoints/last.ckpt")
    assert (tmp_path / "tensorboard").is_dir()


class Signalling(Callback):
    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_testing_ends_with_its_exit_code(tmp_path):
    trainer, model, data = run.build(run.compose([*SMALL, f"run_dir={tmp_path}", "data.eval_batch_size=100"]))
    trainer.callbacks += [StopsTests(), Signalling()]
    with pytest.raises(Stopped) as caught:
        trainer.test(model, datamodule=data, verbose=False)
    assert caught.value.code == 128 + signal.SIGTERM


def test_a_finished_run_is_only_tested_again(tmp_path):
    weights = fit(tmp_path)
    rows = (tmp_path / "csv" / "metrics.csv").read_text()
    assert_identical(fit(tmp_path, "resume=auto"), weights)
    assert (tmp_path / "csv" / "metrics.csv").read_text() == rows


def test_accumulated_gradients_are_never_lost(tmp_path):
    expected = fit(tmp_path / "a", "trainer.accumulate_grad_batches=3")
    fit(tmp_path / "b", "trainer.accumulate_grad_batches=3", interrupt_at=5)
    assert_identical(fit(tmp_path / "b", "trainer.accumulate_grad_batches=3", "resume=auto"), expected)


def test_a_resumed_epoch_has_the_batches_that_are_left_and_the_next_one_all():
    sampler = GlobalBatchSampler(21, 4, rank=0, world_size=2, shuffle=True, seed=3)
    epochs = []
    for epoch in (4, 5):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    sampler.resume_at(4, 2)
    assert list(sampler) == epochs[0][2:]
    sampler.set_epoch(5)
    assert list(sampler) == epochs[1]


def test_a_metrics_file_is_cut_back_to_the_checkpoint_and_appended(tmp_path):
    def log(metrics, steps):
        for step in steps:
            metrics.log_metrics({"loss": 0.1 * step}, step)

    whole, first, second = (MetricsFile(str(tmp_path / name)) for name in ("whole", "part", "part"))
    log(whole, range(9))
    whole.log_metrics({"accuracy": 0.5}, 9)
    whole.save()
    log(first, range(5))
    state = first.state_dict()
    log(first, range(5, 8))
    first.log_metrics({"accuracy": 0.5}, 7)
    first.save()
    first.path.write_text(first.path.read_text() + "0.1,")  # the last row was cut off by the kill
    second.resume(state)
    log(second, range(5, 9))
    second.log_metrics({"accuracy": 0.5}, 9)
    second.finalize("success")
    assert second.path.read_text() == whole.path.read_text()


def blocked_in_a_collective():
    stop.DEADLINE_S = 1
    signals = StopSignals()
    signals.install()
    if torch.distributed.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        torch.distributed.barrier()  # which the other rank never enters
    time.sleep(60)


def test_a_rank_that_waits_for_a_dead_peer_ends_by_itself_after_a_signal():
    began = time.monotonic()
    with pytest.raises(AssertionError, match=f"exit code {128 + signal.SIGTERM}"):
        run_ranks(2, blocked_in_a_collective)
    assert time.monotonic() - began < 30
    assert stop.DEADLINE_S < 10  # what is promised for a run that is told to stop


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    signals = StopSignals()
    signals.install()
    os.kill(os.getpid(), signal.SIGTERM)
    signals.remove()
    assert signals.received == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
