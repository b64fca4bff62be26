"""The highest stable learning rate.

Batch normalization lets a network train at larger learning rates. (Ioffe & Szegedy 2015, sections 3.3 and 4.2.1;
Santurkar et al. 2018.)

A fully connected network (five hidden layers of 100) and a plain convnet (three 3x3 convolutions, 16 to 64 channels)
train on 2,000 images of CIFAR-10 with SGD with momentum 0.9, a constant learning rate, batches of 50, for 5 epochs,
from He initialization. A rate is stable for a seed if the mean training loss of the last epoch is below that of a
constant guess, ln 10 = 2.30 nats; the highest stable rate is the highest one of the grid (factors of 2) up to which all
are stable.
"""

import math

import lab

RATES = tuple(2.0**power for power in range(-8, 6))
EPOCHS, BATCH, IMAGES = 5, 50, 2000
NETWORKS = {
    "MLP": ["model=mlp", f"model.widths={[100] * 5}"],
    "convnet": lab.CONVNET,
}
NORMS = {"local": "BN", "none": "no norm"}
CHANCE = math.log(10)


def jobs(seeds, quick):
    """Return a job for each network, norm, rate and seed."""
    rates, steps = (RATES[3:5], 3) if quick else (RATES, EPOCHS * IMAGES // BATCH)
    return [
        {"network": network, "norm": norm, "rate": rate, "seed": seed, "steps": steps}
        for network in NETWORKS
        for norm in NORMS
        for rate in rates
        for seed in seeds
    ]


def run(job):
    """Return the row of a run."""
    trained = lab.train(
        [
            *NETWORKS[job["network"]],
            *lab.SGD,
            *lab.rate(job["rate"], BATCH),
            *lab.small_cifar10(IMAGES),
            *lab.TRAINS_ONLY,
            f"norm={job['norm']}",
            f"seed={job['seed']}",
            f"+trainer.max_steps={job['steps']}",
        ],
        test=False,
    )
    last = trained.train_loss[-(IMAGES // BATCH) :]
    return [{**job, "final_loss": sum(last) / len(last)}]


def is_stable(row):
    """Return whether the loss of the last epoch is finite and better than a constant guess."""
    return row["final_loss"] < CHANCE  # false for NaN


def highest(rows):
    """Return a row for each network, norm and seed: the log2 of the highest rate up to which all are stable."""
    found = []
    for network in NETWORKS:
        for norm in NORMS:
            for seed in lab.levels(rows, "seed"):
                chosen = sorted(
                    lab.where(rows, network=network, norm=norm, seed=seed), key=lambda r: r["rate"], reverse=False
                )
                stable = [row["rate"] for row in chosen if is_stable(row)]
                unstable = [row["rate"] for row in chosen if stable and row["rate"] > stable[0] and not is_stable(row)]
                below = [rate for rate in stable if not unstable or rate < unstable[0]]
                if below:
                    found.append({"network": network, "norm": norm, "seed": seed, "log2": math.log2(below[-1])})
    return found


def draw(rows):
    """Draw the final loss over the rate for each network."""
    figure, axes = lab.panels(len(NETWORKS))
    for one, network in zip(axes, NETWORKS, strict=True):
        for norm, colour in zip(NORMS, lab.COLOURS, strict=False):
            chosen = lab.where(rows, network=network, norm=norm)
            capped = [{**row, "loss": row["final_loss"] if row["final_loss"] < 4 else 4.0} for row in chosen]
            lab.line(one, capped, "rate", "loss", NORMS[norm], colour)
        one.axhline(CHANCE, color="black", linestyle=":", label="constant guess")
        lab.plain_log(one, "x", [rate for rate in lab.levels(rows, "rate") if math.log2(rate) % 2 == 0])
        one.tick_params(axis="x", labelsize=7)
        one.set(
            xlabel="learning rate", ylabel="training loss of the last epoch (nats),\n4 if larger or NaN", title=network
        )
        one.legend(fontsize=7)
    return figure


def sentence(rows):
    """Return what was seen."""
    found, parts, ratios = highest(rows), [], []
    for network in NETWORKS:
        logs = {norm: lab.column(found, "log2", network=network, norm=norm) for norm in NORMS}
        gain = lab.difference(
            found, "log2", {"network": network, "norm": "local"}, {"network": network, "norm": "none"}
        )
        ratios.append(gain)
        low, high = 2 ** (gain.mean - gain.half), 2 ** (gain.mean + gain.half)
        best = {
            norm: min(
                (lab.column(rows, "final_loss", network=network, norm=norm, rate=rate) for rate in stable_rates),
                key=lambda interval: interval.mean,
            )
            for norm in NORMS
            if (
                stable_rates := [
                    rate
                    for rate in lab.levels(rows, "rate")
                    if all(map(is_stable, lab.where(rows, network=network, norm=norm, rate=rate)))
                ]
            )
        }
        losses = " and ".join(f"{best[norm].text(2)} with {NORMS[norm]}" for norm in best)
        parts.append(
            f"{network}: {2 ** logs['local'].mean:.3g} with BN and {2 ** logs['none'].mean:.3g} without, "
            f"{2**gain.mean:.1f} times as high (95 % interval {low:.1f} to {high:.1f}); the lowest loss over the rates "
            f"is {losses or 'that of a constant guess'}"
        )
    holds = all(gain.mean > 0 and gain.mean - gain.half > 0 for gain in ratios)
    return (
        f"The claim {'holds' if holds else 'does not hold here for both networks'}. Highest stable learning rate "
        f"(geometric means over the seeds): " + "; ".join(parts) + "."
    )


if __name__ == "__main__":
    lab.main()
