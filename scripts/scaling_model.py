"""What share of a ResNet-50 step would the collectives of SyncBN take on 8 to 4,096 GPUs? A model, not a measurement.

    python scripts/scaling_model.py                               # the model, and its check against gloo: a minute
    python scripts/scaling_model.py --ranks                       # the model alone
    python scripts/scaling_model.py --batch 8 --inter-us 10       # another batch per GPU, a slower network

A collective takes `base + sum of latencies along its critical path + bytes / bandwidth` (Hockney 1994). The critical
paths of ring and tree, and their latencies, are those with which NCCL chooses an algorithm, for LL, its protocol for
small messages (NVIDIA/nccl, src/graph/tuning.cc at b6475625: all constants below except those named here). Tree and
ring compute the sum over all ranks in 2 log2(nodes) and 2 (ranks - 1) steps; in `one-shot` every rank sends its vector
to every other rank at once, and adds the vectors it receives. The layers are the 53 of torchvision's ResNet-50. Ours
all-reduces 2C + 1 float64 in forward and in backward; torch's gathers 2C + 1 float32 from every rank and all-reduces
2C float32. The rest of a step is derived from 2470 images per second on one A100 80GB in mixed precision
(NVIDIA/DeepLearningExamples, ResNet50 v1.5 for PyTorch, README).

In `backward hidden`, the layers that `syncbn.fuse` fuses wait in backward only for the part of their all-reduce that
takes longer than the weight gradients of the convolutions after them: 32 of the 53 layers of torchvision's ResNet-50,
and 48 of the 49 of a pre-activation ResNet-50. The time of weight gradients is their FLOPs, counted in the network at
224 pixels, divided by a rate. The rate is that of the whole step above, 60 TFLOPS: the FLOPs of all convolutions,
forward and both gradients, divided by the time without synchronization. The step also contains layers that are bound by
memory, so convolutions alone are faster, and what is hidden is an upper bound. `--tflops 312`, the peak of an A100 in
half precision (NVIDIA A100 datasheet), gives the lower bound. The step time of the pre-activation network is taken to
be that of the other, which has as many FLOPs.

Assumptions:

- no overlap, except in `backward hidden`: a layer waits for its statistics;
- a hidden all-reduce and the convolutions beside it do not slow each other, nor do the gradients' all-reduces;
- all ranks arrive at the same time, and the network is not congested;
- one-shot has the base cost of the ring;
- the kernels of the layer and the host-device synchronizations of torch's layer cost nothing.

Check: gloo gathers around a ring, and up to 8 gloo ranks our layers gather. With latency and bandwidth fitted on 2
ranks, the formula of the all-gather predicts the collectives measured in our layers on more ranks. These ranks share
the cores, which multiplies both costs. Rows are appended to benchmarks/scaling.csv, scaling_hidden.csv and
scaling_gloo.csv; tables in docs/performance.md.

Last answer (predicted): 11 % of a step within a node of 8 GPUs, at any size of the cluster; over all GPUs 27 % on 64,
38 % on 512, 46 % on 4096, and with all-gather 36, 77 and 96 %. Hiding the backward all-reduces leaves, at best, 21, 32
and 40 % for torchvision's ResNet-50, and 15, 25 and 34 % for the pre-activation one (26, 36 and 44 % without); in the
worst case 25, 37 and 45 %, and 22, 34 and 42 %. The check (AMD EPYC, 2 cores, torch 2.14.1, 2122789): on 3 to 8 gloo
ranks, measured collectives take 0.5 to 1.3 times as long as predicted.
"""

import math
import os
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import torch
from common import COLOURS, Traffic
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from networks import Candidate
from torch import nn

import syncbn

IMAGE = 224  # pixels per side
HIDDEN = "world, backward hidden"
RESNET50, PREACT50 = "resnet50", "preact50"
GPUS = [2**power for power in range(3, 13)]
CHANNELS = [64, 512, 2048, 65536]  # no layer has 65536 channels: they are for fitting the bandwidth


class Link(NamedTuple):
    """The cost of one message between neighbours."""

    latency_us: float
    gb_per_s: float

    def transfer_us(self, size: float) -> float:
        """Return the time that `size` bytes add to the latency."""
        return size / (self.gb_per_s * 1e3)


class Fabric(NamedTuple):
    """The base cost of a collective, and the cost of each step within a node and between nodes."""

    base_us: float
    intra: Link
    inter: Link


class Group(NamedTuple):
    """Ranks that share statistics, evenly spread over nodes."""

    ranks: int
    nodes: int


