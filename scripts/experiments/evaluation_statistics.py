"""Evaluation statistics: a running average lags, population statistics do not.

At inference the statistics of a batch are replaced by population statistics, measured over many training batches
(Ioffe & Szegedy 2015, Algorithm 2). The running average that is kept instead lags behind the weights, and its error
depends on the momentum and on the number of steps (EvalNorm, arXiv 1904.06031; Wu & Johnson 2021, section 3).

A small pre-activation ResNet (7 norms, width 8) trains on digits in batches of 16 with a constant learning rate. Its
weights do not depend on the momentum, because training normalizes with the statistics of the batch. At each number of
steps it is tested with the running average of every momentum (torch's convention: the weight of the new batch; the
convention of the texts is 1 minus that), and with population statistics over 1, 4, 16 and 64 training batches
(`syncbn.recalibrate`).
"""

import copy

import lab
import torch
from lightning.pytorch import Callback
from torch import nn

import syncbn

MOMENTA = (0.01, 0.03, 0.1, 0.3, 1.0)
BATCHES = (1, 4, 16, 64)
STEPS = (5, 10, 20, 40, 80, 160, 320)
BATCH = 16


def jobs(seeds, quick):
    """Return a job for each momentum and seed."""
    steps, momenta = ((1, 2), MOMENTA[:2]) if quick else (STEPS, MOMENTA)
    return [{"momentum": momentum, "seed": seed, "steps": steps} for momentum in momenta for seed in seeds]


class Tests(Callback):
    """Tests the network at some steps, with copies of it."""

    def __init__(self, job):
        self.job = job
        self.rows = []

    def setup(self, trainer, pl_module, stage):
        """Set the momentum of every layer."""
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = self.job["momentum"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Test with the running average, and for one of the momenta with population statistics."""
        if trainer.global_step not in self.job["steps"]:
            return
        seed, step = self.job["seed"], trainer.global_step
        network, data = copy.deepcopy(pl_module.network), trainer.datamodule

        def add(statistics, amount):
            row = {"seed": seed, "step": step, "statistics": statistics, "amount": amount}
            self.rows.append({**row, "test_error": test_error(network, data)})

        add("running average", self.job["momentum"])
        if self.job["momentum"] == MOMENTA[0]:
            for count in BATCHES:
                syncbn.recalibrate(network, data.recalibration_batches(count))
                add("population", count)


@torch.no_grad()
def test_error(network, data):
    """Return the error in percent over the test set."""
    network.eval()
    images, labels = zip(*((data.normalize(images), labels) for images, labels in data.test_dataloader()), strict=True)
    wrong = sum((network(x).argmax(1) != y).sum().item() for x, y in zip(images, labels, strict=True))
    return 100 * wrong / sum(map(len, labels))


def run(job):
    """Return a row for each test."""
    tests = Tests(job)
    lab.train(
        [
            *lab.SMALL_RESNET,
            "norm=local",
            f"seed={job['seed']}",
            f"data.global_batch_size={BATCH}",
            "scheduler=constant",
            "optimizer.lr_per_256=0.8",
            "trainer.max_epochs=-1",
            f"+trainer.max_steps={max(job['steps'])}",
            "+trainer.limit_val_batches=0",
        ],
        [tests],
        test=False,
    )
    return tests.rows


def draw(rows):
    """Draw the test error over the steps: running averages, and population statistics."""
    figure, (running, population) = lab.panels(2)
    ours = {"statistics": "population", "amount": max(BATCHES)}
    for axes, statistics, label in (
        (running, "running average", "momentum {:g}"),
        (population, "population", "{} x 16 images"),
    ):
        chosen = lab.where(rows, statistics=statistics)
        for amount, colour in zip(lab.levels(chosen, "amount"), lab.COLOURS, strict=False):
            part = lab.where(chosen, amount=amount)
            lab.line(axes, part, "step", "test_error", label.format(amount), colour)
        if axes is running:
            lab.line(axes, lab.where(rows, **ours), "step", "test_error", "population statistics", "black", marker="")
        lab.plain_log(axes, "x", lab.levels(rows, "step"))
        axes.set(xlabel="training steps", ylabel="test error (%)", ylim=(0, 100), title=statistics)
        axes.legend(fontsize=7)
    return figure


def sentence(rows):
    """Return what was seen."""
    steps, most = lab.levels(rows, "step"), max(BATCHES)

    def error(statistics, amount, step):
        return lab.column(rows, "test_error", statistics=statistics, amount=amount, step=step).mean

    momenta = lab.levels(lab.where(rows, statistics="running average"), "amount")
    best = {step: min(momenta, key=lambda m: error("running average", m, step)) for step in steps}
    lags = {
        step: lab.difference(
            rows,
            "test_error",
            {"statistics": "running average", "amount": 0.1 if 0.1 in momenta else momenta[0], "step": step},
            {"statistics": "population", "amount": most, "step": step},
        )
        for step in steps
    }
    worse = [step for step, lag in lags.items() if lag.mean > 0 and lag.excludes_zero]
    early = max(steps, key=lambda step: lags[step].mean)
    one = lab.difference(
        rows,
        "test_error",
        {"statistics": "population", "amount": min(BATCHES), "step": steps[-1]},
        {"statistics": "population", "amount": most, "step": steps[-1]},
    )
    return (
        f"The claim {'holds' if worse else 'does not hold here'}: with torch's default momentum of 0.1 the running "
        f"average has a larger test error than population statistics over {most} batches at {len(worse)} of "
        f"{len(steps)} points in time, most after {early} steps ({lags[early].text()} points more); after {steps[-1]} "
        f"steps the difference is {lags[steps[-1]].text()} points. The best momentum is {best[steps[0]]:g} after "
        f"{steps[0]} steps and {best[steps[-1]]:g} after {steps[-1]}. One batch of 16 images instead of {most} costs "
        f"{one.text()} points after {steps[-1]} steps."
    )


if __name__ == "__main__":
    lab.main()
