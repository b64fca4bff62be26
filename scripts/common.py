"""Shared by the benchmarks: the formulations they compare, ranks, interleaved timing, and output of results."""

import argparse
import ast
import csv
import ctypes
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also runs from a checkout that is not installed

import syncbn  # noqa: E402

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of mallopt

BENCHMARKS = ROOT / "benchmarks"
DOCS = ROOT / "docs"
COLOURS = ["#4477AA", "#EE6677", "#228833", "#CCBB44", "#AA3377", "#66CCEE"]  # Paul Tol's bright palette
TIMEOUT = timedelta(seconds=120)


class MeanOfSquares(nn.BatchNorm2d):
    """SyncBatchNorm as E[x^2] - E[x]^2 through autograd: the formulation of most Python implementations."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input; one differentiable all-reduce of 2C numbers in the dtype of the parameters.

        Every rank must have the same number of values per channel.
        """
        values = x.to(self.weight.dtype)
        moments = torch.cat([values.mean((0, 2, 3)), values.square().mean((0, 2, 3))])
        moments = (dist_nn.all_reduce(moments) if dist.is_initialized() else moments) / _world_size()
        mean, square = moments.chunk(2)
        var = square - mean.square()
        _update_running_(self, mean, var, x.numel() // x.shape[1] * _world_size())
        scale = self.weight * (var + self.eps).rsqrt()
        return (values * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]).to(x.dtype)


class AllGather(nn.BatchNorm2d):
    """SyncBatchNorm with the operations of `torch.nn.SyncBatchNorm`, whose own kernels exist only for CUDA.

    Forward gathers mean, invstd and count of every rank in the dtype of the parameters; backward reduces two sums.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input."""
        y, mean, var, count = _AllGatherFunction.apply(x, self.weight, self.bias, self.eps)
        _update_running_(self, mean, var, count)
        return y