def ring_us(fabric: Fabric, group: Group, size: int) -> float:
    """Return the time of an all-reduce of `size` bytes that passes every part around the ring twice."""
    steps = 2 * (group.ranks - 1)
    return fabric.base_us + _ring_steps_us(fabric, group, steps, 2 * group.nodes, size / group.ranks)


def tree_us(fabric: Fabric, group: Group, size: int) -> float:
    """Return the time of an all-reduce up and down a binary tree of nodes, with chains inside each."""
    up = (group.ranks // group.nodes - 1) * fabric.intra.latency_us
    up += math.ceil(math.log2(group.nodes)) * fabric.inter.latency_us
    return fabric.base_us + 2 * (up + _slowest(fabric, group).transfer_us(size))


def one_shot_us(fabric: Fabric, group: Group, size: int) -> float:
    """Return the time in which every rank sends its vector to every other rank, in sequence through its link."""
    near = group.ranks // group.nodes - 1
    far = group.ranks - 1 - near
    times = [fabric.intra.latency_us + fabric.intra.transfer_us(near * size)] if near else []
    times += [fabric.inter.latency_us + fabric.inter.transfer_us(far * size)] if far else []
    return fabric.base_us + max(times)


def all_gather_us(fabric: Fabric, group: Group, size: int) -> float:
    """Return the time in which the vectors of all ranks, `size` bytes each, pass around the ring once."""
    return fabric.base_us + _ring_steps_us(fabric, group, group.ranks - 1, group.nodes - 1, size)


def _ring_steps_us(fabric: Fabric, group: Group, steps: int, between_nodes: int, size: float) -> float:
    between_nodes = min(between_nodes, steps) if group.nodes > 1 else 0
    latency = (steps - between_nodes) * fabric.intra.latency_us + between_nodes * fabric.inter.latency_us
    return latency + steps * _slowest(fabric, group).transfer_us(size)


def _slowest(fabric: Fabric, group: Group) -> Link:
    return fabric.intra if group.nodes == 1 else fabric.inter


class Machine(NamedTuple):
    """The costs of the fabric for ring and tree."""

    ring: Fabric
    tree: Fabric

    def all_reduce_us(self, group: Group, size: int) -> float:
        """Return the time of the faster of ring and tree, as NCCL chooses."""
        return min(ring_us(self.ring, group, size), tree_us(self.tree, group, size))


def nccl(arguments: Any) -> Callable[[Group], Machine]:
    """Return NCCL's constants for protocol LL on A100s, overridden by options of the command line."""
    intra_us, inter_us = arguments.intra_us, arguments.inter_us

    def machine(group: Group) -> Machine:
        # With several nodes, every step of a ring waits 1 us for the network proxy, also within a node.
        ring_intra = Link(intra_us or (0.6 if group.nodes == 1 else 1.0), arguments.intra_gb_s)
        tree_intra = Link(intra_us or 0.6, arguments.intra_gb_s)
        ring = Fabric(6.6, ring_intra, Link(inter_us or 2.7, arguments.inter_gb_s))
        return Machine(ring, Fabric(6.8, tree_intra, Link(inter_us or 5.0, arguments.inter_gb_s)))

    return machine


class Layer(NamedTuple):
    """A normalization: its channels, and the FLOPs per image of the weight gradients that run beside its all-reduce."""

    num_channels: int
    hiding_flops: float


class Network(NamedTuple):
    """The normalizations of a network, and the FLOPs per image of its convolutions in forward and backward."""

    layers: tuple[Layer, ...]
    flops: float


@cache
def network(name: str) -> Network:
    """Return a network of `networks.Candidate`; its layers hide their all-reduce where `syncbn.fuse` fuses them."""
    plain = Candidate(nn.BatchNorm2d).network(name, torch.device("meta"))
    flops = convolution_flops(plain)
    chains = syncbn.fusion_report(syncbn.fuse(plain)).fused
    layers = []
    for layer_name, layer in plain.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            readers = chains[layer_name].split(" -> ")[-1].split(", ") if layer_name in chains else []
            layers.append(Layer(layer.num_features, sum(flops[reader] for reader in readers)))
    first = next(iter(flops.values()))  # images have no gradient
    return Network(tuple(layers), 3 * sum(flops.values()) - first)


def convolution_flops(model: nn.Module) -> dict[str, float]:
    """Return the FLOPs of each convolution for one image, by name in the order of calls; each gradient takes as many.

    Args:
        model: on the meta device.
    """
    flops: dict[str, float] = {}

    def record(name: str, conv: nn.Module, output: torch.Tensor) -> None:
        flops[name] = 2.0 * conv.weight.numel() * output[0, 0].numel()

    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    hooks = [conv.register_forward_hook(lambda m, _, y, n=name: record(n, m, y)) for name, conv in convolutions]
    model(torch.empty(1, 3, IMAGE, IMAGE, device="meta"))
    for hook in hooks:
        hook.remove()
    return flops


def our_sizes(num_channels: int) -> tuple[int, int]:
    """Return the bytes that one layer all-reduces in forward and in backward."""
    return 8 * (2 * num_channels + 1), 8 * (2 * num_channels + 1)


def predict_hidden(
    name: str, gpus: int, per_node: int, machine: Callable[[Group], Machine], batch: int, tflops: float
) -> dict[str, float]:
    """Return the milliseconds that one step waits for collectives over all ranks, without and with hiding.

    Args:
        batch: images per GPU.
        tflops: the rate of weight gradients.
    """
    world = Group(gpus, math.ceil(gpus / per_node))
    fabric = machine(world)
    total_us, hidden_us = 0.0, 0.0
    for layer in network(name).layers:
        forward_us, backward_us = (fabric.all_reduce_us(world, size) for size in our_sizes(layer.num_channels))
        total_us += forward_us + backward_us
        hidden_us += min(backward_us, batch * layer.hiding_flops / tflops / 1e6)
    return {"world": total_us / 1e3, HIDDEN: (total_us - hidden_us) / 1e3}


def predict(gpus: int, per_node: int, machine: Callable[[Group], Machine]) -> dict[str, float]:
    """Return the milliseconds of the collectives of one step of a ResNet-50, by group and algorithm."""
    layers = [layer.num_channels for layer in network(RESNET50).layers]

    def total_ms(group: Group, one_us: Callable[[Machine, int], float]) -> float:
        fabric = machine(group)
        return sum(one_us(fabric, size) for channels in layers for size in our_sizes(channels)) / 1e3

    def gathered_ms(group: Group) -> float:
        fabric = machine(group)
        return 1e-3 * sum(
            all_gather_us(fabric.ring, group, 4 * (2 * channels + 1)) + fabric.all_reduce_us(group, 4 * 2 * channels)
            for channels in layers
        )

    world = Group(gpus, math.ceil(gpus / per_node))
    eight = Group(8, math.ceil(8 / per_node))
    node = Group(per_node, 1)
    best = Machine.all_reduce_us
    return {
        "world": total_ms(world, lambda fabric, size: best(fabric, world, size)),
        "world, ring": total_ms(world, lambda fabric, size: ring_us(fabric.ring, world, size)),
        "world, tree": total_ms(world, lambda fabric, size: tree_us(fabric.tree, world, size)),
        "world, one-shot": total_ms(world, lambda fabric, size: one_shot_us(fabric.ring, world, size)),
        "world, all-gather (torch)": gathered_ms(world),
        "groups of 8": total_ms(eight, lambda fabric, size: best(fabric, eight, size)),
        "groups of 8, one-shot": total_ms(eight, lambda fabric, size: one_shot_us(fabric.ring, eight, size)),
        "node": total_ms(node, lambda fabric, size: best(fabric, node, size)),
    }


def measure_collectives(channels: list[int], rounds: int) -> list[tuple[int, float]]:
    """Return the number of channels of each layer and the median microseconds of one of its collectives."""
    found = []
    for num_channels in channels:
        layer = syncbn.SyncBatchNorm(num_channels)
        x = torch.randn(2, num_channels, 2, requires_grad=True)
        grad_output = torch.randn_like(x)
        seconds = []
        for index in range(rounds + 1):
            with Traffic() as traffic:
                common.milliseconds(lambda: layer(x).backward(grad_output), torch.device("cpu"))  # noqa: B023
            assert tuple(traffic.sizes) == our_sizes(num_channels)
            seconds += traffic.seconds if index > 0 else []
        found.append((num_channels, statistics.median(seconds) * 1e6))
    return found


def fit_link(found: list[tuple[int, float]]) -> Link:
    """Return the latency and bandwidth of a ring of 2 ranks that minimize the relative error.

    Args:
        found: channels, and microseconds of an all-gather of 2C + 1 float64.
    """
    times = np.array([microseconds for _, microseconds in found], float)
    sizes = np.array([our_sizes(num_channels)[0] for num_channels, _ in found], float)
    system = np.stack([1 / times, sizes / times], 1)
    latency, per_byte = np.linalg.lstsq(system, np.ones(len(times)), rcond=None)[0]
    return Link(float(latency), 1e-3 / max(float(per_byte), 1e-9))


def check_on_gloo(ranks: list[int], channels: list[int], rounds: int) -> list[dict[str, Any]]:
    """Return, by ranks and channels, the measured microseconds of a collective and those predicted from 2 ranks."""
    cores = len(os.sched_getaffinity(0))
    rows, link = [], None
    for world in ranks:
        found = common.on_ranks(world, measure_collectives, channels, rounds)
        link = link or fit_link(found)
        sharing = max(1, world / cores)
        shared = Link(link.latency_us * sharing, link.gb_per_s / sharing)
        for num_channels, measured in found:
            predicted = all_gather_us(Fabric(0, shared, shared), Group(world, 1), our_sizes(num_channels)[0])
            row = {"ranks": world, "cores": cores, "channels": num_channels}
            rows.append({**row, "measured_us": measured, "predicted_us": predicted, "ratio": measured / predicted})
    return rows


def draw(
    predictions: list[dict[str, Any]],
    hidden: list[dict[str, Any]],
    gloo: list[dict[str, Any]],
    step_ms: float,
    path: Path,
) -> None:
    """Draw the predicted shares for both kinds of node, and the check."""
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    panels = figure.subplots(1, 3)
    lines = {  # "world" is the faster of ring and tree, which is the tree; groups of 8 are close to a node
        "world, ring": ("all-reduce over all GPUs, ring", COLOURS[1], "-"),
        "world, all-gather (torch)": ("all-gather over all GPUs (torch)", COLOURS[4], "-"),
        "world, one-shot": ("one-shot exchange over all GPUs", COLOURS[3], "-"),
        "world": ("all-reduce over all GPUs, tree (syncbn)", COLOURS[0], "-"),
        "node": ("all-reduce over the GPUs of a node (syncbn)", "#000000", "-"),
    }
    for axes, per_node in zip(panels, (8, 4), strict=False):
        rows = [row for row in predictions if row["per_node"] == per_node]
        for name, (label, colour, style) in lines.items():
            shares = [row[name] / (row[name] + step_ms) for row in rows]
            axes.plot([row["gpus"] for row in rows], shares, style, color=colour, label=label)
        for name, style in zip((RESNET50, PREACT50), (":", "-."), strict=True):
            rows = [row for row in hidden if (row["network"], row["per_node"]) == (name, per_node)]
            shares = [row[HIDDEN] / (row[HIDDEN] + step_ms) for row in rows]
            label = f"the same, hidden in backward, {name}"
            axes.plot([row["gpus"] for row in rows], shares, style, color=COLOURS[0], label=label)
        title = f"predicted for a ResNet-50, {per_node} GPUs per node"
        axes.set(title=title, xlabel="GPUs", ylabel="share of a step in collectives", ylim=(0, 1))
        common.plain_log(axes, "x", GPUS)
        axes.tick_params(axis="x", rotation=45)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=4, loc="outside lower center")
    for index, num_channels in enumerate(dict.fromkeys(row["channels"] for row in gloo)):
        rows = [row for row in gloo if row["channels"] == num_channels]
        ranks = [row["ranks"] for row in rows]
        predicted, measured = ([row[f"{kind}_us"] / 1e3 for row in rows] for kind in ("predicted", "measured"))
        panels[2].plot(ranks, predicted, "--", color=COLOURS[index])
        panels[2].plot(ranks, measured, "o", color=COLOURS[index], label=f"{num_channels} channels")
    if gloo:
        title = f"points measured, lines predicted from 2 ranks\n(one layer, gloo on {gloo[0]['cores']} cores)"
        panels[2].set(title=title, xlabel="ranks", ylabel="ms of a collective")
        common.plain_log(panels[2], "y", (1, 3, 10, 30), base=10)
        panels[2].set_xticks(sorted({row["ranks"] for row in gloo}))
        panels[2].legend(frameon=False)
    else:
        panels[2].set_visible(False)
    for axes in panels:
        common.tidy(axes)
    common.save(figure, path)


