"""Lightning still has the names that it does not promise and that the trainer uses, and no other file uses any."""

import ast
import inspect
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

import train
from train import lightning_internals, plugins
from train.statistics import AveragedWeights

FILES = sorted(Path(train.__file__).parent.glob("*.py"))
OF_OTHERS = {  # private or marked names of torch, OmegaConf and Python, each in one place
    *("_target_", "_replace", "_exit", "_dynamo", "_DropoutNd", "_foreach_lerp_", "_foreach_copy_"),
    *("_C", "_profiler", "_ExperimentalConfig"),
}


class Line(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Seen(Callback):
    def __init__(self):
        self.accumulating, self.stepped, self.loops = [], [], {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.stepped.append(lightning_internals.batches_that_stepped(trainer))
        if batch_idx == 3:
            self.loops["before a batch"] = self.fit_loop(trainer)

    def on_train_batch_end(self, trainer, *arguments):
        self.accumulating.append(lightning_internals.is_accumulating(trainer))

    def on_train_end(self, trainer, pl_module):
        self.loops["at the end"] = self.fit_loop(trainer)

    @staticmethod
    def fit_loop(trainer):
        return trainer._checkpoint_connector.dump_checkpoint()["loops"]["fit_loop"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What a run of one epoch of 5 batches, two for every step, shows its callbacks."""
    seen = Seen()
    trainer = Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[seen],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path_factory.mktemp("run"),
    )
    trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(5, 1))))
    return seen


def test_the_last_batch_of_a_step_does_not_accumulate(seen):
    assert seen.accumulating == [True, False, True, False, False]


def test_the_batches_that_stepped_are_counted_and_can_be_set(seen):
    assert seen.stepped == [0, 0, 1, 1, 2]
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    lightning_internals.set_batches_that_stepped(trainer, 7)
    assert lightning_internals.batches_that_stepped(trainer) == 7


def test_a_batch_that_has_begun_is_taken_back_in_the_state_of_the_loops(seen):
    state = seen.loops["before a batch"]
    current = state["epoch_loop.batch_progress"]["current"]
    assert (current["ready"], current["completed"]) == (4, 3)
    assert lightning_internals.take_back_the_batch(state) == 0
    assert current["ready"] == current["completed"] == 3
    assert state["epoch_progress"]["current"]["completed"] == 0


def test_an_epoch_that_is_over_is_forgotten_in_the_state_of_the_loops(seen):
    state = seen.loops["at the end"]
    assert state["epoch_loop.batch_progress"]["current"]["completed"] == 5
    lightning_internals.forget_the_epoch(state)
    assert set(state["epoch_loop.batch_progress"]["current"].values()) == {0}
    assert state["epoch_loop.batch_progress"]["is_last_batch"] is False
    assert state["epoch_loop.batch_progress"]["total"]["completed"] == 5


def test_lightning_calls_the_broadcast_of_sigterm_by_the_name_that_is_replaced():
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    loop = trainer.fit_loop.epoch_loop
    assert "self._broadcast_sigterm_tensor()" in inspect.getsource(type(loop).advance)
    assert callable(loop._broadcast_sigterm_tensor)
    lightning_internals.do_not_broadcast_sigterm(trainer)
    assert loop._broadcast_sigterm_tensor is lightning_internals._nothing


def test_a_strategy_says_its_backend_and_time_out(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    strategy = plugins.strategy("cpu", timeout_minutes=3)
    assert lightning_internals.process_group_options(strategy) == ("gloo", timedelta(minutes=3))


def test_a_logger_hides_later_events_of_an_earlier_process(tmp_path, monkeypatch):
    given = {}

    class Writer:
        def __init__(self, **options):
            given.update(options)

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Writer)
    logger = TensorBoardLogger(tmp_path)
    lightning_internals.hide_events_from(logger, 12)
    assert logger.experiment is not None
    assert given["purge_step"] == 12


def test_the_average_is_found_after_setup():
    callback = AveragedWeights()
    assert lightning_internals.average_of(callback) is None
    callback.setup(Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), Line(), "fit")
    assert isinstance(callback.average, Line)
    assert int(lightning_internals.average_of(callback).n_averaged) == 0


def private_names_of_others(path):
    """Yield the private attributes that a file uses of objects whose class it does not define."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= {
        target.attr
        for node in ast.walk(tree)
        for target in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)])
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) in ("self", "cls")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            is_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr not in OF_OTHERS and not (is_self and node.attr in own):
                yield f"{path.name}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_other_file_uses_a_private_name_of_lightning(path):
    found = sorted(private_names_of_others(path))
    assert bool(found) == (path.name == "lightning_internals.py"), found


def test_a_private_name_is_noticed(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("class A(B):\n    def f(self, trainer):\n        self._timeout, loop._go()\n        self._x = 1\n")
    assert list(private_names_of_others(path)) == ["bad.py: self._timeout", "bad.py: loop._go"]
