"""Training and evaluation do not depend on how many ranks share the images.

Batches of 68 cut 1,293 training images into 19 and a last one of a single image, which one rank gets and the other not.
"""

import math
import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from ranks import run_ranks

from train import run

SMALL = [
    "model.width=4",
    "data.global_batch_size=68",
    "optimizer.lr_per_256=0.1",
    "callbacks=none",
    "logger=none",
    "trainer=cpu",
    "+trainer.enable_checkpointing=false",
    "+trainer.enable_progress_bar=false",
    "+trainer.max_steps=30",
    "trainer.log_every_n_steps=1",
    "+trainer.limit_val_batches=0",
]


class StepLosses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["train_loss_step"]))


def as_torchrun():
    os.environ.update(LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"], TORCHELASTIC_RUN_ID="test")


def build(*overrides):
    torch.manual_seed(0)
    name = f"run_dir={tempfile.mkdtemp()}"
    return run.build(run.compose([*SMALL, "run_name=test", name, *overrides]))


def step_losses(*overrides):
    trainer, model, data = build(*overrides)
    record = StepLosses()
    trainer.callbacks.append(record)
    trainer.fit(model, datamodule=data)
    trainer.strategy.barrier()
    return record.losses


def step_losses_on_a_rank(cases):
    as_torchrun()
    return [step_losses(*case) for case in cases]


DOUBLE = ("trainer.precision=64-true",)


def test_two_ranks_have_the_step_losses_of_one_with_synchronized_statistics_and_not_with_local_ones():
    two_epochs = ("data.num_train=379", "trainer.max_steps=12")  # each of 5 batches and one of a single image
    # At the rate of the others, one ReLU on whose sign float32 values disagree grows to 1e-2 within 30 steps.
    float32 = (*two_epochs, "optimizer.lr_per_256=0.01")
    cases = [(*DOUBLE, *two_epochs), float32, (*DOUBLE, "norm=local", "trainer.max_steps=5")]
    alone = [step_losses(*case) for case in cases]
    first, second = run_ranks(2, step_losses_on_a_rank, cases)
    assert first == second
    assert [len(losses) for losses in alone + first] == [12, 12, 5] * 2
    double, single, local = (
        max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) for ours, theirs in zip(first, alone, strict=True)
    )
    assert double < 1e-9
    assert single < 1e-3
    assert local > 1e-2