def predict_networks(arguments: Any) -> list[dict[str, Any]]:
    """Return a row with the waits of each network for each number of GPUs."""
    step_ms = arguments.batch / arguments.images_per_second * 1e3
    rows = []
    for name in (RESNET50, PREACT50):
        tflops = arguments.tflops or arguments.images_per_second * network(name).flops / 1e12
        for per_node in (8, 4):
            for gpus in GPUS:
                case = {"network": name, "gpus": gpus, "per_node": per_node, "step_ms": step_ms, "tflops": tflops}
                rows.append({**case, **predict_hidden(name, gpus, per_node, nccl(arguments), arguments.batch, tflops)})
    return rows


def report_hidden(rows: list[dict[str, Any]], path: Path) -> None:
    """Print what hiding is worth, one column for each network and kind of node, and append rows."""

    def cell(gpus: int, per_node: int, name: str) -> str:
        (row,) = (r for r in rows if (r["gpus"], r["per_node"], r["network"]) == (gpus, per_node, name))
        shares = (row[column] / (row[column] + row["step_ms"]) for column in ("world", HIDDEN))
        return f"{row['world']:.1f}, {row[HIDDEN]:.1f} ({', '.join(f'{share:.0%}' for share in shares)})"

    cases = [(per_node, name) for per_node in (8, 4) for name in (RESNET50, PREACT50)]
    common.print_table(
        f"predicted ms of waits, world, and {HIDDEN} (shares of the step), {rows[0]['tflops']:.0f} TFLOPS",
        ["GPUs", *(f"{name}, {per_node} per node" for per_node, name in cases)],
        [[str(gpus), *(cell(gpus, *case) for case in cases)] for gpus in GPUS],
    )
    common.append_rows(path, [{**common.head(), **row} for row in rows])


