"""Order of normalization and activation: the five residual units.

Of five orders in a residual unit, full pre-activation (BN-ReLU-conv, BN-ReLU-conv, add) has the lowest error. (He et
al. 2016, Identity Mappings, table 2 and figure 4: 6.61, 8.17, 7.84, 6.71 and 6.37 % on CIFAR-10 with ResNet-110,
medians of five runs.)

Networks of depth 32, three stages of 5 units with width 8, 16 and 32, train on digits (8 x 8 pixels, 1,294 images) with
SGD with momentum 0.9, a warmup of one epoch and a cosine, 6 epochs in batches of 64, at each of two learning rates;
what counts is the one with the lower mean training loss. Full pre-activation is the trainer's `PreActResNet`, without
fused units. As in the paper's appendix, the units other than "BN after addition", "ReLU before addition" and the
original one are followed by an activation at the end of the network. The training loss is that of the last epoch.
"""

import lab
from torch import nn

EPOCHS, BATCH = 6, 64
WIDTH, UNITS = 8, 5
RATES = (0.05, 0.2)
PUBLISHED = {  # median test error in percent, He et al. 2016, table 2, ResNet-110 on CIFAR-10
    "original": 6.61,
    "bn_after_addition": 8.17,
    "relu_before_addition": 7.84,
    "relu_only_preactivation": 6.71,
    "full_preactivation": 6.37,
}


class Unit(nn.Module):
    """A residual unit with two 3x3 convolutions, in one of the first four orders."""

    def __init__(self, order, in_channels, width, stride, norm_layer):
        super().__init__()

        def convolution(channels, stride):
            return nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)

        first, second = convolution(in_channels, stride), convolution(width, 1)
        middle = [first, norm_layer(width), nn.ReLU(), second]
        layers, after = {
            "original": ([*middle, norm_layer(width)], [nn.ReLU()]),
            "bn_after_addition": (middle, [norm_layer(width), nn.ReLU()]),
            "relu_before_addition": ([*middle, norm_layer(width), nn.ReLU()], []),
            "relu_only_preactivation": ([nn.ReLU(), *middle, norm_layer(width)], []),
        }[order]
        self.branch, self.after = nn.Sequential(*layers), nn.Sequential(*after)
        is_same = stride == 1 and in_channels == width
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(in_channels, width, 1, stride, bias=False)

    def forward(self, x):
        """Return (N, width, H / stride, W / stride)."""
        return self.after(self.shortcut(x) + self.branch(x))


class Network(nn.Module):
    """Stem, three stages of units, mean over pixels, linear."""

    def __init__(self, norm_layer, *, num_classes, in_channels, order, units, width):
        super().__init__()
        layers = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), norm_layer(width)]
        layers += [nn.ReLU()] * (order != "relu_only_preactivation")
        channels = width
        for stage in range(3):
            for unit in range(units):
                stride = 2 if stage and not unit else 1
                layers.append(Unit(order, channels, width * 2**stage, stride, norm_layer))
                channels = width * 2**stage
        layers += [nn.ReLU()] * (order == "relu_only_preactivation")
        self.features, self.head = nn.Sequential(*layers), nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        """Return the logits (N, num_classes) of images (N, in_channels, H, W)."""
        return self.head(self.features(x).mean((2, 3)))


def jobs(seeds, quick):
    """Return a job for each order, rate and seed."""
    size = {"units": 1, "epochs": 1} if quick else {"units": UNITS, "epochs": EPOCHS}
    return [
        {"order": order, "rate": rate, "seed": seed, **size}
        for order in PUBLISHED
        for rate in (RATES[:1] if quick else RATES)
        for seed in seeds
    ]


def network_of(job):
    """Return the overrides for the network of a job."""
    if job["order"] == "full_preactivation":
        return [*lab.SMALL_RESNET, f"model.units={[job['units']] * 3}", f"model.width={WIDTH}"]
    own = ["model=own", "model._target_=order.Network", f"+model.order={job['order']}", f"+model.units={job['units']}"]
    return [*own, f"+model.width={WIDTH}", "+model.in_channels=${data.in_channels}"]


