"""How close to the device's bandwidth is BatchNorm + ReLU, forward and backward, and how far ahead of torch's kernels?

    python scripts/bench_kernels.py                                            # all shapes on one CUDA device
    python scripts/bench_kernels.py --shapes 64x2048x7x7 --dtypes bfloat16 --rounds 50
    python scripts/bench_kernels.py --tune                                     # block sizes instead of candidates

Candidates alternate in one run, each with forward and backward:

- a copy of as many bytes as batch normalization must move (x twice and y; x and grad_output twice and grad_input);
- local batch_norm of cuDNN/ATen + ReLU;
- the kernels of torch.nn.SyncBatchNorm + ReLU;
- torch.compile of our plain backend;
- our kernels with a separate and with a fused ReLU.

Each is first checked against the formulas in float64; an inexact one that is not ours is named and timed. `kernel`
times are replays of CUDA graphs, so device time only; `eager` times include kernel launches. The L2 cache is flushed
before each. Rows are appended to benchmarks/kernels_gpu.csv.

Last answer (NVIDIA H200, torch 2.11.0, Triton 3.6.0, 664a4f9): device time with a fused ReLU 0.04 to 0.68 of torch's
SyncBatchNorm + ReLU, 0.67 to 1.9 of a copy. Launched one by one from Python, layers below 200 us of device time take up
to 5 times as long as torch's.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also runs from a checkout that is not installed

import syncbn  # noqa: E402
from syncbn.backends import triton_launch  # noqa: E402
from syncbn.statistics import Epilogue, OutputMask, Running  # noqa: E402

SHAPES = [
    (32, 64, 112, 112), (128, 64, 56, 56), (32, 256, 56, 56), (64, 512, 28, 28), (64, 1024, 14, 14), (64, 2048, 7, 7),
    (1, 32, 192, 192, 192), (4096, 2048),
]  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COPY, TORCH_SYNC, OURS = "copy", "torch SyncBN + ReLU", "ours, fused"
EPS = 1e-5
RELU = Epilogue(activation="relu")
BOTH_PARAMETERS = OutputMask(weight=True, bias=True, dy=False)
MAX_ERROR = 1e-4
FLUSH_BYTES = 2**28
TENSORS_MOVED = 8  # activations read and written: 3 forward, 5 backward
COMPILE_SHARE = 0.6  # of the time budget; later cases skip torch.compile, as 32 cases compile for minutes
TUNED = [  # TILE_ELEMENTS, TILE_WARPS, TILE_STAGES
    (4096, 8, 1), (2048, 8, 1), (2048, 4, 1), (8192, 8, 1), (4096, 4, 1), (4096, 8, 3), (2048, 8, 3), (2048, 4, 4),
]  # fmt: skip

Step = Callable[[], tuple[Tensor, Tensor]]


class Case(NamedTuple):
    """One point of the benchmark."""

    shape: tuple[int, ...]
    dtype: str
    layout: str

    def tensors(self, device: str) -> tuple[Tensor, Tensor]:
        """Return x and grad_output."""
        torch.manual_seed(0)
        x, grad_output = (torch.randn(self.shape, device=device, dtype=DTYPES[self.dtype]) for _ in range(2))
        x.add_(1)
        if self.layout == "channels_last":
            x, grad_output = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, grad_output))
        return x, grad_output


def cases(shapes: list[tuple[int, ...]], dtypes: list[str]) -> list[Case]:
    """Return every case; two-dimensional activations have one layout."""
    layouts = ("contiguous", "channels_last")
    return [
        Case(shape, dtype, layout)
        for shape in shapes
        for dtype in dtypes
        for layout in layouts
        if len(shape) > 2 or layout == "contiguous"
    ]


def candidates(x: Tensor, grad_output: Tensor, *, with_compile: bool) -> dict[str, Step]:
    """Return the compared steps by name; each returns the output and the gradient of x."""
    C = x.shape[1]
    source = x.new_empty(TENSORS_MOVED // 2 * x.numel())
    target = torch.empty_like(source)
    found: dict[str, Step] = {
        COPY: lambda: (target.copy_(source), target),
        "local batch_norm + ReLU": _through_autograd(_Local(C).to(x.device), x, grad_output),
    }
    if x.is_cuda:
        found[TORCH_SYNC] = _torch_sync_sequence(x, grad_output)
    if with_compile:
        layer = syncbn.SyncBatchNorm(C, activation="relu", device=x.device)
        found["torch.compile of plain"] = _through_autograd(torch.compile(layer, dynamic=False), x, grad_output)
    unfused = nn.Sequential(syncbn.SyncBatchNorm(C), nn.ReLU()).to(x.device)
    found["ours + ReLU"] = _through_autograd(unfused, x, grad_output)
    found[OURS] = _our_sequence(x, grad_output)
    found["ours, fused, layer"] = _through_autograd(
        syncbn.SyncBatchNorm(C, activation="relu", device=x.device), x, grad_output
    )
    return found


class _Local(nn.Module):
    """Local batch normalization of any number of dimensions, then ReLU."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(num_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations."""
        norm = self.norm
        y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1, EPS)
        return F.relu(y)


