"""How many bytes does each formulation of normalization + ReLU save for backward?

    python scripts/bench_memory.py                # seconds; no timing, so the answer is the same on every machine

The count is the distinct storages that autograd saves, without parameters and buffers, in units of the layer's input:

- for the layer alone, including its input;
- between two convolutions, which save their inputs anyway; the residual is the input of the first;
- for a whole pre-activation ResNet-50 in float32.

The normalization's parameters are always float32. Rows are appended to benchmarks/memory.csv; tables in
docs/performance.md.

Last answer (CPU, torch 2.14.1, f434781): 2 tensors like the input as local BatchNorm2d + ReLU, 1 with a fused ReLU; no
difference between convolutions. A mean of squares keeps one more in bfloat16.
"""

from collections.abc import Callable
from pathlib import Path

import common
import torch
from common import COLOURS
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import syncbn
from train.preact_resnet import preact_resnet

CASES = ["alone", "alone, residual", "between convolutions", "between convolutions, residual"]
FUSED = "syncbn, fused"


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


def measure_networks(batch: int, image: int) -> dict[str, int]:
    """Return the bytes that a pre-activation ResNet-50 saves for backward, by formulation."""
    images = torch.randn(batch, 3, image, image)
    return {name: saved_bytes(preact_resnet(50, norm, num_classes=10), images) for name, norm in common.NORMS.items()}


def draw(found: dict[str, dict[str, dict[str, int]]], units: dict[str, int], path: Path) -> None:
    """Draw one panel for each dtype with one group of bars for each case."""
    figure = Figure(figsize=(11, 3.6 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    for axes, (dtype, by_name) in zip(panels, found.items(), strict=True):
        width = 0.8 / len(by_name)
        for index, (name, cases) in enumerate(by_name.items()):
            positions = [place + (index - (len(by_name) - 1) / 2) * width for place in range(len(CASES))]
            ratios = [cases[case] / units[dtype] for case in CASES]
            axes.bar(positions, ratios, width, color=COLOURS[index], label=name)
        axes.set(title=f"Kept for backward by normalization + ReLU, {dtype}", ylabel="tensors like the input")
        axes.set_xticks(range(len(CASES)), CASES)
        common.tidy(axes)
    panels[0].legend(frameon=False, ncols=len(COLOURS), loc="upper left")
    panels[0].set_ylim(top=panels[0].get_ylim()[1] * 1.15)
    common.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, append rows and draw."""
    parser = common.parser(__doc__, "memory")
    parser.add_argument("--shape", type=common.sizes, default=(32, 64, 56, 56), help="of the layer's input, 2x3x4x4")
    parser.add_argument("--batch", type=int, default=8, help="of the network")
    parser.add_argument("--image", type=int, default=64, help="pixels per side, of the network")
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
    networks, images = measure_networks(arguments.batch, arguments.image), f"{arguments.batch} x {arguments.image}^2"
    common.print_table(
        f"kept by a ResNet-50 for {arguments.batch} images of {arguments.image} pixels, float32",
        ["normalization + ReLU", "MB"],
        [[name, f"{kept / 1e6:.1f}"] for name, kept in networks.items()],
    )
    rows += [
        {**common.head(), "case": "ResNet-50", "shape": images, "dtype": "float32", "candidate": name, "bytes": kept,
         "ratio": kept / networks[common.LOCAL]}
        for name, kept in networks.items()
    ]  # fmt: skip
    common.append_rows(arguments.csv, rows)
    draw(found, units, arguments.plot)


if __name__ == "__main__":
    main()