def run(job):
    """Return the row of a run."""
    trained = lab.train(
        [
            *network_of(job),
            *lab.rate(job["rate"], BATCH),
            *lab.TRAINS_ONLY,
            "norm=local",
            f"seed={job['seed']}",
            f"trainer.max_epochs={job['epochs']}",
        ]
    )
    last = trained.train_loss[-(len(trained.train_loss) // job["epochs"]) :]
    error = 100 - 100 * trained.test["test_accuracy"]
    return [{**job, "train_loss": sum(last) / len(last), "test_error": error}]


def chosen(rows):
    """Return the rows of each order at its better rate."""
    found = []
    for order in PUBLISHED:
        rates = lab.levels(lab.where(rows, order=order), "rate")
        best = min(rates, key=lambda rate: lab.column(rows, "train_loss", order=order, rate=rate).mean)
        found += lab.where(rows, order=order, rate=best)
    return found


def draw(rows):
    """Draw training loss, test error and the published error of each order."""
    figure, axes = lab.panels(3)
    labels = [
        order.replace("_", " ").replace("before ", "before\n").replace("after ", "after\n") for order in PUBLISHED
    ]
    labels = [label.replace(" preactivation", "\npre-activation") for label in labels]
    for one, name, text in (
        (axes[0], "train_loss", "training loss of the last epoch (nats)"),
        (axes[1], "test_error", "test error (%)"),
    ):
        for place, (order, colour) in enumerate(zip(PUBLISHED, lab.COLOURS, strict=False)):
            part = lab.where(chosen(rows), order=order)
            found = lab.column(part, name)
            one.bar(place, found.mean, yerr=found.half, color=colour, capsize=4)
            one.scatter([place] * len(part), [row[name] for row in part], s=10, color="black", zorder=3)
        one.set(ylabel=text, title=f"digits, depth {6 * rows[0]['units'] + 2}")
    axes[2].bar(range(len(PUBLISHED)), PUBLISHED.values(), color=lab.COLOURS[: len(PUBLISHED)])
    axes[2].set(ylabel="test error (%)", title="CIFAR-10, depth 110 (He et al. 2016)")
    for one in axes:
        one.set_xticks(range(len(PUBLISHED)), labels, fontsize=6)
    return figure


def sentence(rows):
    """Return what was seen."""
    best = chosen(rows)
    error = {order: lab.column(best, "test_error", order=order) for order in PUBLISHED}
    loss = {order: lab.column(best, "train_loss", order=order) for order in PUBLISHED}
    gains = {
        order: lab.difference(best, "test_error", {"order": order}, {"order": "full_preactivation"})
        for order in PUBLISHED
        if order != "full_preactivation"
    }
    beaten = [order for order, gain in gains.items() if gain.mean > 0 and gain.excludes_zero]
    lowest = min(error, key=lambda order: error[order].mean) == "full_preactivation"
    verdict = "holds" if len(beaten) == len(gains) else "holds in part" if lowest or beaten else "does not hold here"
    each = "; ".join(
        f"{order.replace('_', ' ')} {error[order].text(1, '%')} (training loss {loss[order].text(3)}"
        + (f", {gains[order].mean:+.1f} ± {gains[order].half:.1f} points)" if order in gains else ")")
        for order in PUBLISHED
    )
    names = " and ".join(order.replace("_", " ") for order in beaten) or "none"
    return (
        f"The claim {verdict}: full pre-activation {'has' if lowest else 'does not have'} the lowest mean test error, "
        f"and the interval of the difference excludes 0 for {len(beaten)} of the 4 others ({names}). Test errors, with "
        f"the difference to full pre-activation: {each}."
    )


if __name__ == "__main__":
    lab.main()
