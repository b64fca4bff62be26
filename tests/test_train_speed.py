"""Precision, memory format, one compiled graph, augmentation in batches, and where the time goes."""

import tempfile
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from ranks import run_ranks
from test_no_host_sync import NoHostSync
from test_train_on_ranks import SMALL, StepLosses, as_torchrun, build, step_losses, step_losses_on_a_rank

from train import run
from train.augment import CropAndFlip
from train.callbacks import Throughput
from train.loader import ImageLoader
from train.mixing import Mixing
from train.timing import TimeShares, _collective_seconds

FIVE = ("trainer.max_steps=5",)


def test_channels_last_changes_the_layout_and_not_the_losses():
    double = ("trainer.precision=64-true", *FIVE)
    assert step_losses(*double, "channels_last=true") == pytest.approx(step_losses(*double), rel=1e-9)
    _, model, _ = build("channels_last=true")
    assert model.network.stages[0][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_trains_close_to_float32_and_is_evaluated_in_float32():
    bfloat16 = step_losses(*FIVE, "trainer.precision=bf16-mixed")
    assert bfloat16 == pytest.approx(step_losses(*FIVE), rel=0.05)
    assert bfloat16 != step_losses(*FIVE)
    trainer, model, data = build("trainer.precision=bf16-mixed", "+trainer.limit_test_batches=1")
    dtypes = set()
    model.network.head.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    trainer.test(model, datamodule=data, verbose=False)
    assert dtypes == {torch.float32}


def compiled_losses():
    as_torchrun()
    torch.compile = partial(torch.compile, backend="aot_eager")  # inductor takes minutes; test_compile.py compares it
    losses = []
    for flag in ("false", "true"):
        torch.manual_seed(0)
        narrow, *others = SMALL
        assert narrow == "model.width=4"
        trainer, model, data = run.build(
            run.compose(
                [*others, "model=mlp", f"compile={flag}", "trainer.max_steps=2", f"run_dir={tempfile.mkdtemp()}"]
            )
        )
        record = StepLosses()
        trainer.callbacks.append(record)
        trainer.fit(model, datamodule=data)
        losses.append(record.losses)
    return losses


def test_a_network_compiled_to_one_graph_with_its_synchronized_norms_has_the_same_losses():
    for plain, compiled in run_ranks(2, compiled_losses, timeout_s=300, collective_timeout_s=200):
        assert compiled == pytest.approx(plain, rel=1e-4)


def test_batches_are_shifted_and_mirrored_image_by_image_as_the_seed_says(monkeypatch):
    images = torch.randn(6, 3, 8, 8)
    transform = CropAndFlip(padding=2)
    whole = transform(images, seed=5, global_batch_size=6)
    padded = torch.nn.functional.pad(images, [2] * 4, mode="reflect")
    for before, after in zip(padded, whole, strict=True):
        crops = [before[:, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
        assert any(torch.equal(after, crop) or torch.equal(after, crop.flip(2)) for crop in crops)
    assert not torch.equal(whole, transform(images, seed=6, global_batch_size=6))
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        part = transform(images[rank::4], seed=5, global_batch_size=6)
        assert torch.equal(part, whole[rank::4])
    assert transform(images[:0], seed=5, global_batch_size=6).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixed_labels_are_probabilities_and_depend_on_the_key_alone(alphas):
    mixing = Mixing(4, *alphas)
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    mixed, targets = mixing(images, labels, 1, 2)
    assert (mixed.shape, targets.shape) == (images.shape, (6, 4))
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    torch.manual_seed(9)
    again, _ = mixing(images, labels, 1, 2)
    other, _ = mixing(images, labels, 1, 3)
    assert torch.equal(mixed, again)
    assert not torch.equal(mixed, other)
    empty, none = mixing(images[:0], labels[:0], 1, 2)
    assert (len(empty), none.shape) == (0, (0, 4))


def test_options_of_ddp_change_nothing_but_the_speed():
    (expected, static, copies), _ = run_ranks(
        2,
        step_losses_on_a_rank,
        [
            FIVE,
            (*FIVE, "trainer.strategy.static_graph=true"),
            (*FIVE, "+trainer.strategy.gradient_as_bucket_view=false"),
        ],
    )
    assert expected == static == copies
    assert len(expected) == 5


class WithoutWaiting(Callback):
    """Lets every step but the first fail if the host reads a value of a tensor, for which it would wait for a GPU.

    Args:
        reads: whether to read one.
    """

    def __init__(self, reads):
        self.reads = reads

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:  # the loggers have learned which metrics there are
            self.ddp = trainer.strategy.model
            self.check = NoHostSync()

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if self.reads and trainer.global_step > 1:
            float(pl_module.step_sums[0])

    def on_train_end(self, trainer, pl_module):
        self.check.close()


def steps_without_waiting(reads):
    as_torchrun()
    trainer, model, data = build("norm=local", "trainer.max_steps=4", "trainer.log_every_n_steps=100")
    waits = WithoutWaiting(reads)
    trainer.callbacks = [waits, *trainer.callbacks, Throughput()]
    batches = ImageLoader.__iter__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageLoader, "__iter__", lambda loader: iter(list(batches(loader))))  # reads, on the host
        patch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)  # with which Lightning tidies up after an error
        try:
            trainer.fit(model, datamodule=data)
        except AssertionError as error:
            waits.check.close()
            return str(error)
    return trainer.global_step, waits.ddp.gradient_as_bucket_view


def test_a_step_of_the_trainer_reads_nothing_back():
    assert run_ranks(2, steps_without_waiting, False) == [(4, True)] * 2
    assert all("__float__ reads a tensor" in error for error in run_ranks(2, steps_without_waiting, True))


class Event:
    def __init__(self, name, start, end):
        self.name = name
        self.time_range = type("Range", (), {"start": start, "end": end})


def test_collectives_that_overlap_are_counted_once():
    events = [
        *(Event("gloo:all_reduce", 0, 3e6), Event("nccl:all_reduce", 2e6, 4e6)),
        *(Event("aten::conv2d", 0, 9e6), Event("gloo:broadcast", 6e6, 7e6)),
    ]
    assert _collective_seconds(events) == pytest.approx(5)


def shares():
    as_torchrun()
    trainer, model, data = build("trainer.max_steps=5")
    timing = TimeShares(skip_steps=2, num_steps=2)
    trainer.callbacks.append(timing)
    trainer.fit(model, datamodule=data)
    return timing.shares


def test_the_shares_of_a_step_add_up_on_rank_0():
    first, second = run_ranks(2, shares)
    assert sum(first.values()) == pytest.approx(1)
    assert first["collective_share"] > 0
    assert second == {}
