"""Intervals over seeds, and how the pictures of experiments show them."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from common import tidy
from matplotlib.figure import Figure
from scipy import stats

Row = dict[str, Any]


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval, mean - half to mean + half (Student's t over the seeds)."""

    mean: float
    half: float
    n: int

    def text(self, digits: int = 1, unit: str = "") -> str:
        """Return "12.3 ± 0.4 %"."""
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}{' ' + unit if unit else ''}"

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return abs(self.mean) > self.half


def interval(values: Iterable[float]) -> Interval:
    """Return mean and 95 % confidence interval of independent values, such as one for each seed."""
    sample = torch.tensor([float(value) for value in values], dtype=torch.float64)
    n = len(sample)
    half = float(stats.t.ppf(0.975, n - 1) * sample.std() / n**0.5) if n > 1 else float("nan")
    return Interval(float(sample.mean()), half, n)


def where(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def column(rows: Sequence[Row], name: str, **wanted: Any) -> Interval:
    """Return the interval of a column over the rows that have these values."""
    return interval(row[name] for row in where(rows, **wanted))


def difference(rows: Sequence[Row], name: str, first: Row, second: Row) -> Interval:
    """Return the interval of first - second of a column, paired by seed."""
    values = [{row["seed"]: row[name] for row in where(rows, **wanted)} for wanted in (first, second)]
    return interval(value - values[1][seed] for seed, value in values[0].items())


def levels(rows: Sequence[Row], name: str) -> list[Any]:
    """Return the distinct values of a column in order of appearance."""
    return list(dict.fromkeys(row[name] for row in rows))


def line(axes: Any, rows: Sequence[Row], x: str, y: str, label: str, colour: str, **options: Any) -> None:
    """Draw the means of y at each x as a line, and their 95 % intervals as a band."""
    places = sorted(levels(rows, x))
    found = [column(rows, y, **{x: place}) for place in places]
    axes.plot(places, [f.mean for f in found], color=colour, label=label, **({"marker": "o", "ms": 4} | options))
    low, high = [f.mean - f.half for f in found], [f.mean + f.half for f in found]
    axes.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)


def panels(count: int, width: float = 4.2, height: float = 3.6) -> tuple[Figure, list[Any]]:
    """Return a figure with panels side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for one in axes:
        tidy(one)
    return figure, axes