class _AllGatherFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        values, count = x.to(weight.dtype), x.numel() // x.shape[1]
        mean = values.mean((0, 2, 3))
        var = (values - mean[:, None, None]).square().mean((0, 2, 3))
        packed = torch.cat([mean, (var + eps).rsqrt(), mean.new_full((1,), count)])
        gathered = [torch.empty_like(packed) for _ in range(_world_size())]
        if len(gathered) > 1:
            dist.all_gather(gathered, packed)
        else:
            gathered = [packed]
        means, invstds, counts = torch.stack(gathered).split([x.shape[1], x.shape[1], 1], 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (counts * (invstds**-2 - eps + (means - mean).square())).sum(0) / total
        invstd = (var + eps).rsqrt()
        scale = weight * invstd
        ctx.save_for_backward(x, weight, mean, invstd, total)
        ctx.mark_non_differentiable(mean, var, total)
        y = (values - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]
        return y.to(x.dtype), mean, var, total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd, total = ctx.saved_tensors
        dy, centred = grad_output.to(weight.dtype), x.to(weight.dtype) - mean[:, None, None]
        sum_dy, sum_dy_xmu = dy.sum((0, 2, 3)), (dy * centred).sum((0, 2, 3))
        sums = syncbn.collectives.all_reduce_(torch.cat([sum_dy, sum_dy_xmu]), None)
        mean_dy, mean_dy_xmu = (part[:, None, None] / total for part in sums.chunk(2))
        slope = (invstd**2)[:, None, None] * mean_dy_xmu
        grad_input = (dy - mean_dy - centred * slope) * (weight * invstd)[:, None, None]
        return grad_input.to(x.dtype), sum_dy_xmu * invstd, sum_dy, None


def _update_running_(layer: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    with torch.no_grad():
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(var * (count / (count - 1)), layer.momentum)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


LOCAL = "local BN"
NORMS: dict[str, Callable[[int], nn.Module]] = {
    LOCAL: nn.BatchNorm2d,
    "syncbn": syncbn.SyncBatchNorm,
    "all-gather": AllGather,
    "mean of squares": MeanOfSquares,
}


def norms(device: torch.device) -> dict[str, Callable[[int], nn.Module]]:
    """Return the formulations that run on the device, by name; call each with the number of channels."""
    return NORMS | ({"torch SyncBN": nn.SyncBatchNorm} if device.type == "cuda" else {})


def whole_batch(part: Tensor) -> Tensor:
    """Return the concatenated parts of all ranks, which must be of equal size."""
    if _world_size() == 1:
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


class Traffic:
    """Records, while active, the collectives that this rank calls through `torch.distributed`.

    Attributes:
        sizes: bytes that this rank passes to each call, in order.
        seconds: time until each call returned, including the wait for slower ranks. On an accelerator, the time to
            enqueue it.
    """

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_single")

    def __enter__(self) -> "Traffic":
        self.sizes: list[int] = []
        self.seconds: list[float] = []
        self._is_inside = False  # whether a recorded function is running; it may call another
        self._originals = {name: getattr(dist, name) for name in self.NAMES if hasattr(dist, name)}
        for name, original in self._originals.items():
            setattr(dist, name, self._measured(name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _measured(self, name: str, original: Callable) -> Callable:
        def measured(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            if self._is_inside:
                return original(*args, async_op=async_op, **kwargs)
            self.sizes.append((args[0] if name == "all_reduce" else args[1]).nbytes)
            self._is_inside, start = True, time.perf_counter()
            try:
                work = original(*args, async_op=async_op, **kwargs)
            finally:
                self._is_inside = False
            self.seconds.append(time.perf_counter() - start)
            return _MeasuredWork(work, self.seconds) if async_op else work

        return measured


class _MeasuredWork:
    def __init__(self, work: Any, seconds: list[float]) -> None:
        self._work, self._seconds, self._index = work, seconds, len(seconds) - 1

    def wait(self, *args: Any) -> Any:
        start = time.perf_counter()
        result = self._work.wait(*args)
        self._seconds[self._index] += time.perf_counter() - start
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def device_of(name: str) -> torch.device:
    """Return the device of this rank; on cuda each rank has a different one."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.device("cuda", rank) if name == "cuda" else torch.device(name)


def milliseconds(step: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call, which starts after a barrier of all ranks."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if _world_size() > 1:
        dist.barrier()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def in_turns(
    steps: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
) -> dict[str, float]:
    """Return the median milliseconds of each step; the steps alternate, and the first round is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name, step in steps.items():
            duration = milliseconds(step, device)
            if index > 0:
                times[name].append(duration)
    return {name: statistics.median(values) for name, values in times.items()}


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system, as in the steady state of a training run.

    Otherwise it is random which candidate pays for new pages, which cost several times as much as normalizing them.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def on_ranks(ranks: int, fn: Callable, *args: Any, device: str = "cpu") -> Any:
    """Return what `fn(*args)` returns on rank 0 of `ranks` fresh processes with one thread each.

    One rank runs in this process, without a process group.

    Args:
        ranks: number of ranks, with gloo on CPU, or NCCL on cuda, which needs a device for each.
        fn: a module-level function.
    """
    if device == "cuda" and torch.cuda.device_count() < ranks:
        found = torch.cuda.device_count()
        raise SystemExit(f"expected a GPU for each of {ranks} ranks, got {found}: lower --ranks or use --device cpu")
    if ranks == 1:
        keep_freed_memory()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return fn(*args)
        finally:
            torch.set_num_threads(threads)
    forkserver.set_forkserver_preload(["torch", "syncbn", "torchvision", "matplotlib.figure", "rich"])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _run_rank, (ranks, folder, device, fn, args), nprocs=ranks, start_method="forkserver"
        )
        return pickle.loads(Path(folder, "result").read_bytes())


def _run_rank(rank: int, ranks: int, folder: str, device: str, fn: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=TIMEOUT,
    )
    result = fn(*args)
    if rank == 0:
        Path(folder, "result").write_bytes(pickle.dumps(result))
    dist.barrier()  # no rank exits while another still communicates with it
    dist.destroy_process_group()


def parser(doc: str, name: str, draws: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark.

    Args:
        name: of its CSV and its picture.
        draws: whether it has a picture.
    """
    result = argparse.ArgumentParser(description=doc.split("\n")[0])
    result.add_argument("--csv", type=Path, default=BENCHMARKS / f"{name}.csv", help="rows are appended there")
    if draws:
        result.add_argument("--plot", type=Path, default=DOCS / f"{name}.png")
        result.add_argument("--draw", action="store_true", help="draw the last run in the CSV, without measuring")
    return result


def sizes(text: str) -> tuple[int, ...]:
    """Return (2, 3, 4) for 2x3x4."""
    return tuple(int(size) for size in text.split("x"))


def head(device: str = "cpu") -> dict[str, Any]:
    """Return the first columns of every row: commit, device and torch version."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{_processor()}, {os.cpu_count()} cores"
    return {"commit": _commit(), "device": name, "torch": torch.__version__}


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows to a CSV, floats with five digits.

    Raises:
        SystemExit: the file has different columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    if path.exists():
        with path.open(newline="") as file:
            found = next(csv.reader(file))
        if found != columns:
            raise SystemExit(f"expected the columns {columns} in {path}, got {found}: move the file away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV, numbers as numbers."""
    with path.open(newline="") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def last_run(path: Path) -> list[dict[str, Any]]:
    """Return the rows of the last run that was appended to a CSV."""
    rows = read_rows(path)
    return [row for row in rows if row["commit"] == rows[-1]["commit"]]


def origin(rows: Sequence[dict[str, Any]]) -> str:
    """Return where the rows come from: device, torch and commit."""
    return f"{rows[0]['device']}, torch {rows[0]['torch']}, commit {rows[0]['commit']}"


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}.get(text, text)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, which is also valid Markdown."""
    table = Table(box=MARKDOWN, title=title, title_justify="left", min_width=60)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


def tidy(axes: Any) -> None:
    """Apply this repository's style to the axes of a picture."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plain_log(axes: Any, which: str, ticks: Sequence[float], base: float = 2) -> None:
    """Make an axis logarithmic, with these values written out.

    Args:
        which: "x" or "y".
    """
    getattr(axes, f"set_{which}scale")("log", base=base)
    axis = getattr(axes, f"{which}axis")
    axis.set_ticks(list(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def save(figure: Any, path: Path) -> None:
    """Write a picture and print its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(path)


def _commit() -> str:
    """Return the commit, marked "-dirty" if code, not only results, differs from it."""
    code = ["syncbn", "train", "scripts"]
    answers = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", *code]):
        done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        answers.append(done.stdout.strip())
    commit, changes = answers
    return (commit or "unknown") + ("-dirty" if changes else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.machine()
