"""How accurate is each formulation, by mean/std, dtype and number of ranks?

    python scripts/accuracy_numerics.py           # real gloo ranks, under a minute

One batch of standard normal numbers plus an offset is split over the ranks. The oracle is NumPy float64 on the whole
batch of the same rounded numbers. The relative error is the largest over all values and ranks: of mean, y and
grad_input relative to the largest value of each, of the variance relative to each channel's. Mean and variance are read
from the running statistics, float32 unless the batch is float64. inf stands for NaN. Rows are appended to
benchmarks/numerics.csv; tables in docs/performance.md.

Last answer (AMD EPYC, torch 2.14.1, f434781): float32 at mean/std 1e4 on 1 to 8 ranks: variance 5e-7 and output 2e-7;
all-gather 3e-5 and 3e-4; mean of squares has no correct digit. On 2 ranks or more the errors of all formulations grow
above 1e4; ours reach 3e-4 and 1e-4 at 1e6, the limit of the float64 vector that is all-reduced. For float64 batches
this vector is the limit from 1e1 on (2e-12 at 1e2).
"""

import math
from typing import Any

import common
import numpy as np
import torch
import torch.distributed as dist
from common import COLOURS, LOCAL
from matplotlib.figure import Figure

from syncbn import reference

RATIOS = [10.0**power for power in range(7)]
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
QUANTITIES = ["mean", "var", "y", "grad_input"]
BAR = 1e-6
NAMES = {"mean": "mean", "var": "variance", "y": "output", "grad_input": "gradient of the input"}


def batch(ratio: float, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x and grad_output of the whole batch, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    x, grad_output = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return (x + ratio).to(dtype), grad_output.to(dtype)


def relative_errors(actual: dict[str, np.ndarray], x: torch.Tensor, grad_output: torch.Tensor) -> dict[str, float]:
    """Return the error of each quantity against the oracle.

    Args:
        actual: mean and biased var (C,), y and grad_input (N, C, H, W).
        x, grad_output: the whole batch.
    """
    oracle = reference.batch_norm(x.double().numpy())
    gradients = reference.batch_norm_backward(grad_output.double().numpy(), x.double().numpy())
    expected = {"mean": oracle.mean, "var": oracle.var, "y": oracle.output, "grad_input": gradients.grad_input}
    errors = {}
    for name, value in expected.items():
        scale = value if name == "var" else abs(value).max()
        error = (abs(actual[name] - value) / scale).max()
        errors[name] = float(error) if math.isfinite(error) else math.inf
    return errors


def measure(shape: tuple[int, ...], ratios: list[float], dtypes: list[str]) -> list[dict[str, Any]]:
    """Return the errors of every formulation, ratio and dtype, over the ranks of this run."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    found = []
    for name, dtype in ((name, DTYPES[name]) for name in dtypes):
        for ratio in ratios:
            x, grad_output = batch(ratio, dtype, shape)
            if not x.isfinite().all() or (x.double().amax((0, 2, 3)) == x.double().amin((0, 2, 3))).any():
                continue  # the dtype cannot represent the numbers, or rounding made a channel constant
            for candidate, norm in common.NORMS.items():
                if candidate == LOCAL and ranks > 1:
                    continue
                layer = norm(shape[1])
                layer.momentum = 1.0  # the running statistics are those of the batch
                layer = layer.double() if dtype == torch.float64 else layer
                leaf = x.chunk(ranks)[rank].clone().requires_grad_()
                y = layer(leaf)
                y.backward(grad_output.chunk(ranks)[rank])
                count = x.numel() // shape[1]
                actual = {
                    "mean": layer.running_mean.double().numpy(),
                    "var": layer.running_var.double().numpy() * ((count - 1) / count),
                    "y": common.whole_batch(y.detach().double()).numpy(),
                    "grad_input": common.whole_batch(leaf.grad.double()).numpy(),
                }
                errors = relative_errors(actual, x, grad_output)
                found.append({"ranks": ranks, "dtype": name, "mean_over_std": ratio, "candidate": candidate, **errors})
    return found


def draw(found: list[dict[str, Any]], path: Any) -> None:
    """Draw every quantity in float32, then the output in the other dtypes; the last panel is the legend."""
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    panels = list(figure.subplots(2, 4, sharex=True).flat)
    most = max(row["ranks"] for row in found)
    cases = [("float32", quantity) for quantity in QUANTITIES]
    cases += [(dtype, "y") for dtype in DTYPES if dtype != "float32"]
    ratios = sorted({row["mean_over_std"] for row in found})
    for axes, (dtype, quantity) in zip(panels, cases, strict=False):
        for colour, candidate in zip(COLOURS, common.NORMS, strict=False):
            for ranks, style in ((1, ":"), (most, "-")):
                rows = [r for r in found if (r["dtype"], r["candidate"], r["ranks"]) == (dtype, candidate, ranks)]
                if rows:
                    values = [max(min(row[quantity], 10), 1e-16) for row in rows]
                    label = f"{candidate}, {ranks} rank{'s' * (ranks > 1)}"
                    places = [row["mean_over_std"] for row in rows]
                    axes.plot(places, values, style, color=colour, marker="." if ranks > 1 else None, label=label)
        axes.set(title=f"{NAMES[quantity]}, {dtype}", ylim=(1e-17 if dtype == "float64" else 1e-9, 20))
        axes.set(xlabel="mean / std", ylabel="relative error (10: none right)", yscale="log")
        axes.tick_params(labelbottom=True)
        common.plain_log(axes, "x", [ratio for ratio in ratios if math.log10(ratio) % 2 == 0], base=10)
        common.tidy(axes)
    panels[1].axhline(BAR, color="black", linewidth=0.8, label="bar of the project, 1e-6")
    panels[-1].axis("off")
    panels[-1].legend(*panels[1].get_legend_handles_labels(), loc="center", frameon=False)
    figure.suptitle(common.origin(found), fontsize=9)
    common.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the variance in float32, append rows and draw."""
    parser = common.parser(__doc__, "numerics")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--shape", type=common.sizes, default=(16, 16, 24, 24), help="of the whole batch")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    arguments = parser.parse_args(argv)
    if arguments.draw:
        return draw(common.last_run(arguments.csv), arguments.plot)
    measured = (arguments.shape, arguments.ratios, arguments.dtypes)
    found = [row for ranks in arguments.ranks for row in common.on_ranks(ranks, measure, *measured)]
    for dtype, quantity in (("float32", "var"), ("float32", "y"), ("bfloat16", "y")):
        table: dict[tuple, list[str]] = {}
        for row in (row for row in found if row["dtype"] == dtype):
            table.setdefault((row["candidate"], row["ranks"]), []).append(f"{row[quantity]:.0e}")
        if table:
            columns = ["formulation", "ranks", *(f"{ratio:.0e}" for ratio in arguments.ratios)]
            rows = [[name, str(ranks), *errors] for (name, ranks), errors in sorted(table.items())]
            common.print_table(f"relative error of {quantity}, {dtype}, by mean/std", columns, rows)
    rows = [{**common.head(), **row} for row in found]
    common.append_rows(arguments.csv, rows)
    draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