def evaluate(world_size, *overrides):
    if world_size > 1:
        as_torchrun()
    figures = []
    for size in (100, 512, 2):  # with 2 images a batch the third of 3 ranks never has one
        trainer, model, data = build(*DOUBLE, f"data.eval_batch_size={size}", *overrides)
        trainer.test(model, datamodule=data, verbose=False)
        figures.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    return figures


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_evaluation_counts_every_image_once_for_any_number_of_ranks(world_size):
    (expected, *others) = evaluate(1)
    assert expected["test_total"] == 360
    for figures in [*others, *(figures for rank in run_ranks(world_size, evaluate, world_size) for figures in rank)]:
        assert figures["test_total"] == 360
        assert figures["test_correct"] == expected["test_correct"]
        assert figures["test_accuracy"] == expected["test_correct"] / 360
        assert figures["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-12)


class GatheredBuffers(Callback):
    """Notes how far this rank's running averages are from rank 0's."""

    def __init__(self):
        self.training, self.validation = 0.0, None

    def distance(self, module):
        worst = 0.0
        for buffer in module.network.buffers():
            reference = buffer.clone()
            dist.broadcast(reference, src=0)
            worst = max(worst, float((buffer - reference).abs().max()))
        return worst

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.training = max(self.training, self.distance(pl_module))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.validation = max(self.validation or 0.0, self.distance(pl_module))


def buffer_distances(norms):
    as_torchrun()
    distances = []
    for norm in norms:
        trainer, model, data = build(
            *(f"norm={norm}", "+trainer.limit_train_batches=3", "trainer.max_steps=-1", "trainer.max_epochs=1"),
            "trainer.limit_val_batches=1",
        )
        watch = GatheredBuffers()
        trainer.callbacks.append(watch)
        trainer.fit(model, datamodule=data)
        kinds = {type(module) for module in model.network.modules() if hasattr(module, "running_mean")}
        distances.append((watch.training, watch.validation, kinds))
    return distances


def test_running_averages_are_equal_while_validating_and_synchronized_ones_at_every_step():
    _, (local, sync) = run_ranks(2, buffer_distances, ("local", "sync"))
    plain = {torch.nn.BatchNorm2d}  # again, once the fit has ended
    assert local[0] > 1e-3
    assert local[1:] == (0, plain)
    assert sync == (0, 0, plain)


class Gradients(Callback):
    def on_after_backward(self, trainer, pl_module):
        self.gradients = [parameter.grad.clone() for parameter in pl_module.parameters()]


def gradients_of_the_first_step(norms):
    if "WORLD_SIZE" in os.environ:
        as_torchrun()
    gradients = []
    for norm in norms:
        trainer, model, data = build(*DOUBLE, "trainer.max_steps=1", "data.global_batch_size=5", f"norm={norm}")
        watch = Gradients()
        trainer.callbacks.append(watch)
        trainer.fit(model, datamodule=data)
        gradients.append(watch.gradients)
    return gradients


def test_uneven_ranks_have_the_gradient_of_the_mean_over_the_global_batch():
    norms = ("sync", "group")
    alone = gradients_of_the_first_step(norms)
    for rank in run_ranks(3, gradients_of_the_first_step, norms):
        torch.testing.assert_close(rank, alone, rtol=1e-9, atol=1e-12)


class AccumulatedGradients(Callback):
    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append([parameter.grad.clone() for parameter in pl_module.parameters()])


def accumulated_gradients(batch_size, every):
    if "WORLD_SIZE" in os.environ:
        as_torchrun()
    sizes = (f"data.global_batch_size={batch_size}", f"trainer.accumulate_grad_batches={every}")
    trainer, model, data = build(
        *DOUBLE, "norm=group", *sizes, "optimizer.lr_per_256=0", "trainer.max_steps=4", "trainer.max_epochs=1"
    )
    watch = AccumulatedGradients()
    trainer.callbacks.append(watch)
    trainer.fit(model, datamodule=data)
    return watch.steps


def test_accumulated_gradients_are_those_of_the_mean_over_all_images_of_the_step():
    whole = accumulated_gradients(400, 1)
    assert len(whole) == 4  # of 400, 400, 400 and 93 images
    torch.testing.assert_close(accumulated_gradients(80, 5), whole, rtol=1e-9, atol=1e-12)
    for rank in run_ranks(2, accumulated_gradients, 80, 5):
        torch.testing.assert_close(rank, whole, rtol=1e-9, atol=1e-12)


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_run_limited_by_steps_warms_up_over_the_same_ones():
    courses = []
    for limit in ("trainer.max_epochs=2", "trainer.max_epochs=-1"):
        trainer, model, data = build(limit, "trainer.max_steps=30")
        watch = Rates()
        trainer.callbacks.append(watch)
        trainer.fit(model, datamodule=data)
        courses.append(watch.rates)
    assert courses[0] == courses[1]
    assert courses[0].index(max(courses[0])) == 20  # behind the one epoch of warm-up


def test_every_logged_training_figure_is_the_mean_over_the_epochs_images():
    trainer, model, data = build(*DOUBLE, "trainer.max_steps=20", "optimizer.lr_per_256=0")
    record = StepLosses()
    trainer.callbacks.append(record)
    trainer.fit(model, datamodule=data)
    weights = [68] * 19 + [1]
    expected = math.fsum(w * loss for w, loss in zip(weights, record.losses, strict=True)) / 1293
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(expected, rel=1e-12)
