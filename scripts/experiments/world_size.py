"""Training does not depend on the number of ranks.

With synchronized batch normalization, N ranks train like one: on the same global batches, the loss of every step is the
same for 1, 2, 4 and 8 ranks, up to rounding. With local batch normalization it is not. (Design card of this project;
Peng et al. 2018, MegDet, section 3.2.)

Every run takes the same 40 steps of 64 digits each, with the same initial weights and augmentation; only the number of
ranks that share the 64 images differs. Compared are the training losses of a small pre-activation ResNet (3 stages of
one unit, width 8), in float64 and in float32. The difference of a run is the largest one over its 40 steps, to the run
on one rank with the same seed. In float32 the differences stay near 1e-7 until, in some of the runs, they jump within
one step, which fits values within rounding of 0 that fall on the other side of a ReLU: sums that are added in another
order do that in any training.
"""

import lab

STEPS = 40
RANKS = (1, 2, 4, 8)
NORMS = {"sync": "SyncBN", "local": "local BN"}
PRECISIONS = {"64-true": "float64", "32-true": "float32"}


def jobs(seeds, quick):
    """Return a job for each norm, precision, number of ranks and seed."""
    return [
        {"ranks": ranks, "norm": norm, "precision": precision, "seed": seed, "steps": 3 if quick else STEPS}
        for ranks in (RANKS[:2] if quick else RANKS)
        for norm in NORMS
        for precision in PRECISIONS
        for seed in seeds
    ]


def run(job):
    """Return a row for each step."""
    trained = lab.train(
        [
            *lab.SMALL_RESNET,
            f"norm={job['norm']}",
            f"seed={job['seed']}",
            f"trainer.precision={job['precision']}",
            "scheduler=constant",
            "optimizer.lr_per_256=0.4",
            f"+trainer.max_steps={job['steps']}",
            "+trainer.limit_val_batches=0",
        ],
        test=False,
    )
    return [{**job, "step": step, "loss": repr(loss)} for step, loss in enumerate(trained.train_loss, 1)]


def differences(rows):
    """Return a row for each run on several ranks: the largest difference of its loss to that on one rank."""
    runs = {}
    for row in rows:
        runs.setdefault((row["norm"], row["precision"], row["seed"], row["ranks"]), []).append(row["loss"])
    return [
        {
            "norm": norm,
            "precision": precision,
            "seed": seed,
            "ranks": ranks,
            "difference": max(abs(a - b) for a, b in zip(losses, runs[norm, precision, seed, 1], strict=True)),
        }
        for (norm, precision, seed, ranks), losses in runs.items()
        if ranks > 1
    ]


def draw(rows):
    """Draw the loss curves of seed 0, and the largest differences."""
    figure, (curves, largest) = lab.panels(2)
    found = differences(rows)
    for norm, colour in zip(NORMS, lab.COLOURS, strict=False):
        for ranks, style in zip(lab.levels(rows, "ranks"), ("-", "--", "-.", ":"), strict=False):
            chosen = lab.where(rows, norm=norm, ranks=ranks, precision="32-true", seed=0)
            label = f"{NORMS[norm]}, {ranks} rank{'s' * (ranks > 1)}"
            curves.plot([r["step"] for r in chosen], [r["loss"] for r in chosen], style, color=colour, label=label)
        for precision, marker in zip(PRECISIONS, ("o", "s"), strict=True):
            chosen = lab.where(found, norm=norm, precision=precision)
            label = f"{NORMS[norm]}, {PRECISIONS[precision]}"
            places = lab.levels(chosen, "ranks")
            means = [lab.column(chosen, "difference", ranks=place).mean for place in places]
            largest.plot(
                places, means, color=colour, marker=marker, label=label, linestyle="-" if marker == "o" else ":"
            )
            largest.scatter([r["ranks"] for r in chosen], [r["difference"] for r in chosen], s=8, color=colour)
    curves.set(xlabel="step", ylabel="training loss of the step (nats)", title="seed 0, float32")
    lab.plain_log(largest, "x", lab.levels(found, "ranks"))
    largest.set(yscale="log", xlabel="ranks", ylabel="largest difference of the loss to one rank (nats)")
    for axes in (curves, largest):
        axes.legend(fontsize=7)
    return figure


def sentence(rows):
    """Return what was seen."""
    worst = {
        key: max(r["difference"] for r in differences(rows) if (r["norm"], r["precision"]) == key)
        for key in ((norm, precision) for norm in NORMS for precision in PRECISIONS)
    }
    steps, most = max(lab.levels(rows, "step")), max(lab.levels(rows, "ranks"))
    least = min(r["difference"] for r in differences(rows) if (r["norm"], r["precision"]) == ("local", "64-true"))
    agrees = worst["sync", "64-true"] < 1e-9 < least
    return (
        f"The claim {'holds' if agrees else 'does not hold'}: over {steps} steps on up to {most} ranks, the losses "
        f"with SyncBN differ from those on one rank by at most {worst['sync', '64-true']:.0e} in float64 and "
        f"{worst['sync', '32-true']:.0e} in float32; with local BN by {least:.2f} to {worst['local', '64-true']:.2f}."
    )


if __name__ == "__main__":
    lab.main()
