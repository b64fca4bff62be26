"""What does a layer cost on CPU: ours against local BatchNorm2d + ReLU, which synchronizes nothing?

    python scripts/bench_layer.py                    # one process, then two gloo ranks; one thread each
    python scripts/bench_layer.py --ranks 1 --rounds 5

Each case is checked against the NumPy oracle first. Then all candidates take turns, forward and backward, and the
medians are compared within the run; figures of different runs say little on a shared machine. Rows are appended to
benchmarks/layer_cpu.csv.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import syncbn
from syncbn import reference

SHAPES = [(32, 64, 32, 32), (32, 256, 16, 16), (8, 64, 56, 56), (64, 512, 7, 7)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BASELINE = "torch local BN + ReLU"
OUTPUT = Path(__file__).parents[1] / "benchmarks" / "layer_cpu.csv"


class MeanOfSquares(nn.BatchNorm2d):
    """SyncBatchNorm as E[x^2] - E[x]^2 through autograd: the formulation that most Python implementations have."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input; one differentiable all-reduce of 2C float32 numbers."""
        moments = torch.cat([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        if dist.is_initialized() and dist.get_world_size() > 1:
            moments = syncbn.collectives.AllReduce.apply(moments, None) / dist.get_world_size()
        mean, square = moments.chunk(2)
        var = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def candidates(num_features: int) -> dict[str, nn.Module]:
    """Return what is compared, each with the same parameters."""
    return {
        BASELINE: nn.Sequential(nn.BatchNorm2d(num_features), nn.ReLU()),
        "syncbn + ReLU": nn.Sequential(syncbn.SyncBatchNorm(num_features), nn.ReLU()),
        "syncbn, fused ReLU": syncbn.SyncBatchNorm(num_features, activation="relu"),
        "mean of squares + ReLU": nn.Sequential(MeanOfSquares(num_features), nn.ReLU()),
    }


def check(name: str, layer: nn.Module, x: Tensor, grad_output: Tensor) -> None:
    """Compare one step with the oracle on the batch of all ranks; the local baseline with that on its own batch."""
    parts = [x, grad_output]
    if dist.is_initialized() and name != BASELINE:
        gathered = [[torch.empty_like(part) for _ in range(dist.get_world_size())] for part in parts]
        for part, into in zip(parts, gathered, strict=True):
            dist.all_gather(into, part.contiguous())
        parts = [torch.cat(into) for into in gathered]
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(grad_output)
    whole, whole_grad = (part.double().numpy() for part in parts)
    z = reference.batch_norm(whole).output
    gradients = reference.batch_norm_backward(whole_grad * (z > 0), whole)
    rank = dist.get_rank() if len(z) > len(x) else 0
    own = slice(rank * len(x), (rank + 1) * len(x))
    for actual, expected in ((y.detach(), z.clip(0)[own]), (leaf.grad, gradients.grad_input[own])):
        error = abs(actual.double().numpy() - expected).max()
        assert error < 1e-4, f"{name}: off the oracle by {error:.1e}"
    layer.zero_grad()


def milliseconds(step: Callable[[], None]) -> float:
    """Return the time of one call, started on all ranks together."""
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def measure(shape: tuple[int, ...], layout: torch.memory_format, rounds: int) -> dict[str, float]:
    """Return the median time of forward and backward in milliseconds by candidate, taken in turns."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    x, grad_output = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    layers = candidates(shape[1])
    for name, layer in layers.items():
        check(name, layer, x, grad_output)
    x.requires_grad_()
    times: dict[str, list[float]] = {name: [] for name in layers}
    for index in range(rounds + 1):
        for name, layer in layers.items():
            x.grad = None
            duration = milliseconds(lambda layer=layer: layer(x).backward(grad_output))
            if index > 0:  # the first round warms up
                times[name].append(duration)
    return {name: statistics.median(values) for name, values in times.items()}


def run(ranks: int, rounds: int) -> None:
    """Measure every case, print the ratios and append rows."""
    console = Console(width=120)
    head = {
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "ranks": ranks,
    }
    table = Table(title=f"forward + backward, float32, {ranks} rank(s), one thread each, {head['torch']}")
    for column in ("shape per rank", "layout", f"{BASELINE}, ms", *list(candidates(1))[1:]):
        table.add_column(column, justify="right")
    rows, ratios = [], []
    for shape in SHAPES:
        for name, layout in LAYOUTS.items():
            found = measure(shape, layout, rounds)
            ratio = {candidate: value / found[BASELINE] for candidate, value in found.items()}
            ratios.append(ratio)
            cells = [f"{ratio[candidate]:.2f}x" for candidate in list(found)[1:]]
            table.add_row(str(shape), name, f"{found[BASELINE]:.2f}", *cells)
            for candidate, value in found.items():
                rows.append({**head, "shape": "x".join(map(str, shape)), "layout": name, "candidate": candidate,
                             "ms": f"{value:.3f}", "ratio": f"{ratio[candidate]:.3f}"})  # fmt: skip
    means = [f"{statistics.mean(ratio[c] for ratio in ratios):.2f}x" for c in list(ratios[0])[1:]]
    table.add_row("mean of ratios", "", "", *means, style="bold")
    if not dist.is_initialized() or dist.get_rank() == 0:
        console.print(table)
        _append(rows)


def _append(rows: list[dict]) -> None:
    OUTPUT.parent.mkdir(exist_ok=True)
    is_new = not OUTPUT.exists()
    with OUTPUT.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def _run_rank(rank: int, ranks: int, store: str, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    run(ranks, rounds)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Measure with each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for ranks in arguments.ranks:
        if ranks == 1:
            run(1, arguments.rounds)
        else:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(
                    _run_rank, (ranks, f"{folder}/store", arguments.rounds), nprocs=ranks, join=True
                )


if __name__ == "__main__":
    main()
