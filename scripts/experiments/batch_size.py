"""Normalization against the batch size.

Batch normalization needs a reasonable batch size; layer and group normalization do not depend on it. (The notebook on
normalization, "Batch normalization and batch size" and "Layer Normalization and batch size"; Wu & He 2018.)

A fully connected network (five hidden layers of 96) and a plain convnet (three 3x3 convolutions, 16 to 64 channels)
train on 1,000 images of CIFAR-10 for 4 epochs with Adam at 10^-3.5, in batches of 5, 10 and 50, with batch, layer,
group (8 groups) and no normalization. The training accuracy is that of an epoch while it trains, in which batch
normalization uses the statistics of the batch; the validation accuracy is that over 1,000 other images after the epoch.
"""

import lab

BATCHES = (5, 10, 50)
EPOCHS, IMAGES = 4, 1000
NETWORKS = {"MLP": ["model=mlp", f"model.widths={[96] * 5}"], "convnet": lab.CONVNET}
NORMS = {"local": "BN", "layer": "layer norm", "group": "GroupNorm", "none": "no norm"}


def jobs(seeds, quick):
    """Return a job for each network, norm, batch size and seed."""
    batches, epochs = (BATCHES[-1:], 1) if quick else (BATCHES, EPOCHS)
    return [
        {"network": network, "norm": norm, "batch": batch, "seed": seed, "epochs": epochs}
        for network in NETWORKS
        for norm in NORMS
        for batch in batches
        for seed in seeds
    ]


def run(job):
    """Return a row for each epoch."""
    trained = lab.train(
        [
            *NETWORKS[job["network"]],
            *lab.ADAM,
            *lab.rate(10**-3.5, job["batch"]),
            *lab.small_cifar10(IMAGES, num_val=IMAGES),
            f"norm={job['norm']}",
            f"seed={job['seed']}",
            f"trainer.max_epochs={job['epochs']}",
        ],
        test=False,
    )
    steps = IMAGES // job["batch"]
    return [
        {
            **job,
            "epoch": number + 1,
            "train_accuracy": 100 * sum(trained.train_accuracy[number * steps : (number + 1) * steps]) / steps,
            "val_accuracy": 100 * epoch["val_accuracy"],
        }
        for number, epoch in enumerate(trained.epochs)
    ]


def last(rows):
    """Return the rows of the last epoch."""
    return lab.where(rows, epoch=max(lab.levels(rows, "epoch")))


def draw(rows):
    """Draw the accuracies of the last epoch over the batch size."""
    figure, axes = lab.panels(2 * len(NETWORKS), width=3.4)
    for index, network in enumerate(NETWORKS):
        for one, (name, label) in zip(
            axes[2 * index :],
            (("train_accuracy", "training accuracy (%)"), ("val_accuracy", "validation accuracy (%)")),
            strict=False,
        ):
            for norm, colour in zip(NORMS, lab.COLOURS, strict=False):
                chosen = lab.where(last(rows), network=network, norm=norm)
                lab.line(one, chosen, "batch", name, NORMS[norm], colour)
            lab.plain_log(one, "x", lab.levels(rows, "batch"))
            one.set(xlabel="batch size (images)", ylabel=label, title=network)
    axes[0].legend(fontsize=7)
    return figure


def sentence(rows):
    """Return what was seen."""
    few, many = min(lab.levels(rows, "batch")), max(lab.levels(rows, "batch"))
    final, parts, signs = last(rows), [], []
    for network in NETWORKS:
        gains = {}
        for norm in NORMS:
            sizes = [{"network": network, "norm": norm, "batch": batch} for batch in (many, few)]
            gains[norm] = lab.difference(final, "val_accuracy", *sizes)
        signs.append(
            gains["local"].mean > 0
            and gains["local"].excludes_zero
            and all(gains["local"].mean > gains[norm].mean for norm in ("layer", "group"))
        )
        each = ", ".join(
            f"{label} {lab.column(final, 'val_accuracy', network=network, norm=norm, batch=few).text(1, '%')} and "
            f"{lab.column(final, 'val_accuracy', network=network, norm=norm, batch=many).text(1, '%')} "
            f"(difference {gains[norm].text()})"
            for norm, label in NORMS.items()
        )
        parts.append(f"{network}: {each}")
    verdict = "holds" if all(signs) else "does not hold here for both networks"
    return (
        f"The claim that only BN gains from a larger batch {verdict}. Validation accuracy after the last epoch with "
        f"batches of {few} and of {many}: " + "; ".join(parts) + ". The epochs are the same in number, so that small "
        "batches make more steps, which helps all of them."
    )


if __name__ == "__main__":
    lab.main()