def _through_autograd(layer: Callable[[Tensor], Tensor], x: Tensor, grad_output: Tensor) -> Step:
    leaf = x.detach().requires_grad_()
    parameters = list(layer.parameters())  # type: ignore[attr-defined]

    def step() -> tuple[Tensor, Tensor]:
        y = layer(leaf)
        return y.detach(), torch.autograd.grad(y, [leaf, *parameters], grad_output)[0]

    return step


def _torch_sync_sequence(x: Tensor, grad_output: Tensor) -> Step:
    """Return the kernels of torch.nn.SyncBatchNorm, without its collectives and its host-device synchronization."""
    C = x.shape[1]
    weight, bias, running_mean, running_var = (
        torch.full((C,), value, device=x.device) for value in (1.0, 0.0, 0.0, 1.0)
    )

    def step() -> tuple[Tensor, Tensor]:
        mean, invstd = torch.batch_norm_stats(x, EPS)
        count = torch.full((1,), x.numel() // C, dtype=mean.dtype, device=x.device)
        gathered = torch.cat([mean, invstd, count]).view(1, -1)
        means, invstds, counts = torch.split(gathered, C, dim=1)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x, means, invstds, running_mean, running_var, 0.1, EPS, counts.view(-1)
        )
        y = F.relu(torch.batch_norm_elemt(x, weight, bias, mean, invstd, EPS))
        dy = torch.ops.aten.threshold_backward(grad_output, y, 0)
        sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(dy, x, mean, invstd, weight, True, True, True)
        sum_dy, sum_dy_xmu = torch.split(torch.cat([sum_dy, sum_dy_xmu]), C)
        total = counts.to(torch.int32)
        return y, torch.batch_norm_backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, total)

    return step


def _our_sequence(x: Tensor, grad_output: Tensor) -> Step:
    """Return the kernel launches of a synchronized layer, without its collectives."""
    C = x.shape[1]
    weight, bias, running_mean, running_var = (
        torch.full((C,), value, device=x.device) for value in (1.0, 0.0, 0.0, 1.0)
    )
    batches = torch.zeros((), dtype=torch.int64, device=x.device)
    running = Running(running_mean, running_var, batches, 0.1)

    def step() -> tuple[Tensor, Tensor]:
        packed = triton_launch.pack_stats(x, None)
        y, count, channels = triton_launch.normalize(x, packed, weight, bias, RELU, eps=EPS, ranks=1, running=running)
        reduced = triton_launch.backward_reduce(grad_output, x, channels, RELU, BOTH_PARAMETERS)
        return y, triton_launch.backward_elemt(grad_output, x, channels, RELU, reduced, count=count)

    return step


