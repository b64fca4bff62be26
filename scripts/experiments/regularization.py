"""Regularization: batch normalization and dropout.

Batch normalization regularizes, because the statistics of a batch add noise to every image, and makes dropout less
necessary. (Ioffe & Szegedy 2015, sections 3.4 and 4.2.1; inverted dropout as in the notebook.)

A fully connected network (three hidden layers of 200) and a plain convnet (three 3x3 convolutions, 16 to 64 channels)
train on 2,000 images of CIFAR-10 with SGD with momentum 0.9, at the best rate of the learning-rate experiment, for 20
epochs in batches of 50, with batch normalization, with dropout (0.25 after every hidden layer, or every stage of the
convnet), with both and with neither. The accuracies are those of the final network in evaluation mode, over the 2,000
training images and over 5,000 test images. The gap is their difference. As a network that learns less also has a
smaller gap, the test accuracy is what counts.
"""

import lab

IMAGES, TEST_IMAGES, BATCH = 2000, 5000, 50
DROPOUT = 0.25
RATES = {  # the best of the learning-rate experiment
    ("MLP", "local"): 2**-6,
    ("MLP", "none"): 2**-8,
    ("convnet", "local"): 2**-3,
    ("convnet", "none"): 2**-4,
}
NETWORKS = {"MLP": ["model=mlp", "model.widths=[200,200,200]"], "convnet": lab.CONVNET}
VARIANTS = {"none": "neither", "BN": "BN", "dropout": "dropout", "both": "both"}


def jobs(seeds, quick):
    """Return a job for each network, variant and seed."""
    steps = 3 if quick else 20 * IMAGES // BATCH
    return [
        {"network": network, "variant": variant, "seed": seed, "steps": steps}
        for network in NETWORKS
        for variant in VARIANTS
        for seed in seeds
    ]


def run(job):
    """Return the row of a run."""
    norm = "local" if job["variant"] in ("BN", "both") else "none"
    dropout = DROPOUT if job["variant"] in ("dropout", "both") else 0.0
    trained = lab.train(
        [
            *NETWORKS[job["network"]],
            *lab.SGD,
            *lab.rate(RATES[job["network"], norm], BATCH),
            *lab.small_cifar10(IMAGES, TEST_IMAGES),
            *lab.TRAINS_ONLY,
            f"{'' if job['network'] == 'MLP' else '+'}model.dropout={dropout}",
            f"norm={norm}",
            f"seed={job['seed']}",
            f"+trainer.max_steps={job['steps']}",
        ],
        test=False,
    )
    train, test = lab.accuracy(trained, "train"), lab.accuracy(trained, "test")
    return [{**job, "train_accuracy": train, "test_accuracy": test, "gap": train - test}]


def draw(rows):
    """Draw training and test accuracy of each variant."""
    figure, axes = lab.panels(len(NETWORKS))
    for one, network in zip(axes, NETWORKS, strict=True):
        for place, variant in enumerate(VARIANTS):
            for offset, (part, colour) in enumerate((("train", lab.COLOURS[0]), ("test", lab.COLOURS[1]))):
                found = lab.column(rows, f"{part}_accuracy", network=network, variant=variant)
                label = f"{part}ing" * (part == "train") or part
                one.bar(
                    place + 0.4 * offset - 0.2,
                    found.mean,
                    0.38,
                    yerr=found.half,
                    color=colour,
                    capsize=3,
                    label=label if place == 0 else None,
                )
        one.set_xticks(range(len(VARIANTS)), VARIANTS.values())
        one.set(ylabel="accuracy (%)", ylim=(0, 115), title=network)
        one.legend(fontsize=7, ncols=2)
    return figure


def sentence(rows):
    """Return what was seen."""
    parts, gains, gaps = [], [], []
    for network in NETWORKS:
        plain, bn = ({"network": network, "variant": variant} for variant in ("none", "BN"))
        gains.append(lab.difference(rows, "test_accuracy", bn, plain))
        gaps.append(lab.difference(rows, "gap", bn, plain))
        each = ", ".join(
            f"{label} {lab.column(rows, 'test_accuracy', network=network, variant=variant).text(1, '%')} "
            f"(gap {lab.column(rows, 'gap', network=network, variant=variant).text()})"
            for variant, label in VARIANTS.items()
        )
        dropped = {
            before: lab.difference(
                rows,
                "test_accuracy",
                {"network": network, "variant": after},
                {"network": network, "variant": before},
            )
            for before, after in (("none", "dropout"), ("BN", "both"))
        }
        parts.append(
            f"{network}, test accuracy: {each}; BN changes it by {gains[-1].text()} and the gap by {gaps[-1].text()} "
            f"points, dropout changes it by {dropped['none'].text()} without BN and {dropped['BN'].text()} with BN"
        )
    generalizes = all(gain.mean > 0 and gain.excludes_zero for gain in gains)
    narrows = all(gap.mean < 0 and gap.excludes_zero for gap in gaps)
    verdict = (
        "holds"
        if generalizes and narrows
        else "holds for the test accuracy, but the gap does not shrink"
        if generalizes
        else "does not hold here"
    )
    return f"The claim {verdict}. " + ". ".join(parts) + "."


if __name__ == "__main__":
    lab.main()
