"""What does synchronized normalization cost in a training step of a network?

    python scripts/bench_model.py                                 # CPU: 1 process, 2 gloo ranks; one thread each
    python scripts/bench_model.py --networks preact50 --compile   # and torch.compile, which takes minutes each
    python scripts/bench_model.py --device cuda --batch 32 --image 224 --rounds 20 --ranks 1 8

A step of a pre-activation ResNet, or of a network of torchvision: forward, cross entropy, backward with
DistributedDataParallel, SGD. The candidates differ in the normalization, in whether norm, activation and convolutions
are fused (`NormActConv`; `syncbn.fuse` for torchvision), and in whether the network is compiled. First the logits and
input gradients of each are compared in float64 with those of plain BatchNorm on the batch of all ranks; of a compiled
network, the float32 parameter gradients of its first step with those of the same network without compilation. Then all
alternate, and medians are compared within the run. Rows are appended to benchmarks/networks_DEVICE.csv; tables in
docs/performance.md.

Last answer (AMD EPYC, 2 cores, torch 2.14.1, a5779bf): ResNets take 1.1 times as long as with local BatchNorm in one
process and 1.4 to 1.5 times on 2 ranks, a DenseNet-121 1.3 and 2.5 times; fused 0.96 to 1.05 of that. Gathering takes
1.1 and 1.3 to 1.4 times, and 1.2 and 2.2. Ratios on 2 ranks move by 0.1 between runs. cuda: docs/performance.md.
"""

import argparse
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from common import LOCAL, Traffic
from matplotlib.figure import Figure
from networks import COLOUR_OF, COMPILED, NUM_CLASSES, Candidate, candidates, training_step
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

NETWORKS = ["preact18", "preact50", "resnet50", "densenet121"]


def gradient_and_logits(model: nn.Module, images: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the images and the logits."""
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    return torch.autograd.grad(logits, leaf, cotangent)[0], logits.detach()


def check(name: str, candidate: Candidate, network: str, image: int, device: torch.device) -> None:
    """Compare with plain BatchNorm in float64 on the batch of all ranks, or on this rank's batch for local BatchNorm.

    Raises:
        AssertionError: the results differ.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2 * ranks, 3, image, image, dtype=torch.float64, generator=generator).to(device)
    cotangent = torch.randn(2 * ranks, NUM_CLASSES, dtype=torch.float64, generator=generator).to(device)
    own = slice(2 * rank, 2 * rank + 2)
    is_local = name.startswith(LOCAL)
    part = own if is_local else slice(None)
    model = candidate.network(network, device, torch.float64)
    actual = gradient_and_logits(model, images[own], cotangent[own])
    plain = Candidate(nn.BatchNorm2d).network(network, device, torch.float64)
    for found, whole in zip(actual, gradient_and_logits(plain, images[part], cotangent[part]), strict=True):
        expected = whole if is_local else whole[own]
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error < 1e-6, f"{name}: off plain BatchNorm on the whole batch by {error:.1e}"


def check_gradients(name: str, model: nn.Module, eager: nn.Module) -> None:
    """Compare the parameter gradients of a compiled network with those of the same network without compilation.

    Rounding differently, once for each operation, changes these float32 gradients by percents; a network that does not
    synchronize has other gradients.

    Raises:
        AssertionError: the results differ.
    """
    actual, expected = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, eager))
    error = ((actual - expected).norm() / expected.norm()).item()
    assert error < 0.1, f"{name}: gradients off those without compilation by {error:.1e}"