def check(steps: dict[str, Step], x: Tensor, grad_output: Tensor) -> dict[str, str]:
    """Compare one step of each candidate with the formulas in float64, channel by channel to save memory.

    Values next to the kink of the ReLU are excluded: their sign depends on rounding.

    Returns:
        What is wrong with candidates that are not ours, by name.

    Raises:
        AssertionError: a step of ours is wrong.
    """
    results = {name: step() for name, step in steps.items() if name != COPY}
    rounding = torch.finfo(x.dtype).eps
    faults: dict[str, str] = {}
    for channel in {0, x.shape[1] // 2, x.shape[1] - 1}:
        own = x[:, channel].double()
        centred = own - own.mean()
        normalized = centred * (centred.square().mean() + EPS).rsqrt()
        dy = grad_output[:, channel].double() * (normalized > 0)
        invstd = (centred.square().mean() + EPS).rsqrt()
        grad_input = invstd * (dy - dy.mean() - normalized * (dy * normalized).mean())
        smooth = normalized.abs() > 8 * rounding
        for name, (y, grad) in results.items():
            for kind, actual, expected in (("output", y, normalized.relu()), ("gradient", grad, grad_input)):
                excess = (actual[:, channel].double() - expected).abs() - 2 * rounding * expected.abs()
                error = (excess * smooth).max().item()
                if not error < MAX_ERROR:
                    faults.setdefault(name, f"{name}: {kind} of channel {channel} is {error:.1e} off beyond rounding")
    ours = [fault for name, fault in faults.items() if name.startswith("ours")]
    assert not ours, "; ".join(ours)
    return faults


def captured(step: Step) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of the step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(steps: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, float]:
    """Return the median time of each candidate; they alternate, each after a flush of the cache."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    if device == "cpu":
        for _ in range(rounds):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                times[name].append((time.perf_counter() - start) * 1e3)
        return {name: statistics.median(values) for name, values in times.items()}
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in steps}
    for _ in range(rounds + 2):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            step()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    for name, pairs in events.items():
        times[name] = [start.elapsed_time(end) for start, end in pairs[2:]]  # the first two warm up
    return {name: statistics.median(values) for name, values in times.items()}


def measure(case: Case, device: str, rounds: int, *, with_compile: bool) -> dict[str, dict[str, float]]:
    """Return milliseconds by mode and candidate."""
    x, grad_output = case.tensors(device)
    if with_compile:
        torch._dynamo.reset()  # Dynamo stops compiling a function after a few shapes
    steps = candidates(x, grad_output, with_compile=with_compile)
    for fault in check(steps, x, grad_output).values():  # timed all the same: its kernels do their work
        print(f"  inexact: {fault}")
    found = {"eager": milliseconds(dict(steps), device, rounds)}
    if device != "cpu":
        found["kernel"] = milliseconds({name: captured(step) for name, step in steps.items()}, device, rounds)
    return found


def tune(case: Case, device: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of each of our kernels (with its merge) by block size."""
    x, grad_output = case.tensors(device)
    names = ("TILE_ELEMENTS", "TILE_WARPS", "TILE_STAGES")
    chosen = [getattr(triton_launch, name) for name in names]
    steps: dict[str, Step] = {COPY: candidates(x, grad_output, with_compile=False)[COPY]}
    weight, bias = torch.ones(2, x.shape[1], device=x.device).unbind()
    replays: dict[str, Callable[[], Any]] = {}
    try:
        for setting in (None, *TUNED):
            if setting is not None:
                for name, value in zip(names, setting, strict=True):
                    setattr(triton_launch, name, value)
                triton_launch.plan.cache_clear()
                check({"ours": _our_sequence(x, grad_output)}, x, grad_output)
                packed = triton_launch.pack_stats(x, None)
                count, channels = triton_launch.gather_stats(packed, weight, bias, eps=EPS, ranks=1, running=None)
                operands = (grad_output, x, channels, RELU)
                reduced = triton_launch.backward_reduce(*operands, BOTH_PARAMETERS)
                label = "/".join(map(str, setting))
                steps = {
                    f"{label} stats": lambda: triton_launch.pack_stats(x, None),
                    f"{label} elemt": lambda c=channels: triton_launch.elemt(x, c, RELU),
                    f"{label} reduce": lambda o=operands: triton_launch.backward_reduce(*o, BOTH_PARAMETERS),
                    f"{label} backward elemt": lambda o=operands, r=reduced, n=count: triton_launch.backward_elemt(
                        *o, r, count=n
                    ),
                }
            replays |= {name: step if device == "cpu" else captured(step) for name, step in steps.items()}
    finally:
        for name, value in zip(names, chosen, strict=True):
            setattr(triton_launch, name, value)
        triton_launch.plan.cache_clear()
    return {"kernel": milliseconds(replays, device, rounds)}


def report(case: Case, found: dict[str, dict[str, float]]) -> list[str]:
    """Return the lines of a table: milliseconds, bandwidth relative to the copy, speed relative to torch's SyncBN."""
    megabytes = torch.Size(case.shape).numel() * DTYPES[case.dtype].itemsize / 1e6
    lines = [f"{'x'.join(map(str, case.shape))} {case.dtype} {case.layout} ({megabytes:.0f} MB)"]
    for mode, times in found.items():
        for name, value in times.items():
            speed = f"{times[TORCH_SYNC] / value:6.2f}x torch SyncBN" if TORCH_SYNC in times else ""
            lines.append(f"  {mode:7}{name:26}{value:9.4f} ms{times[COPY] / value:7.0%} of copy  {speed}")
    return lines


def summary(results: list[tuple[Case, dict[str, dict[str, float]]]]) -> list[str]:
    """Return the results with their bars: speed against torch's SyncBN, share of the copy's bandwidth from 64 MB."""
    modes = [mode for mode in ("kernel", "eager") if results and mode in results[0][1]]
    lines = []
    for mode in modes:
        times = [(case, found[mode]) for case, found in results]
        if all(TORCH_SYNC in own for _, own in times):
            ratios = [own[TORCH_SYNC] / own[OURS] for _, own in times]
            lines.append(
                f"{mode}: {statistics.geometric_mean(ratios):.2f}x torch's SyncBN + ReLU on average, "
                f"{min(ratios):.2f}x at least (bars: 1.5x, 1.0x)"
            )
        large = [own[COPY] / own[OURS] for case, own in times if _bytes(case) >= 64e6]
        if large:
            lines.append(f"{mode}: {min(large):.0%} of the copy's bandwidth at least from 64 MB on (bar: 85 %)")
    return lines


def _bytes(case: Case) -> int:
    return torch.Size(case.shape).numel() * DTYPES[case.dtype].itemsize


def append(rows: list[dict[str, Any]], path: Path) -> None:
    """Append rows to a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def versions(device: str) -> dict[str, str]:
    """Return commit, device and versions; without a repository the commit comes from the variable GIT_COMMIT."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        commit = ""
    import triton

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {
        "commit": commit or os.environ.get("GIT_COMMIT", "unknown"),
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def run(arguments: argparse.Namespace) -> list[str]:
    """Measure every case, print its table and append its rows; return the summary."""
    device, started, results = arguments.device, time.monotonic(), []
    head = versions(device)
    print(", ".join(f"{name} {value}" for name, value in head.items()), flush=True)
    for case in cases(arguments.shapes or SHAPES, arguments.dtypes):
        elapsed = time.monotonic() - started
        if elapsed > arguments.budget_s:
            print(f"skipped, the time budget is spent: {case}")
            continue
        with_compile = device != "cpu" and elapsed < COMPILE_SHARE * arguments.budget_s
        if arguments.tune:
            found = tune(case, device, arguments.rounds)
        else:
            found = measure(case, device, arguments.rounds, with_compile=with_compile)
            results.append((case, found))
        print("\n".join(report(case, found)), flush=True)
        rows = [
            {**head, "shape": "x".join(map(str, case.shape)), "dtype": case.dtype, "layout": case.layout, "mode": mode,
             "candidate": name, "ms": f"{value:.5f}", "of_copy": f"{times[COPY] / value:.4f}",
             "of_torch_syncbn": f"{times[TORCH_SYNC] / value:.4f}" if TORCH_SYNC in times else ""}
            for mode, times in found.items()
            for name, value in times.items()
        ]  # fmt: skip
        append(rows, arguments.csv)
        if device == "cuda":
            torch.cuda.empty_cache()
    lines = summary(results)
    print("\n".join(lines))
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", type=lambda text: tuple(map(int, text.split("x"))))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget-s", type=float, default=330)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: Triton's interpreter, a dry run"
    )
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "kernels_gpu.csv")
    parser.add_argument("--tune", action="store_true", help="compare block sizes of our kernels")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("expected a CUDA device, got none: run this on a machine with a GPU")
    run(options)
