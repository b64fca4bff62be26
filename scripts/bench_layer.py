"""What does a layer cost on CPU: each op, the layer against other formulations, and the share of communication?

    python scripts/bench_layer.py                                 # everything: 2 to 3 minutes on 2 cores
    python scripts/bench_layer.py --parts layer --rounds 5
    python scripts/bench_layer.py --parts world --ranks 1 2 4 8

- ops: each op of both CPU backends, in units of a copy of the same tensor;
- layer: forward and backward with a ReLU, in units of local BatchNorm2d + ReLU, which does not synchronize;
- world: one layer by number of ranks: the share of time in collectives, and the bytes that each rank passes to them.

Each case is first checked against the NumPy oracle. Then all candidates alternate and their medians are compared within
the run; on a shared machine, times of different runs are not comparable. Each rank has one thread. Rows are appended to
benchmarks/layer_cpu.csv, ops_cpu.csv and world_cpu.csv; tables in docs/performance.md.

Last answer (AMD EPYC, 2 cores, torch 2.14.1, 00fc624), in times of local BatchNorm2d + ReLU: one process 0.9 to 1.1 for
contiguous activations and 2.0 to 2.3 for channels last, torch.compile(layer) 0.5 and 1.4 to 1.6; 2 ranks 1.4 to 2.0 and
2.7 to 4.0, where a layer that gathers takes 1.8 to 2.0 and 3.1 to 3.9. Collectives take 23 to 29 % of it on 2 ranks, 75
to 77 % on 8, which share 2 cores.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
import torch._inductor.config
import torch.distributed as dist
from common import LOCAL, Traffic
from matplotlib.figure import Figure
from torch import Tensor, nn

import syncbn
from syncbn import backends, reference
from syncbn.statistics import Epilogue, OutputMask

SHAPES = [(32, 64, 32, 32), (32, 256, 16, 16), (8, 64, 56, 56), (64, 512, 7, 7)]
WORLD_SHAPE = (32, 256, 16, 16)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
CPU = torch.device("cpu")
COMPILED = "syncbn, torch.compile"
Shape = tuple[int, ...]


def candidates(num_features: int, *, with_compile: bool = True) -> dict[str, nn.Module]:
    """Return the compared layers by name, each with a ReLU."""
    found: dict[str, nn.Module] = {
        f"{name} + ReLU": nn.Sequential(norm(num_features), nn.ReLU()) for name, norm in common.NORMS.items()
    }
    found["syncbn, fused ReLU"] = syncbn.SyncBatchNorm(num_features, activation="relu")
    if with_compile:
        torch._inductor.config.compile_threads = 1  # a pool of processes takes longer to start than this to compile
        layer: Any = torch.compile(syncbn.SyncBatchNorm(num_features, activation="relu"), fullgraph=True, dynamic=False)
        found[COMPILED] = layer
    return found


def inputs(shape: Shape, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Return x and grad_output of this rank."""
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    x, grad_output = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
    return x, grad_output


def check(name: str, layer: nn.Module, x: Tensor, grad_output: Tensor) -> None:
    """Compare one step with the oracle on the batch of all ranks, or on this rank's batch for local layers.

    Raises:
        AssertionError: the results differ, so that a benchmark would be meaningless.
    """
    is_local = name.startswith(LOCAL)
    x_all, grad_all = (part if is_local else common.whole_batch(part) for part in (x, grad_output))
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(grad_output)
    whole = x_all.double().numpy()
    z = reference.batch_norm(whole).output
    gradients = reference.batch_norm_backward(grad_all.double().numpy() * (z > 0), whole)
    rank = 0 if len(z) == len(x) else dist.get_rank()
    own = slice(rank * len(x), (rank + 1) * len(x))
    for actual, expected in ((y.detach(), z.clip(0)[own]), (leaf.grad, gradients.grad_input[own])):
        error = abs(actual.double().numpy() - expected).max()
        assert error < 1e-4, f"{name}: off the oracle by {error:.1e}"
    layer.zero_grad()


