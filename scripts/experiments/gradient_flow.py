"""Gradient flow at initialization, and saturation.

Batch normalization keeps gradients from vanishing or exploding, and lets sigmoid and tanh units leave saturation.
(Ioffe & Szegedy 2015, sections 1 and 3.3. Yang et al. 2019, "A Mean Field Theory of Batch Normalization", contradict
the first for deep plain networks: there its gradients explode.)

Gradients: networks of depth 20, 56 and 110, three stages of width 8, 16 and 32, plain (3x3 convolutions) and residual
(pre-activation), with and without normalization, from He initialization and from a normal distribution with standard
deviation 0.01, which is far too small. In float64, for the first batch of 16 images of CIFAR-10: the root mean square
of the loss's gradient with respect to the output of every 3x3 convolution. The ratio is that of the first convolution
to the last one; 1 means that a gradient neither vanishes nor explodes on its way. Saturation: a fully connected network
(three hidden layers of 100) with sigmoid or tanh units trains on 1,024 of the images, from weights with standard
deviation 1, 5 epochs of SGD with momentum 0.9, at 0.1. A unit counts as saturated for an image if its derivative is
below 10 % of the largest one.
"""

import math
from itertools import pairwise

import lab
import torch
from lightning.pytorch import Callback
from torch import nn

DEPTHS = (20, 56, 110)
BATCH, IMAGES = 16, 1024
NORMS = {"local": "BN", "none": "no norm"}
INITS = {"he": "He", "small": "std 0.01"}
NETWORKS = ("plain", "residual")
SMALL = 0.01
SATURATED = 0.1
UNITS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}
EPOCHS = 5


class Saturating(nn.Module):
    """Linear layers with a norm and sigmoid or tanh units, and a linear head."""

    def __init__(self, norm_layer, *, num_classes, unit, image_size=32, in_channels=3, width=100):
        super().__init__()
        sizes = [in_channels * image_size**2, width, width, width]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.norms = nn.ModuleList(norm_layer(width) for _ in self.layers)
        self.head = nn.Linear(width, num_classes)
        self.unit = UNITS[unit]
        self.saturated = 0.0  # share of the units in the last call
        for layer in self.layers:
            nn.init.normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        """Return the logits (N, num_classes) of images (N, in_channels, H, W)."""
        x, shares = x.flatten(1), []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.unit(norm(layer(x)[:, :, None, None]).flatten(1))
            slope = 4 * x * (1 - x) if self.unit is torch.sigmoid else 1 - x**2
            shares.append((slope < SATURATED).double().mean().item())
        self.saturated = sum(shares) / len(shares)
        return self.head(x)


class Initialize(Callback):
    """Draws the weights of all convolutions again, with standard deviation 0.01."""

    def on_fit_start(self, trainer, pl_module):
        """Draw the weights."""
        for module in pl_module.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=SMALL)


class Gradients(Callback):
    """Keeps the root mean square of the gradient of every 3x3 convolution's output, in the order of the network."""

    def on_fit_start(self, trainer, pl_module):
        """Register hooks; backward calls them from the last convolution to the first."""
        self.found = []
        for module in pl_module.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.register_full_backward_hook(self.keep)

    def keep(self, module, grad_input, grad_output):
        """Keep the gradient of an output."""
        self.found.insert(0, grad_output[0].square().mean().sqrt().item())


