"""Running statistics before a validation, averaged weights, the size of the BN batch, and checks of the replicas."""

import os

import pytest
import torch
import torch.distributed as dist
from hydra.utils import instantiate
from lightning.pytorch import Callback
from ranks import run_ranks
from test_train_on_ranks import as_torchrun, build
from torch import nn

from train import run
from train.distenv import Refusal

SHORT = (
    "+trainer.limit_train_batches=3",
    "trainer.max_steps=-1",
    "trainer.max_epochs=1",
    "trainer.limit_val_batches=1",
)


class Watch(Callback):
    """Keeps what the model is when a validation begins, and every rank's running means before."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.before = {name: buffer.clone() for name, buffer in pl_module.network.named_buffers()}

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.state = {name: value.clone() for name, value in pl_module.network.state_dict().items()}


def validated(*overrides):
    trainer, model, data = build(*SHORT, *overrides)
    watch = Watch()
    trainer.callbacks.append(watch)
    trainer.fit(model, datamodule=data)
    return watch.before, watch.state, model, data


def merged_statistics():
    as_torchrun()
    before, after, _, data = validated("norm=local", "trainer.precision=64-true")
    return before, after, data.train_dataloader().batch_sampler.local_samples()


def test_statistics_of_local_batches_are_pooled_and_not_averaged_before_a_validation():
    (one, merged, images_one), (other, merged_there, images_other) = run_ranks(2, merged_statistics)
    assert (images_one, images_other) == (647, 646)  # the last global batch has a single image
    share = images_one / (images_one + images_other)
    name = "stages.1.0.norm2.running_"
    mean = share * one[name + "mean"] + (1 - share) * other[name + "mean"]
    within = share * one[name + "var"] + (1 - share) * other[name + "var"]
    between = share * (one[name + "mean"] - mean) ** 2 + (1 - share) * (other[name + "mean"] - mean) ** 2
    for state in (merged, merged_there):
        torch.testing.assert_close(state[name + "mean"], mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state[name + "var"], within + between, rtol=1e-9, atol=1e-12)
    assert float((between / within).max()) > 1e-6


RECALIBRATED = ("+callbacks.r={_target_: train.statistics.Recalibrate, num_batches: 3}", "trainer.precision=64-true")
EMA = (
    "+callbacks.e={_target_: train.statistics.AveragedWeights, decay: 0.5, recalibrate_batches: 3}",
    "trainer.precision=64-true",
)


def recalibrated(overrides):
    if "WORLD_SIZE" in os.environ:
        as_torchrun()
    return validated(*overrides)[1]


def test_recalibrated_statistics_are_those_of_the_population_for_any_number_of_ranks():
    _, alone, model, data = validated(*RECALIBRATED)
    stem = model.network.stem.double()
    images = torch.cat(list(data.recalibration_batches(3))).double()
    expected = stem(images).detach()
    values = expected.numpy()
    count = values.size / values.shape[1]
    mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3)) * count / (count - 1)
    name = "stages.0.0.norm1.running_"
    # the weights of the stem have moved no more since: the validation follows the last step
    torch.testing.assert_close(alone[name + "mean"], torch.from_numpy(mean), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alone[name + "var"], torch.from_numpy(var), rtol=1e-9, atol=1e-12)
    for state in run_ranks(2, recalibrated, RECALIBRATED):
        torch.testing.assert_close(state[name + "var"], alone[name + "var"], rtol=1e-6, atol=1e-9)


class Weights(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(pl_module.network.head.weight.detach().clone())


def test_averaged_weights_are_validated_with_statistics_of_their_own():
    trainer, model, data = build(*SHORT, *EMA)
    watch, weights = Watch(), Weights()
    trainer.callbacks += [watch, weights]
    trainer.fit(model, datamodule=data)
    first, second, third = weights.steps
    average = 3 / 12 * (2 / 11 * first + 9 / 11 * second) + 9 / 12 * third  # below the decay of 0.5 at the start
    torch.testing.assert_close(watch.state["head.weight"], average, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.network.head.weight.detach(), average, rtol=1e-12, atol=1e-12)
    images = torch.cat(list(data.recalibration_batches(3))).double()
    mean = model.network.stem(images).mean((0, 2, 3)).detach()
    torch.testing.assert_close(watch.state["stages.0.0.norm1.running_mean"], mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.network.stages[0][0].norm1.running_mean, mean, rtol=1e-9, atol=1e-12)


class Diverge(Callback):
    """Changes a weight on one rank."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if dist.get_rank() == 1 and batch_idx == 1:
            pl_module.network.head.bias.data += 1