def time_ops(shape: Shape, layout: torch.memory_format, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a copy of x and of each op of a layer with ReLU, on this rank."""
    x, grad_output = inputs(shape, layout)
    weight, bias = torch.ones(shape[1]), torch.zeros(shape[1])
    expected = reference.batch_norm(x.double().numpy())
    relu, output_mask = Epilogue(activation="relu"), OutputMask(weight=True, bias=True, dy=False)
    options: dict[str, Any] = {"eps": 0.0, "ranks": 1, "running": None}
    ops: dict[str, Callable[[], Any]] = {"copy": lambda: torch.empty_like(x).copy_(x)}
    for name, backend in (("plain", backends.PLAIN), ("auto", backends.select(x))):
        packed = backend.pack_stats(x, None)
        _, count, channels = backend.normalize(x, packed, weight, bias, relu, **options)
        assert abs(channels.invstd.numpy() ** -2 / expected.var - 1).max() < 1e-6
        operands = (grad_output, x, channels, relu)
        reduced = backend.backward_reduce(*operands, output_mask)
        ops |= {
            f"{name} pack stats": lambda b=backend: b.pack_stats(x, None),
            f"{name} normalize": lambda b=backend, p=packed: b.normalize(x, p, weight, bias, relu, **options),
            f"{name} backward reduce": lambda b=backend, o=operands: b.backward_reduce(*o, output_mask),
            f"{name} backward elemt": lambda b=backend, o=operands, r=reduced, n=count: b.backward_elemt(
                *o, r, count=n
            ),
        }
    return common.in_turns(ops, rounds, CPU)


def time_layers(
    shape: Shape, layout: torch.memory_format, rounds: int, *, with_compile: bool = True
) -> dict[str, float]:
    """Return the median milliseconds of forward and backward by candidate."""
    x, grad_output = inputs(shape, layout)
    layers = candidates(shape[1], with_compile=with_compile)
    for name, layer in layers.items():
        check(name, layer, x, grad_output)
    x.requires_grad_()

    def step(layer: nn.Module) -> None:
        x.grad = None
        layer(x).backward(grad_output)

    steps = {name: lambda layer=layer: step(layer) for name, layer in layers.items()}
    return common.in_turns(steps, rounds, CPU)


def measure_traffic(shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """Return, by candidate: milliseconds of a step and of its collectives, calls, and bytes that this rank passes."""
    x, grad_output = inputs(shape, torch.contiguous_format)
    layers = candidates(shape[1], with_compile=False)  # calls no functions of torch.distributed that are recorded
    for name, layer in layers.items():
        check(name, layer, x, grad_output)
    x.requires_grad_()
    times: dict[str, list[float]] = {name: [] for name in layers}
    traffic: dict[str, list[Traffic]] = {name: [] for name in layers}
    for _ in range(rounds + 1):
        for name, layer in layers.items():
            x.grad = None
            with Traffic() as record:
                times[name].append(common.milliseconds(lambda layer=layer: layer(x).backward(grad_output), CPU))
            traffic[name].append(record)
    return [
        {
            "candidate": name,
            "ms": statistics.median(times[name][1:]),
            "collectives_ms": statistics.median(sum(record.seconds) * 1e3 for record in traffic[name][1:]),
            "calls": len(traffic[name][-1].sizes),
            "bytes": sum(traffic[name][-1].sizes),
        }
        for name in layers
    ]


def for_each_case(measure: Any, shapes: list[Shape], rounds: int) -> list[tuple[Shape, str, dict[str, float]]]:
    """Return the result of `measure` for each shape and layout."""
    return [(shape, name, measure(shape, layout, rounds)) for shape in shapes for name, layout in LAYOUTS.items()]


def report_cases(title: str, cases: list, unit: str, path: Path, ranks: int) -> None:
    """Print the times relative to that of `unit`, with their mean, and append rows."""
    names = [name for name in cases[0][2] if name != unit]
    ratios = [{name: found[name] / found[unit] for name in names} for _, _, found in cases]
    table = [
        [_text(shape), layout, f"{found[unit]:.2f}", *(f"{ratio[name]:.2f}x" for name in names)]
        for (shape, layout, found), ratio in zip(cases, ratios, strict=True)
    ]
    table.append(["mean", "", "", *(f"{statistics.mean(r[name] for r in ratios):.2f}x" for name in names)])
    common.print_table(title, ["shape per rank", "layout", f"{unit}, ms", *names], table)
    common.append_rows(
        path,
        [
            {**common.head(), "ranks": ranks, "shape": _text(shape), "layout": layout, "candidate": name,
             "ms": ms, "ratio": ms / found[unit]}
            for shape, layout, found in cases for name, ms in found.items()
        ],
    )  # fmt: skip


def report_traffic(shape: Shape, by_ranks: dict[int, list[dict[str, Any]]], path: Path) -> None:
    """Print the layer by number of ranks and append rows."""
    rows = [{**common.head(), "ranks": ranks, "shape": _text(shape), **found}
            for ranks, all_found in by_ranks.items() for found in all_found]  # fmt: skip
    table = [
        [r["candidate"], str(r["ranks"]), f"{r['ms']:.1f}", f"{r['collectives_ms'] / r['ms']:.0%}", str(r["calls"]),
         str(r["bytes"])]
        for r in sorted(rows, key=lambda r: list(candidates(1, with_compile=False)).index(r["candidate"]))
    ]  # fmt: skip
    columns = ["candidate", "ranks", "ms", "in collectives", "calls", "bytes per rank"]
    common.print_table(f"one layer, forward + backward, {_text(shape)} per rank", columns, table)
    common.append_rows(path, rows)


def draw(layers: list[dict[str, Any]], worlds: list[dict[str, Any]], path: Path) -> None:
    """Draw the mean ratio to the local layer, and the time by number of ranks, split into collectives and the rest.

    Args:
        layers, worlds: rows of layer_cpu.csv and world_cpu.csv.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    unit = f"{LOCAL} + ReLU"
    ranks_found = list(dict.fromkeys(row["ranks"] for row in layers))
    names = [name for name in dict.fromkeys(row["candidate"] for row in layers) if name != unit]
    width = 0.8 / len(ranks_found)
    for index, ranks in enumerate(ranks_found):
        ratios = {name: [r["ratio"] for r in layers if (r["ranks"], r["candidate"]) == (ranks, name)] for name in names}
        positions = [place + (index - (len(ranks_found) - 1) / 2) * width for place in range(len(names))]
        means = [statistics.mean(ratios[name]) for name in names]
        gray = f"{0.35 + 0.4 * index / max(1, len(ranks_found) - 1):.2f}"
        bars = left.barh(positions, means, width, color=gray, label=f"{ranks} rank{'s' * (ranks > 1)}")
        left.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    left.set(title="One layer, mean over shapes and layouts", xlabel=f"time / ({unit})", yticks=range(len(names)))
    left.set_yticklabels(names)
    left.invert_yaxis()
    left.axvline(1, color="black", linewidth=0.8)
    left.legend(frameon=False)
    columns = list(dict.fromkeys(row["candidate"] for row in worlds))
    places = list(dict.fromkeys(row["ranks"] for row in worlds))
    width = 0.8 / len(columns)
    for index, name in enumerate(columns):
        found = [row for row in worlds if row["candidate"] == name]
        positions = [places.index(r["ranks"]) + (index - (len(columns) - 1) / 2) * width for r in found]
        own = [row["ms"] - row["collectives_ms"] for row in found]
        right.bar(positions, own, width, color=common.COLOURS[index], label=name)
        right.bar(positions, [r["collectives_ms"] for r in found], width, own, color=common.COLOURS[index], alpha=0.4)
    right.set(title="By number of ranks; pale: in collectives", xlabel="ranks", ylabel="ms, forward + backward")
    right.set_xticks(range(len(places)), map(str, places))
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(common.origin(worlds), fontsize=9)
    for axes in (left, right):
        common.tidy(axes)
    common.save(figure, path)


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def main(argv: list[str] | None = None) -> None:
    """Measure the requested parts."""
    parser = common.parser(__doc__, "layer_cpu")
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--parts", nargs="+", choices=["ops", "layer", "world"], default=["ops", "layer", "world"])
    parser.add_argument("--ranks", type=int, nargs="+", help="if not given, 1 2 for layer and 1 2 4 8 for world")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile(layer)")
    parser.add_argument("--shapes", type=common.sizes, nargs="+", default=SHAPES, help="such as 32x64x32x32")
    parser.add_argument("--world-shape", type=common.sizes, default=WORLD_SHAPE)
    arguments = parser.parse_args(argv)
    shapes, rounds, versions = arguments.shapes, arguments.rounds, f"float32, torch {torch.__version__}"
    worlds_csv = arguments.csv.with_name("world_cpu.csv")
    if arguments.draw:
        return draw(common.last_run(arguments.csv), common.last_run(worlds_csv), arguments.plot)
    cases, by_ranks = {}, {}
    if "ops" in arguments.parts:
        found = common.on_ranks(1, for_each_case, time_ops, shapes, rounds)
        report_cases(f"ops, {versions}", found, "copy", arguments.csv.with_name("ops_cpu.csv"), 1)
    if "layer" in arguments.parts:
        measure = partial(time_layers, with_compile=not arguments.no_compile)
        for ranks in arguments.ranks or [1, 2]:
            cases[ranks] = common.on_ranks(ranks, for_each_case, measure, shapes, rounds)
            title = f"forward + backward, {ranks} rank(s), {versions}"
            report_cases(title, cases[ranks], f"{LOCAL} + ReLU", arguments.csv, ranks)
    if "world" in arguments.parts:
        for ranks in arguments.ranks or [1, 2, 4, 8]:
            by_ranks[ranks] = common.on_ranks(ranks, measure_traffic, arguments.world_shape, rounds)
        report_traffic(arguments.world_shape, by_ranks, worlds_csv)
    if cases and by_ranks:
        draw(common.last_run(arguments.csv), common.last_run(worlds_csv), arguments.plot)


if __name__ == "__main__":
    main()