def measure(
    network: str, batch: int, image: int, rounds: int, device_name: str, with_compile: bool
) -> list[dict[str, Any]]:
    """Return milliseconds of a step, and the calls and bytes of its normalization, by candidate.

    Calls and bytes of compiled networks are None: their collectives are part of the graph and not recorded.
    """
    device = common.device_of(device_name)
    torch.compiler.reset()  # one forward function can be compiled only a limited number of times
    models, steps, traffic = {}, {}, {}  # by name of the candidate
    found = candidates(device, with_compile=with_compile)
    for name, candidate in found.items():
        if not candidate.is_compiled:
            check(name, candidate, network, image, device)
        models[name] = candidate.network(network, device)
        if dist.is_initialized():
            devices = [device] if device.type == "cuda" else None
            models[name] = DistributedDataParallel(models[name], device_ids=devices)
        steps[name] = training_step(models[name], batch, image, device)
        if candidate.is_compiled:
            steps[name]()
            check_gradients(name, models[name], models[name.removesuffix(COMPILED)])
        else:
            with Traffic() as record:  # does not record DistributedDataParallel, which calls none of its functions
                steps[name]()
            traffic[name] = {"calls": len(record.sizes), "bytes": sum(record.sizes)}
    times = common.in_turns(steps, rounds, device)
    unknown = {"calls": None, "bytes": None}
    return [
        {"candidate": name, "ms": ms, "ratio": ms / times[LOCAL], **traffic.get(name, unknown)}
        for name, ms in times.items()
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of a step relative to local normalization, one panel for each number of ranks."""
    worlds = list(dict.fromkeys(row["ranks"] for row in rows))
    networks = list(dict.fromkeys(row["network"] for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    figure = Figure(figsize=(13, 0.9 + 3.1 * len(worlds)), layout="constrained")
    panels = figure.subplots(len(worlds), 1, squeeze=False, sharex=True)[:, 0]
    width = 0.86 / len(names)
    for axes, ranks in zip(panels, worlds, strict=True):
        for index, name in enumerate(names):
            own = [row for row in rows if row["ranks"] == ranks and row["candidate"] == name]
            places = [networks.index(row["network"]) + (index - (len(names) - 1) / 2) * width for row in own]
            style = {"color": COLOUR_OF[name.removesuffix(COMPILED)], "edgecolor": "white"}
            style["hatch"] = "//" if name.endswith(COMPILED) else ""
            bars = axes.bar(places, [row["ratio"] for row in own], width, label=name, **style)
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
        axes.set(ylabel=f"time / ({LOCAL})", title=f"{ranks} rank{'s' * (ranks > 1)}")
        axes.set_xticks(range(len(networks)), networks)
        axes.margins(x=0.01, y=0.1)
        common.tidy(axes)
    first = rows[0]
    figure.suptitle(f"Training step, {first['batch']} images of {first['image']} pixels per rank, {first['device']}")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, ncols=len(names), loc="outside lower center")
    common.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Measure each network with each number of ranks, print, append rows and draw."""
    parser = common.parser(__doc__, "networks_DEVICE")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="preact18 to preact200, models of torchvision")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=8, help="images per rank")
    parser.add_argument("--image", type=int, default=64, help="pixels per side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile(network)"
    )
    arguments = parser.parse_args(argv)
    csv, plot = (
        path.with_name(path.name.replace("DEVICE", arguments.device)) for path in (arguments.csv, arguments.plot)
    )
    if arguments.draw:
        return draw(common.last_run(csv), plot)
    case = {"batch": arguments.batch, "image": arguments.image}
    rows = []
    for network in arguments.networks:
        for ranks in arguments.ranks:
            options = arguments.rounds, arguments.device, arguments.compile
            measured = (network, arguments.batch, arguments.image, *options)
            found = common.on_ranks(ranks, measure, *measured, device=arguments.device)
            head = {**common.head(arguments.device), "network": network, "ranks": ranks, **case}
            rows += [{**head, **row} for row in found]
    common.print_table(
        f"training step, {arguments.batch} images of {arguments.image} pixels per rank, torch {torch.__version__}",
        ["network", "ranks", "normalization", "ms", f"ratio to {LOCAL}", "calls", "bytes per rank"],
        [[r["network"], str(r["ranks"]), r["candidate"], f"{r['ms']:.0f}", f"{r['ratio']:.2f}x",
          *("" if r[column] is None else str(r[column]) for column in ("calls", "bytes"))] for r in rows],
    )  # fmt: skip
    common.append_rows(csv, rows)
    draw(rows, plot)


if __name__ == "__main__":
    main()