def check_replicas(cases):
    as_torchrun()
    outcomes = []
    for norm, diverge in cases:
        check = "+callbacks.check={_target_: train.statistics.ReplicaCheck, every_n_steps: 2}"
        trainer, model, data = build("trainer.max_steps=2", f"norm={norm}", check)
        trainer.callbacks += [Diverge()] if diverge else []
        try:
            trainer.fit(model, datamodule=data)
            outcomes.append(None)
        except Refusal as refusal:
            outcomes.append(str(refusal))
    return outcomes


def test_replicas_that_differ_end_the_run_on_every_rank_and_equal_ones_do_not():
    for local, sync, diverged in run_ranks(2, check_replicas, [("local", False), ("sync", False), ("local", True)]):
        assert (local, sync) == (None, None)
        assert "differ after step 2" in diverged
        assert "network.head.bias: ranks [0] against ranks [1]" in diverged


@pytest.mark.parametrize(
    "overrides, per_rank, line",
    [
        (["norm=sync"], 8, "BN batch = 4 x 8 = 32 over all ranks"),
        (["norm=sync", "norm.group=node"], 8, "BN batch = 2 x 8 = 16 over group node"),
        (["norm=sync", "norm.group=4"], 8, "BN batch = 4 x 8 = 32 over groups of 4"),
        (["norm=local"], 2, "BN batch = 1 x 2 = 2 over each rank alone; warning: statistics of fewer than 16 images"),
        (["norm=group"], 2, "no batch statistics"),
    ],
)
def test_the_batch_that_is_normalized_over_is_announced_with_a_warning_where_it_is_small(
    overrides, per_rank, line, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    norm = instantiate(run.compose(overrides).norm)
    norm.check("cpu")
    assert norm.batch(per_rank, nn.BatchNorm2d(2)).line.startswith(line)
    assert ("warning" in norm.batch(per_rank, nn.BatchNorm2d(2)).line) == ("warning" in line)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["norm=sync", "norm.group=3"], r"divides the 4 ranks, got 3: use \[1, 2, 4\]"),
        (["norm=sync", "norm.group=host"], "must be world, node or a number .* got host"),
        (["norm=torch_sync"], "norm=torch_sync needs a GPU for every rank.*: use norm=sync"),
    ],
)
def test_a_group_that_cannot_be_is_refused(overrides, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(Refusal, match=message):
        instantiate(run.compose(overrides).norm).check("cpu")


def grouped_means():
    as_torchrun()
    before, _, _, _ = validated("norm=sync", "norm.group=2")
    return before["stages.0.0.norm2.running_mean"]


def test_groups_share_statistics_within_and_not_between():
    a, b, c, d = run_ranks(4, grouped_means)
    assert torch.equal(a, b)
    assert torch.equal(c, d)
    assert not torch.equal(a, c)


def test_histograms_of_every_normalization_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, model, data = build(
        *("logger=tensorboard", f"logger.tensorboard.save_dir={tmp_path}", "trainer.max_steps=2"),
        "+callbacks.h={_target_: train.statistics.Histograms}",
    )
    trainer.fit(model, datamodule=data)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    layers = [name for name, layer in model.network.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    expected = {f"{name}/{what}" for name in layers for what in ("output", "running_mean", "running_var")}
    assert set(events.Tags()["histograms"]) == expected
    assert torch._dynamo.eval_frame._stance.stance == "default"
