"""Images per rank: what the size of the normalization batch does.

The error of a network with batch normalization grows when few images are normalized together, and that of group
normalization does not. Synchronizing over ranks enlarges the normalization batch without more images per rank. (Wu & He
2018, figure 1: ResNet-50 on ImageNet, 8 GPUs; Wu & Johnson 2021, section 3, normalization batch size.)

Four ranks train a plain convnet (three 3x3 convolutions with norm and ReLU, 16 to 64 channels) on digits. Every
optimizer step has the same 128 images: with k images per rank and batch they come in 32 / k accumulated batches, so
that the runs differ in the images that are normalized together and in nothing else: k with local BN, 2 k with SyncBN
over pairs of ranks, 4 k with SyncBN over all. Group and layer normalization do not depend on k and are trained once for
each seed. "Local BN" is tested with its running average, everything else that has batch statistics with population
statistics over 512 training images (`syncbn.recalibrate`), because in so short a training the running average of few
large batches still lags. The training error is that of the last third of the steps, with the statistics of the batch.
"""

import lab

from train.statistics import recalibrate

IMAGES = (1, 2, 4, 8, 16, 32)  # per rank and batch
RANKS, STEP_IMAGES = 4, 128
STEPS = 14
RECALIBRATION_IMAGES = 512
SHARING = {"local": 1, "recalibrated": 1, "pairs": 2, "world": RANKS}  # ranks that normalize together
# error in percent, by images per GPU: Wu & He 2018, table 2 (ResNet-50, ImageNet, 8 GPUs)
PUBLISHED = {
    "BN": {32: 23.6, 16: 23.7, 8: 24.8, 4: 27.3, 2: 34.7},
    "GN": {32: 24.1, 16: 24.2, 8: 24.0, 4: 24.2, 2: 24.1},
}
LABELS = {
    "local": "local BN",
    "recalibrated": "local BN, recalibrated",
    "pairs": "SyncBN, pairs of ranks",
    "world": "SyncBN, all 4 ranks",
    "group": "GroupNorm",
    "layer": "layer norm",
}
OVERRIDES = {"pairs": ["norm=sync", "norm.group=2"], "world": ["norm=sync"]}


def jobs(seeds, quick):
    """Return a job for each norm, number of images and seed."""
    sizes = (16, 32) if quick else IMAGES
    return [
        {"norm": norm, "images": images, "seed": seed, "steps": 2 if quick else STEPS}
        for norm in ("world", "pairs", "local", "group", "layer")
        for images in (sizes if norm in ("local", "pairs", "world") else [32])
        for seed in seeds
    ]