def main(argv: list[str] | None = None) -> None:
    """Predict, check, print, append rows and draw."""
    parser = common.parser(__doc__, "scaling")
    parser.add_argument("--batch", type=int, default=32, help="images per GPU")
    parser.add_argument("--images-per-second", type=float, default=2470, help="of one GPU, without synchronization")
    parser.add_argument("--tflops", type=float, help="rate of weight gradients, default: that of the step")
    parser.add_argument("--intra-us", type=float, help="latency of a step inside a node, default: NCCL's")
    parser.add_argument("--inter-us", type=float, help="latency of a step between nodes, default: NCCL's")
    parser.add_argument("--intra-gb-s", type=float, default=87.7, help="bandwidth of LL inside a node")
    parser.add_argument("--inter-gb-s", type=float, default=19.0, help="bandwidth of LL between 4 nodes and more")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 3, 4, 6, 8], help="of the check; must begin with 2")
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args(argv)
    if arguments.ranks and arguments.ranks[0] != 2:
        raise SystemExit(f"expected --ranks to begin with 2, got {arguments.ranks}: the link is fitted on 2 ranks")
    others = [arguments.csv.with_name(f"{arguments.csv.stem}_{name}.csv") for name in ("hidden", "gloo")]
    if arguments.draw:
        predicted, hidden, gloo = map(common.last_run, (arguments.csv, *others))
        return draw(predicted, hidden, gloo, predicted[0]["step_ms"], arguments.plot)
    step_ms = arguments.batch / arguments.images_per_second * 1e3
    predictions: list[dict[str, Any]] = [
        {"gpus": gpus, "per_node": per_node, "step_ms": step_ms, **predict(gpus, per_node, nccl(arguments))}
        for per_node in (8, 4) for gpus in GPUS
    ]  # fmt: skip
    for per_node in (8, 4):
        rows = [row for row in predictions if row["per_node"] == per_node]
        columns = list(rows[0])[3:]
        common.print_table(
            f"predicted ms of collectives (share of the step), {step_ms:.1f} ms without them, {per_node} GPUs per node",
            ["GPUs", *columns],
            [[str(r["gpus"]), *(f"{r[c]:.1f} ({r[c] / (r[c] + step_ms):.0%})" for c in columns)] for r in rows],
        )
    common.append_rows(arguments.csv, [{**common.head(), **row} for row in predictions])
    hidden = predict_networks(arguments)
    report_hidden(hidden, arguments.csv.with_name(f"{arguments.csv.stem}_hidden.csv"))
    gloo = check_on_gloo(arguments.ranks, arguments.channels, arguments.rounds)
    if gloo:
        common.print_table(
            f"collective in a layer, gloo, torch {torch.__version__}, {gloo[0]['cores']} cores",
            ["ranks", "C", "measured, us", "predicted from 2 ranks, us", "ratio"],
            [[str(r["ranks"]), str(r["channels"]), f"{r['measured_us']:.0f}", f"{r['predicted_us']:.0f}",
              f"{r['ratio']:.2f}"] for r in gloo],
        )  # fmt: skip
        gloo_csv = arguments.csv.with_name(f"{arguments.csv.stem}_gloo.csv")
        common.append_rows(gloo_csv, [{**common.head(), **row} for row in gloo])
    draw(predictions, hidden, gloo, step_ms, arguments.plot)


if __name__ == "__main__":
    main()
