"""What does synchronized normalization cost in a training step of a network?

    python scripts/bench_model.py                                 # CPU: 1 process, 2 gloo ranks; one thread each
    python scripts/bench_model.py --device cuda --batch 32 --image 224 --rounds 20 --ranks 1 8

A step of a pre-activation ResNet: forward, cross entropy, backward with DistributedDataParallel, SGD. The networks
differ only in their normalization. First the logits and input gradients of each are compared in float64 with those of
plain BatchNorm on the batch of all ranks. Then all alternate, and medians are compared within the run. Rows are
appended to benchmarks/model_DEVICE.csv; tables in docs/performance.md.

Last answer (AMD EPYC, 2 cores, torch 2.14.1, 00fc624 and three more runs): 1.1 times as long as local BatchNorm in one
process, 1.2 to 1.6 on 2 ranks, for ResNet-18 and 50. Gathering takes 1.0 to 1.1 and 1.1 to 1.5; ratios on 2 ranks move
by 0.1 to 0.2 between runs. cuda: not yet measured.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from common import COLOURS, LOCAL, Traffic
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from train.preact_resnet import preact_resnet

NUM_CLASSES = 100


def network(depth: int, norm: Callable[[int], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return the network with the same parameters for every normalization and rank."""
    torch.manual_seed(0)
    return preact_resnet(depth, norm, num_classes=NUM_CLASSES).to(device, dtype)


def gradient_and_logits(model: nn.Module, images: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the images and the logits."""
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    return torch.autograd.grad(logits, leaf, cotangent)[0], logits.detach()


def check(name: str, norm: Callable[[int], nn.Module], depth: int, image: int, device: torch.device) -> None:
    """Compare with plain BatchNorm in float64 on the batch of all ranks, or on this rank's batch for local BatchNorm.

    Raises:
        AssertionError: the results differ.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2 * ranks, 3, image, image, dtype=torch.float64, generator=generator).to(device)
    cotangent = torch.randn(2 * ranks, NUM_CLASSES, dtype=torch.float64, generator=generator).to(device)
    own = slice(2 * rank, 2 * rank + 2)
    part = own if name == LOCAL else slice(None)
    actual = gradient_and_logits(network(depth, norm, device, torch.float64), images[own], cotangent[own])
    plain = network(depth, nn.BatchNorm2d, device, torch.float64)
    for found, whole in zip(actual, gradient_and_logits(plain, images[part], cotangent[part]), strict=True):
        expected = whole if name == LOCAL else whole[own]
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error < 1e-6, f"{name}: off plain BatchNorm on the whole batch by {error:.1e}"


def measure(depth: int, batch: int, image: int, rounds: int, device_name: str) -> list[dict[str, Any]]:
    """Return milliseconds of a step, and the calls and bytes of its normalization, by formulation."""
    device = common.device_of(device_name)
    steps, traffic = {}, {}
    for name, norm in common.norms(device).items():
        check(name, norm, depth, image, device)
        model = network(depth, norm, device, torch.float32)
        if dist.is_initialized():
            devices = [device] if device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=devices)
        steps[name] = _training_step(model, batch, image, device)
        with Traffic() as traffic[name]:  # does not record DistributedDataParallel, which calls none of its functions
            steps[name]()
    times = common.in_turns(steps, rounds, device)
    return [
        {"candidate": name, "ms": ms, "ratio": ms / times[LOCAL], "calls": len(traffic[name].sizes),
         "bytes": sum(traffic[name].sizes)}
        for name, ms in times.items()
    ]  # fmt: skip


def _training_step(model: nn.Module, batch: int, image: int, device: torch.device) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(batch, 3, image, image, device=device)
    labels = torch.randint(NUM_CLASSES, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of a step relative to local normalization."""
    cases = list(dict.fromkeys((row["depth"], row["ranks"]) for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        ratios = [row["ratio"] for row in rows if row["candidate"] == name]
        positions = [place + (index - (len(names) - 1) / 2) * width for place in range(len(cases))]
        bars = axes.bar(positions, ratios, width, color=COLOURS[index], label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    first = rows[0]
    title = f"Training step, {first['batch']} images of {first['image']} pixels per rank, {first['device']}"
    axes.set(title=title, ylabel=f"time / ({LOCAL})")
    axes.set_xticks(range(len(cases)), [f"ResNet-{depth}, {ranks} rank{'s' * (ranks > 1)}" for depth, ranks in cases])
    axes.set_ylim(top=axes.get_ylim()[1] * 1.15)
    axes.legend(frameon=False, ncols=len(names), loc="upper left")
    common.tidy(axes)
    common.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Measure each depth with each number of ranks, print, append rows and draw."""
    parser = common.parser(__doc__, "model_DEVICE")
    parser.add_argument("--depth", type=int, nargs="+", default=[18, 50])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=8, help="images per rank")
    parser.add_argument("--image", type=int, default=64, help="pixels per side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args(argv)
    case = {"batch": arguments.batch, "image": arguments.image}
    rows = []
    for depth in arguments.depth:
        for ranks in arguments.ranks:
            measured = (depth, arguments.batch, arguments.image, arguments.rounds, arguments.device)
            found = common.on_ranks(ranks, measure, *measured, device=arguments.device)
            head = {**common.head(arguments.device), "depth": depth, "ranks": ranks, **case}
            rows += [{**head, **row} for row in found]
    common.print_table(
        f"training step, {arguments.batch} images of {arguments.image} pixels per rank, torch {torch.__version__}",
        ["network", "ranks", "normalization", "ms", f"ratio to {LOCAL}", "calls", "bytes per rank"],
        [[f"ResNet-{r['depth']}", str(r["ranks"]), r["candidate"], f"{r['ms']:.0f}", f"{r['ratio']:.2f}x",
          str(r["calls"]), str(r["bytes"])] for r in rows],
    )  # fmt: skip
    csv, plot = (
        path.with_name(path.name.replace("DEVICE", arguments.device)) for path in (arguments.csv, arguments.plot)
    )
    common.append_rows(csv, rows)
    draw(rows, plot)


if __name__ == "__main__":
    main()