def run(job):
    """Return the row of a run; for local BN one with its running average and one recalibrated."""
    trained = lab.train(
        [
            *lab.CONVNET,
            "+model.first_stride=1",
            *OVERRIDES.get(job["norm"], [f"norm={job['norm']}"]),
            f"seed={job['seed']}",
            f"data.batch_size_per_rank={job['images']}",
            f"trainer.accumulate_grad_batches={STEP_IMAGES // RANKS // job['images']}",
            "optimizer.lr_per_256=0.8",
            "data.train_transforms=[]",
            "trainer.max_epochs=-1",
            f"+trainer.max_steps={job['steps']}",
            "+trainer.limit_val_batches=0",
        ]
    )
    accuracy = trained.train_accuracy[-job["steps"] // 3 :]
    running = error(trained)
    row = {**job, "train_error": 100 - 100 * sum(accuracy) / len(accuracy), "running_error": running}
    if job["norm"] in ("group", "layer"):
        return [{**row, "test_error": running}]
    recalibrate(trained.trainer, trained.model, RECALIBRATION_IMAGES // RANKS // job["images"])
    trained.test.update(trained.trainer.test(trained.model, datamodule=trained.data, verbose=False)[0])
    population = {**row, "test_error": error(trained)}
    if job["norm"] == "local":
        return [{**row, "test_error": running}, {**population, "norm": "recalibrated"}]
    return [population]


def error(trained):
    """Return the test error in percent."""
    return 100 - 100 * trained.test["test_accuracy"]


def draw(rows):
    """Draw the error against the normalization batch, against the images per rank, and the published errors."""
    figure, (batch, images, published) = lab.panels(3)
    for (norm, label), colour in zip(LABELS.items(), lab.COLOURS, strict=True):
        chosen = lab.where(rows, norm=norm)
        if norm in SHARING:
            over = [{**row, "batch": row["images"] * SHARING[norm]} for row in chosen]
            lab.line(batch, over, "batch", "test_error", label, colour)
            lab.line(images, chosen, "images", "test_error", label, colour)
        else:
            found = lab.column(chosen, "test_error")
            for axes in (batch, images):
                axes.axhline(found.mean, color=colour, label=label)
                axes.axhspan(found.mean - found.half, found.mean + found.half, color=colour, alpha=0.15, linewidth=0)
    for name, colour in (("BN", lab.COLOURS[0]), ("GN", lab.COLOURS[4])):
        published.plot(*zip(*PUBLISHED[name].items(), strict=True), color=colour, marker="o", ms=4, label=name)
    lab.plain_log(batch, "x", sorted({row["images"] * SHARING.get(row["norm"], 1) for row in rows}))
    lab.plain_log(images, "x", sorted(set(lab.levels(rows, "images"))))
    lab.plain_log(published, "x", sorted(PUBLISHED["BN"]))
    for axes in (batch, images):
        lab.plain_log(axes, "y", (5, 10, 20, 50, 100), base=10)
    batch.set(xlabel="normalization batch size (images)", ylabel="test error (%)", title="digits")
    images.set(xlabel="images per rank (4 ranks)", ylabel="test error (%)", title="digits")
    published.set(
        xlabel="images per GPU",
        ylabel="validation error (%)",
        title="ImageNet, ResNet-50 (Wu & He 2018)",
        ylim=(20, None),
    )
    images.legend(fontsize=7)
    published.legend(fontsize=7)
    return figure


def sentence(rows):
    """Return what was seen."""
    few, many = min(lab.levels(rows, "images")), max(lab.levels(rows, "images"))

    def errors(norm, images):
        return lab.column(rows, "test_error", norm=norm, images=images)

    local = {"norm": "local", "images": few}
    gain = lab.difference(rows, "test_error", local, {"norm": "world", "images": few})
    growth = lab.difference(rows, "test_error", local, {"norm": "local", "images": many})
    flat = lab.difference(rows, "test_error", {"norm": "world", "images": few}, {"norm": "world", "images": many})
    measured = lab.difference(rows, "test_error", local, {"norm": "recalibrated", "images": few})
    group = lab.difference(rows, "test_error", {"norm": "group", "images": many}, {"norm": "world", "images": few})
    between = "".join(
        f"with {size} it is {errors('local', size).text(1, '%')} and {errors('world', size).text(1, '%')}; "
        for size in lab.levels(rows, "images")
        if few < size <= 4
    )
    holds = gain.mean > 0 and gain.excludes_zero and growth.mean > 0 and growth.excludes_zero
    return (
        f"The claim {'holds' if holds else 'does not hold here'}. With {few} image{'s' * (few > 1)} per rank the test "
        f"error is {errors('local', few).text(1, '%')} with local BN and {errors('world', few).text(1, '%')} with "
        f"SyncBN over 4 ranks, {gain.text()} points less; {between}with {many} it is "
        f"{errors('local', many).text(1, '%')} and {errors('world', many).text(1, '%')}. From {many} to {few} images "
        f"per rank the error grows by {growth.text()} points with local BN and by {flat.text()} with SyncBN. "
        f"Recalibration lowers the error of local BN by {measured.text()} points. GroupNorm has "
        f"{lab.column(rows, 'test_error', norm='group').text(1, '%')}, {group.text()} points more than SyncBN."
    )


if __name__ == "__main__":
    lab.main(ranks=RANKS)
