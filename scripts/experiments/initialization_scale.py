"""Scale of the initial weights.

A network with batch normalization trains from initial weights of very different scales, one without only from a narrow
range: BN(W u) = BN((a W) u). (Ioffe & Szegedy 2015, section 3.3; the notebook on normalization, "Batch normalization
and initialization".)

A fully connected network (seven hidden layers of 50) and a plain convnet (six 3x3 convolutions, 16 to 64 channels)
train on 1,000 images of CIFAR-10 with Adam at 1e-3, 10 epochs, batches of 50, as in the notebook. All weights start
from a normal distribution with mean 0 and this standard deviation. The panels are those of the notebook: the best
validation accuracy of an epoch (1,000 other images), the best training accuracy of an epoch, and the mean training loss
of the last epoch.
"""

import math

import lab

SCALES = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
EPOCHS, BATCH, IMAGES = 10, 50, 1000
NETWORKS = {
    "MLP": ["model=mlp", f"model.widths={[50] * 7}"],
    "convnet": [*lab.CONVNET, "+model.depths=[2,2,2]"],
}
NORMS = {"local": "BN", "none": "no norm"}
PANELS = {
    "best_val": "best validation accuracy (%)",
    "best_train": "best training accuracy (%)",
    "final_loss": "training loss of the last epoch (nats)",
}
TRAINS = 20  # percent: a network trains if its best training accuracy is above this; chance is 10


def jobs(seeds, quick):
    """Return a job for each network, norm, scale and seed."""
    scales, epochs = (SCALES[2:4], 1) if quick else (SCALES, EPOCHS)
    return [
        {"network": network, "norm": norm, "scale": scale, "seed": seed, "epochs": epochs}
        for network in NETWORKS
        for norm in NORMS
        for scale in scales
        for seed in seeds
    ]


def run(job):
    """Return the row of a run."""
    trained = lab.train(
        [
            *NETWORKS[job["network"]],
            *lab.ADAM,
            *lab.rate(1e-3, BATCH),
            *lab.small_cifar10(IMAGES, num_val=IMAGES),
            f"{'' if job['network'] == 'MLP' else '+'}model.init_std={job['scale']}",
            f"norm={job['norm']}",
            f"seed={job['seed']}",
            f"trainer.max_epochs={job['epochs']}",
        ],
        test=False,
    )
    steps = IMAGES // BATCH
    epochs = range(0, len(trained.train_loss), steps)
    return [
        {
            **job,
            "best_val": 100 * max(epoch["val_accuracy"] for epoch in trained.epochs),
            "best_train": 100 * max(sum(trained.train_accuracy[i : i + steps]) / steps for i in epochs),
            "final_loss": sum(trained.train_loss[-steps:]) / steps,
        }
    ]


def draw(rows):
    """Draw the notebook's three panels, with both networks in each."""
    figure, axes = lab.panels(3)
    for one, (name, label) in zip(axes, PANELS.items(), strict=True):
        for network, style in zip(NETWORKS, ("-", "--"), strict=True):
            for norm, colour in zip(NORMS, lab.COLOURS, strict=False):
                chosen = [
                    row for row in lab.where(rows, network=network, norm=norm) if math.isfinite(row["final_loss"])
                ]
                lab.line(one, chosen, "scale", name, f"{network}, {NORMS[norm]}", colour, linestyle=style)
        lab.plain_log(one, "x", (1e-4, 1e-3, 1e-2, 1e-1, 1), base=10)
        one.set(xlabel="standard deviation of the initial weights", ylabel=label)
    lab.plain_log(axes[2], "y", (1, 10, 100, 1000, 10000, 100000), base=10)
    axes[0].legend(fontsize=7, handlelength=3.5)
    return figure


def sentence(rows):
    """Return what was seen."""
    parts, counts = [], {}
    for network in NETWORKS:
        for norm in NORMS:
            chosen = lab.where(rows, network=network, norm=norm)
            scales = lab.levels(chosen, "scale")
            trains = [s for s in scales if lab.column(chosen, "best_train", scale=s).mean > TRAINS]
            best = max(scales, key=lambda s: lab.column(chosen, "best_val", scale=s).mean)
            accuracy = lab.column(chosen, "best_val", scale=best)
            counts[network, norm] = len(trains)
            reach = f"from {trains[0]:g} to {trains[-1]:g}" if trains else "at none"
            parts.append(
                f"{network} with {NORMS[norm]}: {len(trains)} of {len(scales)} scales ({reach}), best validation "
                f"accuracy {accuracy.text(1, '%')} at {best:g}"
            )
    holds = all(counts[network, "local"] > counts[network, "none"] for network in NETWORKS)
    return (
        f"The claim {'holds' if holds else 'does not hold here for both networks'}. Scales at which the best training "
        f"accuracy exceeds {TRAINS} % (chance is 10 %): " + "; ".join(parts) + "."
    )


if __name__ == "__main__":
    lab.main()