class Saturation(Callback):
    """Keeps the share of saturated units of every step."""

    def __init__(self):
        self.found = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Keep it."""
        self.found.append(pl_module.network.saturated)


def jobs(seeds, quick):
    """Return the jobs of both parts for each seed."""
    flow = [
        {"part": "flow", "network": network, "depth": depth, "init": init, "norm": norm, "seed": seed, "steps": 1}
        for network in NETWORKS
        for depth in (DEPTHS[:1] if quick else DEPTHS)
        for init in INITS
        for norm in NORMS
        for seed in seeds
    ]
    steps = 2 if quick else EPOCHS * IMAGES // BATCH
    return flow + [
        {"part": "saturation", "network": unit, "depth": 4, "init": "std 1", "norm": norm, "seed": seed, "steps": steps}
        for unit in UNITS
        for norm in NORMS
        for seed in seeds
    ]


def network_of(job):
    """Return the overrides for the network of a job."""
    if job["part"] == "saturation":
        return ["model=own", "model._target_=gradient_flow.Saturating", f"+model.unit={job['network']}"]
    units = (job["depth"] - 2) // 6
    if job["network"] == "residual":
        return [*lab.SMALL_RESNET, f"model.units={[units] * 3}"]
    return [*lab.CONVNET, f"+model.depths={[2 * units + 1, 2 * units, 2 * units]}", "+model.width=8"]


def run(job):
    """Return a row for each convolution, or for each step."""
    is_flow = job["part"] == "flow"
    callback = Gradients() if is_flow else Saturation()
    trained = lab.train(
        [
            *network_of(job),
            *lab.SGD,
            *lab.rate(0.1, BATCH),
            *lab.small_cifar10(IMAGES),
            *lab.TRAINS_ONLY,
            f"trainer.precision={'64-true' if is_flow else '32-true'}",
            f"norm={job['norm']}",
            f"seed={job['seed']}",
            f"+trainer.max_steps={job['steps']}",
        ],
        [callback, *([Initialize()] if job["init"] == "small" else [])],
        test=False,
    )
    losses = [float("nan")] * len(callback.found) if is_flow else trained.train_loss
    return [
        {**job, "index": index, "value": repr(value), "loss": loss}
        for index, (value, loss) in enumerate(zip(callback.found, losses, strict=True))
    ]


def ratios(rows):
    """Return a row for each network: log10 of the ratio of the first convolution's gradient to the last one's."""
    found = {}
    for row in lab.where(rows, part="flow"):
        key = tuple(row[name] for name in ("network", "depth", "init", "norm", "seed"))
        found.setdefault(key, []).append(row["value"])
    names = ("network", "depth", "init", "norm", "seed")
    return [
        dict(zip(names, key, strict=True), log10=math.log10(values[0] / values[-1])) for key, values in found.items()
    ]


def draw(rows):
    """Draw the ratios over the depth for both networks, and the saturated share over the steps."""
    figure, (plain, residual, saturation) = lab.panels(3)
    found = ratios(rows)
    for one, network in ((plain, "plain"), (residual, "residual")):
        for norm, colour in zip(NORMS, lab.COLOURS, strict=False):
            for init, style in zip(INITS, ("-", "--"), strict=True):
                chosen = lab.where(found, network=network, norm=norm, init=init)
                lab.line(one, chosen, "depth", "log10", f"{NORMS[norm]}, {INITS[init]}", colour, linestyle=style)
        one.axhline(0, color="black", linestyle=":")
        one.set(xlabel="depth", ylabel="log10 of gradient ratio, first to last", title=network, xticks=DEPTHS)
        one.set_yscale("symlog", linthresh=3)
        one.set_yticks([-100, -30, -10, -3, 0, 3, 10], ["-100", "-30", "-10", "-3", "0", "3", "10"])
        one.legend(fontsize=7, handlelength=3.5)
    for norm, colour in zip(NORMS, lab.COLOURS, strict=False):
        for unit, style in zip(UNITS, ("-", "--"), strict=True):
            chosen = [
                {**row, "share": 100 * row["value"], "step": row["index"] + 1}
                for row in lab.where(rows, part="saturation", network=unit, norm=norm)
            ]
            lab.line(saturation, chosen, "step", "share", f"{unit}, {NORMS[norm]}", colour, linestyle=style, marker="")
    saturation.set(xlabel="step", ylabel="saturated units (%)", ylim=(0, 100), title="initial weights with std 1")
    saturation.legend(fontsize=7, handlelength=3.5)
    return figure


def sentence(rows):
    """Return what was seen."""
    found, deepest = ratios(rows), max(lab.levels(lab.where(rows, part="flow"), "depth"))
    flow = {
        (network, init, norm): lab.column(found, "log10", network=network, init=init, norm=norm, depth=deepest)
        for network in NETWORKS
        for init in INITS
        for norm in NORMS
    }
    nearer = {
        (network, init): abs(flow[network, init, "local"].mean) < abs(flow[network, init, "none"].mean)
        for network in NETWORKS
        for init in INITS
    }
    each = "; ".join(
        f"{network}, {INITS[init]}: {flow[network, init, 'local'].text(1)} with BN and "
        f"{flow[network, init, 'none'].text(1)} without"
        for network in NETWORKS
        for init in INITS
    )
    last = max(lab.levels(lab.where(rows, part="saturation"), "index"))

    def share(unit, norm, index):
        values = lab.where(rows, part="saturation", network=unit, norm=norm, index=index)
        return 100 * lab.column(values, "value").mean

    shares = "; ".join(
        f"{unit}: {share(unit, 'local', 0):.0f} % with BN and {share(unit, 'none', 0):.0f} % without at first, "
        f"{share(unit, 'local', last):.0f} % and {share(unit, 'none', last):.0f} % after {last + 1}"
        for unit in UNITS
    )
    flows = "holds" if all(nearer.values()) else "does not hold here" if not any(nearer.values()) else "holds in part"
    leaves = all(share(unit, "local", last) < share(unit, "none", last) for unit in UNITS)
    cases = ", ".join(f"{network} from {INITS[init]}" for (network, init), is_nearer in nearer.items() if is_nearer)
    return (
        f"The claim about gradients {flows}: at depth {deepest} BN brings the ratio of the first convolution's "
        f"gradient to the last one's nearer to 1 in {sum(nearer.values())} of {len(nearer)} cases "
        f"({cases or 'none'}). Its log10: {each}. The claim about saturation "
        f"{'holds' if leaves else 'does not hold here'}. Saturated units, {shares}."
    )


if __name__ == "__main__":
    lab.main()
