"""How many bytes does each kind of normalization save for backward, and how many does a training step allocate at most?

    python scripts/bench_memory.py                # under a minute; no timing, so it may share the machine
    python scripts/bench_memory.py --device cuda --batch 32 --image 224             # the networks on a GPU

Kept is the size of the distinct storages that autograd saves, without parameters and buffers. For one layer, in units
of its input:

- for normalization + ReLU alone, including its input;
- between two convolutions, which save their inputs anyway; the residual is the input of the first.

For whole networks in float32, kept, and the peak of a step: the most that forward, backward and SGD with momentum have
allocated at one time, gradients included, above what is allocated before the step (parameters, buffers, momentum and
images). On CPU, allocations are those that PyTorch's profiler records; memory that libraries allocate themselves is not
among them. "Fused" is a layer with a fused ReLU, and a network with norm, ReLU and convolutions as one unit.

The normalization's parameters are always float32. Rows are appended to benchmarks/memory.csv and memory_networks.csv;
tables in docs/performance.md.

Last answer (CPU, torch 2.14.1, a5779bf): units keep 0.54 (PreAct-ResNet-50), 0.85 (ResNet-50) and 0.55 (DenseNet-121)
of what the modules keep; the peak is 0.91, 0.96 and 0.66 of theirs. One layer: 2 tensors like the input as local
BatchNorm2d + ReLU, 1 with a fused ReLU.
"""

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import common
import torch
from networks import FUSED, LOCAL_FUSED, Candidate, candidates, training_step
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import syncbn

CASES = ["alone", "alone, residual", "between convolutions", "between convolutions, residual"]
NETWORKS = ["preact50", "resnet50", "densenet121"]
UNFUSED = "syncbn"  # the unit of the networks' ratios


class NormReLU(nn.Module):
    """relu(norm(x) + residual), in one call if the norm fuses it."""

    def __init__(self, norm: nn.Module, *, fused: bool) -> None:
        super().__init__()
        self.norm, self.fused = norm, fused

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the activated output."""
        if self.fused:
            return self.norm(x, residual)
        y = self.norm(x)
        return (y if residual is None else y + residual).relu()


class BetweenConvolutions(nn.Module):
    """conv2(relu(norm(conv1(x)))), with `residual` conv2(relu(norm(conv1(x)) + x))."""

    def __init__(self, tail: NormReLU, num_channels: int, dtype: torch.dtype, *, residual: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(num_channels, num_channels, 1, bias=False, dtype=dtype) for _ in range(2))
        self.tail, self.residual = tail, residual

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the second convolution."""
        return self.conv2(self.tail(self.conv1(x), x if self.residual else None))


def saved_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Return the size of all storages that a forward pass saves for backward, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*inputs)
    return sum(storage.nbytes() for storage in storages.values())


def formulations() -> dict[str, Callable[[int], NormReLU]]:
    """Return the compared formulations by name; call each with the number of channels."""
    separate: dict[str, Callable[[int], NormReLU]] = {
        name: lambda num_channels, norm=norm: NormReLU(norm(num_channels), fused=False)
        for name, norm in common.NORMS.items()
    }
    return separate | {FUSED: lambda n: NormReLU(syncbn.SyncBatchNorm(n, activation="relu"), fused=True)}


def measure(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """Return the bytes by formulation and case, for activations of the dtype."""
    x, residual = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    found = {}
    for name, tail in formulations().items():
        modules: list[tuple[nn.Module, list[Tensor]]] = [
            (tail(shape[1]), [x]),
            (tail(shape[1]), [x, residual]),
            (BetweenConvolutions(tail(shape[1]), shape[1], dtype, residual=False), [x]),
            (BetweenConvolutions(tail(shape[1]), shape[1], dtype, residual=True), [x]),
        ]
        found[name] = {case: saved_bytes(module, *args) for case, (module, args) in zip(CASES, modules, strict=True)}
    return found


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that one call has allocated at one time, above what is allocated before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = _allocations(profiler)
    assert changes, "expected the trace of torch.profiler to have [memory] events, got none: has it changed?"
    return max(accumulate(changes))


def _allocations(profiler: profile) -> list[int]:
    """Return the bytes of each allocation, negative when it is freed, in the order of time.

    The format of the trace is not documented. If it changes, the tests of the peak in tests/test_scripts.py fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    allocations = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return [event["args"]["Bytes"] for event in allocations]


def measure_networks(networks: list[str], batch: int, image: int, device: torch.device) -> list[dict[str, Any]]:
    """Return the bytes that each network keeps for backward, and the peak of a training step, by candidate."""
    compared = candidates(device) | {LOCAL_FUSED: Candidate(syncbn.BatchNorm, is_fused=True)}
    images = torch.randn(batch, 3, image, image, device=device)
    found: list[dict[str, Any]] = []
    for network in networks:
        sizes = {}
        for name, candidate in compared.items():
            model = candidate.network(network, device)
            kept = saved_bytes(model, images)
            step = training_step(model, batch, image, device)
            step()  # creates momentum, and what libraries create once
            model.zero_grad()
            sizes[name] = kept, peak_bytes(step, device)
        found += [
            {"network": network, "candidate": name, "kept": kept, "peak": peak,
             "kept_ratio": kept / sizes[UNFUSED][0], "peak_ratio": peak / sizes[UNFUSED][1]}
            for name, (kept, peak) in sizes.items()
        ]  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure, print and append rows."""
    parser = common.parser(__doc__, "memory", draws=False)
    parser.add_argument("--shape", type=common.sizes, default=(32, 64, 56, 56), help="of the layer's input, 2x3x4x4")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="preact18 to preact200, models of torchvision")
    parser.add_argument("--batch", type=int, default=8, help="of the networks")
    parser.add_argument("--image", type=int, default=64, help="pixels per side, of the networks")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the networks")
    arguments = parser.parse_args(argv)
    shape = "x".join(map(str, arguments.shape))
    found, units, rows = {}, {}, []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found[name] = measure(arguments.shape, dtype)
        unit = units[name] = torch.Size(arguments.shape).numel() * dtype.itemsize
        common.print_table(
            f"kept for backward, in units of the layer's input, {shape} {name}",
            ["normalization + ReLU", *CASES],
            [[key, *(f"{cases[case] / unit:.2f}" for case in CASES)] for key, cases in found[name].items()],
        )
        rows += [
            {**common.head(), "case": case, "shape": shape, "dtype": name, "candidate": key, "bytes": kept,
             "ratio": kept / unit}
            for key, cases in found[name].items() for case, kept in cases.items()
        ]  # fmt: skip
    common.append_rows(arguments.csv, rows)
    device = torch.device(arguments.device)
    measured = arguments.networks, arguments.batch, arguments.image, device
    networks = common.on_ranks(1, measure_networks, *measured, device=arguments.device)
    common.print_table(
        f"training step, {arguments.batch} images of {arguments.image} pixels, float32, torch {torch.__version__}",
        ["network", "normalization", "MB kept", "MB peak", f"kept / {UNFUSED}", f"peak / {UNFUSED}"],
        [[row["network"], row["candidate"], f"{row['kept'] / 1e6:.1f}", f"{row['peak'] / 1e6:.1f}",
          f"{row['kept_ratio']:.3f}", f"{row['peak_ratio']:.3f}"] for row in networks],
    )  # fmt: skip
    head = {**common.head(arguments.device), "batch": arguments.batch, "image": arguments.image}
    networks_csv = arguments.csv.with_name(f"{arguments.csv.stem}_networks.csv")
    common.append_rows(networks_csv, [{**head, **row} for row in networks])


if __name__ == "__main__":
    main()
