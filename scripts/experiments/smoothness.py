"""Smoothness of the loss.

Batch normalization makes the loss smoother: along the gradient the loss varies less, the gradient changes less, and the
effective smoothness is better. (Santurkar et al. 2018, figure 4.)

A plain convnet (six 3x3 convolutions, 16 to 64 channels) with and without batch normalization trains on 5,000 images of
CIFAR-10 with SGD without momentum, at a constant rate of 0.05 in batches of 100, for 4 epochs, from He initialization.
At every fifth step the weights move along the gradient of the batch, by 8 step sizes from 1/8 to 4 times the learning
rate, and the loss and gradient of the same batch are computed there. The panels are those of the paper: the range of
the loss, the range of the distance between the gradient and the gradient at the moved weights, and the largest ratio of
that distance to the distance moved (effective beta-smoothness). Compared are their means over the run; the lower the
smoother.
"""

import lab
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

IMAGES, BATCH = 5000, 100
RATE = 0.05
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 1.5, 2.0, 3.0, 4.0)
NORMS = {"local": "BN", "none": "no norm"}
PANELS = {
    "loss_range": "range of the loss (nats)",
    "gradient_range": "range of the gradient's change (L2)",
    "beta": "effective beta-smoothness",
}


class Landscape(Callback):
    """Measures loss and gradient of a batch along its gradient."""

    def __init__(self, every):
        self.every = every
        self.rows = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Keep the batch."""
        self.batch = batch

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        """Move the weights, measure, and put everything back."""
        if trainer.global_step % self.every:
            return
        network, (images, labels) = pl_module.network, self.batch
        parameters = list(network.parameters())
        buffers = [buffer.clone() for buffer in network.buffers()]
        start = [parameter.detach().clone() for parameter in parameters]
        gradient = [parameter.grad.clone() for parameter in parameters]
        length = norm(gradient)
        losses, changes, betas = [], [], []
        for factor in FACTORS:
            step = factor * RATE
            with torch.no_grad():
                for parameter, origin, slope in zip(parameters, start, gradient, strict=True):
                    parameter.copy_(origin - step * slope)
            loss = F.cross_entropy(network(images), labels)
            found = torch.autograd.grad(loss, parameters)
            losses.append(loss.item())
            changes.append(norm([a - b for a, b in zip(found, gradient, strict=True)]))
            betas.append(changes[-1] / (step * length))
        with torch.no_grad():
            for values, targets in ((start, parameters), (buffers, list(network.buffers()))):
                for target, value in zip(targets, values, strict=True):
                    target.copy_(value)
        self.rows.append(
            {
                "step": trainer.global_step + 1,
                "loss_low": min(losses),
                "loss_high": max(losses),
                "loss_range": max(losses) - min(losses),
                "gradient_low": min(changes),
                "gradient_high": max(changes),
                "gradient_range": max(changes) - min(changes),
                "beta": max(betas),
            }
        )


def norm(tensors):
    """Return the L2 norm of all tensors together."""
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def jobs(seeds, quick):
    """Return a job for each norm and seed."""
    steps, every = (3, 2) if quick else (4 * IMAGES // BATCH, 5)
    return [{"norm": norm, "seed": seed, "steps": steps, "every": every} for norm in NORMS for seed in seeds]


def run(job):
    """Return a row for each step at which the loss was examined."""
    landscape = Landscape(job["every"])
    lab.train(
        [
            *lab.CONVNET,
            "+model.depths=[2,2,2]",
            *lab.SGD,
            "optimizer.factory.momentum=0",
            *lab.rate(RATE, BATCH),
            *lab.small_cifar10(IMAGES),
            *lab.TRAINS_ONLY,
            f"norm={job['norm']}",
            f"seed={job['seed']}",
            f"+trainer.max_steps={job['steps']}",
        ],
        [landscape],
        test=False,
    )
    return [{**job, **row} for row in landscape.rows]


def draw(rows):
    """Draw the paper's three panels."""
    figure, (loss, gradient, beta) = lab.panels(3)
    steps = lab.levels(rows, "step")
    for norm_name, colour in zip(NORMS, lab.COLOURS, strict=False):
        chosen = lab.where(rows, norm=norm_name)
        for one, name in ((loss, "loss"), (gradient, "gradient")):
            low, high = (
                [lab.column(chosen, f"{name}_{end}", step=step).mean for step in steps] for end in ("low", "high")
            )
            one.fill_between(steps, low, high, color=colour, alpha=0.4, linewidth=0, label=NORMS[norm_name])
        lab.line(beta, chosen, "step", "beta", NORMS[norm_name], colour, marker="")
    loss.set(xlabel="step", ylabel="loss along the gradient (nats)\nmean lowest to mean highest")
    gradient.set(xlabel="step", ylabel="change of the gradient (L2)\nmean lowest to mean highest")
    beta.set(xlabel="step", ylabel="effective beta-smoothness")
    for one in (loss, gradient, beta):
        one.legend(fontsize=7)
    return figure


def means(rows):
    """Return a row for each norm and seed: the means over the run."""
    return [
        {
            "norm": norm_name,
            "seed": seed,
            **{name: sum(r[name] for r in part) / len(part) for name in PANELS},
        }
        for norm_name in NORMS
        for seed in lab.levels(rows, "seed")
        for part in [lab.where(rows, norm=norm_name, seed=seed)]
    ]


def sentence(rows):
    """Return what was seen."""
    found, parts, smoother = means(rows), [], []
    for name, label in PANELS.items():
        bn, plain = (lab.column(found, name, norm=norm_name) for norm_name in NORMS)
        gap = lab.difference(found, name, {"norm": "local"}, {"norm": "none"})
        smoother.append(gap.mean < 0 and gap.excludes_zero)
        parts.append(f"{label}, {bn.text(2)} with BN and {plain.text(2)} without (difference {gap.text(2)})")
    verdict = "holds" if all(smoother) else f"holds for {sum(smoother)} of 3" if any(smoother) else "does not hold here"
    return f"The claim {verdict}. Means over the run: " + "; ".join(parts) + "."


if __name__ == "__main__":
    lab.main()
