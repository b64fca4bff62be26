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

Assumptions:

- no overlap: a layer waits for its statistics;
- all ranks arrive at the same time, and the network is not congested;
- one-shot has the base cost of the ring;
- the kernels of the layer and the host-device synchronizations of torch's layer cost nothing.

Check: the ring formula describes gloo's algorithm too. With latency and bandwidth fitted on 2 ranks, it predicts the
all-reduces measured in our layers on more ranks. These ranks share the cores, which multiplies both costs. Rows are
appended to benchmarks/scaling.csv and scaling_gloo.csv; tables in docs/performance.md.

Last answer (predicted): 11 % of a step within a node of 8 GPUs, at any size of the cluster; over all GPUs 27 % on 64,
38 % on 512, 46 % on 4096, and with all-gather 36, 77 and 96 %. The check (AMD EPYC, 2 cores, torch 2.14.1, 00fc624): on
3 to 8 gloo ranks, measured all-reduces take 1.20 to 2.10 times as long as predicted, 0.42 to 1.82 in earlier runs.
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
from torch import nn
from torchvision.models import resnet50

import syncbn

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


@cache
def resnet50_channels() -> tuple[int, ...]:
    """Return the number of channels of each normalization layer of a ResNet-50."""
    with torch.device("meta"):
        return tuple(module.num_features for module in resnet50().modules() if isinstance(module, nn.BatchNorm2d))


def our_sizes(num_channels: int) -> tuple[int, int]:
    """Return the bytes that one layer all-reduces in forward and in backward."""
    return 8 * (2 * num_channels + 1), 8 * (2 * num_channels + 1)


def predict(gpus: int, per_node: int, machine: Callable[[Group], Machine]) -> dict[str, float]:
    """Return the milliseconds of the collectives of one step, by group and algorithm."""

    def total_ms(group: Group, one_us: Callable[[Machine, int], float]) -> float:
        fabric = machine(group)
        return sum(one_us(fabric, size) for channels in resnet50_channels() for size in our_sizes(channels)) / 1e3

    def gathered_ms(group: Group) -> float:
        fabric = machine(group)
        return 1e-3 * sum(
            all_gather_us(fabric.ring, group, 4 * (2 * channels + 1)) + fabric.all_reduce_us(group, 4 * 2 * channels)
            for channels in resnet50_channels()
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


def measure_all_reduces(channels: list[int], rounds: int) -> list[tuple[int, float]]:
    """Return the number of channels of each layer and the median microseconds of one of its all-reduces."""
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
        found: channels, and microseconds of an all-reduce of 2C + 1 float64.
    """
    times = np.array([microseconds for _, microseconds in found], float)
    sizes = np.array([our_sizes(num_channels)[0] for num_channels, _ in found], float)
    steps = 2 * (2 - 1)
    system = np.stack([steps / times, steps * sizes / 2 / times], 1)
    latency, per_byte = np.linalg.lstsq(system, np.ones(len(times)), rcond=None)[0]
    return Link(float(latency), 1e-3 / max(float(per_byte), 1e-9))


def check_on_gloo(ranks: list[int], channels: list[int], rounds: int) -> list[dict[str, Any]]:
    """Return, by ranks and channels, the measured microseconds of an all-reduce and those predicted from 2 ranks."""
    cores = len(os.sched_getaffinity(0))
    rows, link = [], None
    for world in ranks:
        found = common.on_ranks(world, measure_all_reduces, channels, rounds)
        link = link or fit_link(found)
        sharing = max(1, world / cores)
        shared = Link(link.latency_us * sharing, link.gb_per_s / sharing)
        for num_channels, measured in found:
            predicted = ring_us(Fabric(0, shared, shared), Group(world, 1), our_sizes(num_channels)[0])
            row = {"ranks": world, "cores": cores, "channels": num_channels}
            rows.append({**row, "measured_us": measured, "predicted_us": predicted, "ratio": measured / predicted})
    return rows


def draw(predictions: list[dict[str, Any]], gloo: list[dict[str, Any]], step_ms: float, path: Path) -> None:
    """Draw the predicted shares for both kinds of node, and the check."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    columns = [name for name in predictions[0] if name not in ("gpus", "per_node", "step_ms")]
    for axes, per_node in zip(panels, (8, 4), strict=False):
        rows = [row for row in predictions if row["per_node"] == per_node]
        for index, name in enumerate(columns):
            style = "-" if name in ("world", "node", "groups of 8") else "--"
            shares = [row[name] / (row[name] + step_ms) for row in rows]
            colour = [*COLOURS, "#BBBBBB", "#000000"][index]
            axes.plot([row["gpus"] for row in rows], shares, style, color=colour, label=name)
        axes.set(title=f"Predicted share of a step, {per_node} GPUs per node", xlabel="GPUs", xscale="log", ylim=(0, 1))
        axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS], rotation=45)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    panels[1].legend(frameon=False, fontsize=8)
    for index, num_channels in enumerate(dict.fromkeys(row["channels"] for row in gloo)):
        rows = [row for row in gloo if row["channels"] == num_channels]
        ranks = [row["ranks"] for row in rows]
        panels[2].plot(ranks, [r["predicted_us"] for r in rows], "--", color=COLOURS[index])
        panels[2].plot(ranks, [r["measured_us"] for r in rows], "o", color=COLOURS[index], label=f"C = {num_channels}")
    if gloo:
        title = (
            f"All-reduce in a layer, gloo on {gloo[0]['cores']} cores\npoints measured, lines predicted from 2 ranks"
        )
        panels[2].set(title=title, xlabel="ranks", ylabel="us", yscale="log")
        panels[2].legend(frameon=False)
    else:
        panels[2].set_visible(False)
    for axes in panels:
        common.tidy(axes)
    common.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Predict, check, print, append rows and draw."""
    parser = common.parser(__doc__, "scaling")
    parser.add_argument("--batch", type=int, default=32, help="images per GPU")
    parser.add_argument("--images-per-second", type=float, default=2470, help="of one GPU, without synchronization")
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
    gloo = check_on_gloo(arguments.ranks, arguments.channels, arguments.rounds)
    if gloo:
        common.print_table(
            f"all-reduce in a layer, gloo, torch {torch.__version__}, {gloo[0]['cores']} cores",
            ["ranks", "C", "measured, us", "predicted from 2 ranks, us", "ratio"],
            [[str(r["ranks"]), str(r["channels"]), f"{r['measured_us']:.0f}", f"{r['predicted_us']:.0f}",
              f"{r['ratio']:.2f}"] for r in gloo],
        )  # fmt: skip
        gloo_csv = arguments.csv.with_name(f"{arguments.csv.stem}_gloo.csv")
        common.append_rows(gloo_csv, [{**common.head(), **row} for row in gloo])
    draw(predictions, gloo, step_ms, arguments.plot)


if __name__ == "__main__":
    main()
