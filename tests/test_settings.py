"""Invalid values are refused by name, with the valid range and the value received."""

import pytest

from train import run, settings
from train.distenv import Refusal


@pytest.mark.parametrize(
    "override, must_be",
    [
        ("model.width=0", "a whole number of at least 1, or null for the published width, got 0"),
        ("model.width=abc", "a whole number of at least 1, or null for the published width, got abc"),
        ("label_smoothing=2", "a number from 0 to below 1, got 2"),
        ("optimizer.lr_per_256=-1", "a number of at least 0, got -1"),
        ("data.val_fraction=2", "a share from 0 to below 1, got 2"),
        ("data.eval_batch_size=0", "a whole number of at least 1, got 0"),
        ("trainer.accumulate_grad_batches=0", "a whole number of at least 1, got 0"),
        ("trainer.precision=bf16-true", "32-true, bf16-mixed, 16-mixed or 64-true, .* got bf16-true"),
        ("test_checkpoint=frist", "last or best, got frist"),
        ("seed=-1", "a whole number of at least 0, got -1"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(override, must_be):
    config = run.compose([override])
    with pytest.raises(Refusal, match=f"^{override.split('=')[0]} must be {must_be}"):
        settings.check(config)


def test_milestones_are_rising_shares_of_the_run():
    settings.check(run.compose(["scheduler=steps", "scheduler.milestones=[0.3,0.9]"]))
    for milestones in ("[30,60]", "[0.9,0.1]", "0.5"):
        with pytest.raises(Refusal, match=r"scheduler.milestones must be a rising list of shares of the run"):
            settings.check(run.compose(["scheduler=steps", f"scheduler.milestones={milestones}"]))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(settings.torch.cuda, "is_available", lambda: False)
    with pytest.raises(Refusal, match=r"trainer.accelerator is gpu, but torch finds no GPU: use trainer=cpu"):
        settings.check_devices(run.compose(["trainer=gpu"]))
