"""Does a fused network hide the all-reduces of its backward pass behind weight gradients?

    python scripts/bench_overlap.py                               # 2 gloo ranks, one thread each

Two forms of a network, one of norm, activation and convolution apart, one of units (`NormActConv`). Every collective of
normalization in backward is delayed as by a slow network: a call that waits sleeps first, and a call that does not has
a result that cannot be waited for until the delay has passed since the call. A sleeping rank leaves its core free. In
the second case the message itself, 0.5 ms here, runs within the delay. The delays are fractions of the median time
that a unit takes for its weight gradients, which is measured first. Only the backward pass is timed, without
DistributedDataParallel. A form that hides nothing grows by the delay of each call, a form that hides all of it by
nothing.

First the gradients of both forms are compared in float64. Then forms and delays alternate; the growth is the median
difference to the same form without delay in the same round. Rows are appended to benchmarks/overlap_cpu.csv; tables in
docs/performance.md.

Last answer (AMD EPYC, 2 cores, torch 2.14.1, a5779bf, 15 rounds): without delay, backward takes 0.87 times as long in
units. A delay of half the median weight gradient adds -0.1 of the delays to it and 0.3 to the layer, one of the whole
median 0.1 and 0.4, of twice the median 0.3 and 0.8.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from networks import COLOUR_OF, FUSED, NUM_CLASSES, candidates
from torch import Tensor, nn

from syncbn import function

CPU = torch.device("cpu")
FORMS = ("syncbn", FUSED)
FRACTIONS = [0, 0.25, 0.5, 1, 2]


class Delayed:
    """Delays, while active, each collective that this rank calls through `torch.distributed`.

    Args:
        seconds: the delay.

    Attributes:
        calls: the number of delayed calls.
    """

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor")

    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def __enter__(self) -> "Delayed":
        self._originals = {name: getattr(dist, name) for name in self.NAMES}
        for name, original in self._originals.items():
            setattr(dist, name, self._delayed(original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _delayed(self, original: Callable) -> Callable:
        def delayed(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            self.calls += 1
            if async_op:
                return _DelayedWork(original(*args, async_op=True, **kwargs), time.perf_counter() + self.seconds)
            time.sleep(self.seconds)
            return original(*args, **kwargs)

        return delayed


class _DelayedWork:
    def __init__(self, work: Any, end: float) -> None:
        self._work, self._end = work, end

    def wait(self, *args: Any) -> Any:
        time.sleep(max(0.0, self._end - time.perf_counter()))
        return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class WeightGradients:
    """Records, while active, the seconds that each unit of this rank takes for its weight gradients."""

    def __enter__(self) -> "WeightGradients":
        self.seconds: list[float] = []
        self._original = function.grads_of_parameters
        function.grads_of_parameters = self._measured
        return self

    def __exit__(self, *_: object) -> None:
        function.grads_of_parameters = self._original

    def _measured(self, *args: Any) -> Any:
        start = time.perf_counter()
        result = self._original(*args)
        self.seconds.append(time.perf_counter() - start)
        return result


def batch(batch_size: int, image: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return images and the gradient of the logits, which differ between ranks."""
    generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    images = torch.randn(batch_size, 3, image, image, dtype=dtype, generator=generator)
    return images, torch.randn(batch_size, NUM_CLASSES, dtype=dtype, generator=generator)


def check(network: str, image: int) -> None:
    """Compare the gradients of the images and of all parameters of both forms in float64.

    Raises:
        AssertionError: the gradients differ.
    """
    images, grad_output = batch(2, image, torch.float64)
    images.requires_grad_()
    found = []
    for form in FORMS:
        model = candidates(CPU)[form].network(network, CPU, torch.float64)
        found.append(torch.autograd.grad(model(images), (images, *model.parameters()), grad_output))
    for actual, expected in zip(*found, strict=True):
        error = ((actual - expected).abs().max() / expected.abs().max()).item()
        assert error < 1e-6, f"expected equal gradients of both forms, got a relative difference of {error:.1e}"


def backward_ms(model: nn.Module, images: Tensor, grad_output: Tensor, delay: Delayed | WeightGradients) -> float:
    """Return the milliseconds of a backward pass under `delay`; the forward pass is neither timed nor delayed."""
    model.zero_grad()
    logits = model(images)
    with delay:
        return common.milliseconds(lambda: logits.backward(grad_output), CPU)


def weight_gradient_ms(model: nn.Module, images: Tensor, grad_output: Tensor, rounds: int) -> float:
    """Return the median milliseconds that a unit takes for its weight gradients: over units and rounds, of rank 0."""
    seconds: list[float] = []
    for index in range(rounds + 1):
        with_times = WeightGradients()
        backward_ms(model, images, grad_output, with_times)
        seconds += with_times.seconds if index > 0 else []
    median = torch.tensor(statistics.median(seconds) * 1e3, dtype=torch.float64)
    if dist.is_initialized():
        dist.broadcast(median, 0)
    return float(median)


def measure(network: str, batch_size: int, image: int, fractions: list[float], rounds: int) -> list[dict[str, Any]]:
    """Return the median milliseconds of backward by form and delay."""
    check(network, image)
    images, grad_output = batch(batch_size, image, torch.float32)
    models = {form: candidates(CPU)[form].network(network, CPU) for form in FORMS}
    unit_ms = weight_gradient_ms(models[FUSED], images, grad_output, rounds)
    cases = [(form, fraction) for fraction in fractions for form in FORMS]
    times: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    calls = {}
    for index in range(rounds + 1):
        for form, fraction in cases:
            delay = Delayed(fraction * unit_ms / 1e3)
            duration = backward_ms(models[form], images, grad_output, delay)
            calls[form] = delay.calls
            times[form, fraction] += [duration] if index > 0 else []
    return [
        {"candidate": form, "unit_ms": unit_ms, "delay_ms": fraction * unit_ms, "calls": calls[form],
         "backward_ms": statistics.median(times[form, fraction]),
         "growth": growth(times[form, fraction], times[form, 0], calls[form] * fraction * unit_ms)}
        for form, fraction in sorted(cases, key=lambda case: FORMS.index(case[0]))
    ]  # fmt: skip


def growth(delayed_ms: list[float], undelayed_ms: list[float], delays_ms: float) -> float | None:
    """Return the growth of a backward pass in units of the delays in it, None if there are none.

    Args:
        delayed_ms, undelayed_ms: times of the same rounds, of which the median difference is taken.
    """
    differences = [delayed - undelayed for delayed, undelayed in zip(delayed_ms, undelayed_ms, strict=True)]
    return statistics.median(differences) / delays_ms if delays_ms else None


def title_of(case: dict[str, Any]) -> str:
    """Return what was measured."""
    return "{network}, {ranks} ranks, {batch} images of {image} pixels each".format(**case)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time of backward against the delay of each collective, and a line that grows by all of the delays."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for form in FORMS:
        own = sorted((row for row in rows if row["candidate"] == form), key=lambda row: row["delay_ms"])
        delays = [row["delay_ms"] for row in own]
        axes.plot(delays, [row["backward_ms"] for row in own], "o-", color=COLOUR_OF[form], label=form)
        every = [own[0]["backward_ms"] + own[0]["calls"] * delay for delay in delays]
        axes.plot(delays, every, "--", color=COLOUR_OF[form], linewidth=1, label=f"{form}: all delays")
    axes.axvline(rows[0]["unit_ms"], color="#BBBBBB", linewidth=1, label="median of weight gradients")
    axes.set(title=title_of(rows[0]), xlabel="delay of each collective, ms", ylabel="backward, ms")
    figure.legend(frameon=False, ncols=3, loc="outside lower center")
    common.tidy(axes)
    common.save(figure, path)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, append rows and draw."""
    parser = common.parser(__doc__, "overlap_cpu")
    parser.set_defaults(plot=common.DOCS / "overlap.png")
    parser.add_argument("--network", default="preact50", help="preact18 to preact200, or a model of torchvision")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="images per rank")
    parser.add_argument("--image", type=int, default=64, help="pixels per side")
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, help="of weight gradients; with 0")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    if arguments.draw:
        return draw(common.last_run(arguments.csv), arguments.plot)
    if 0 not in arguments.fractions:
        raise SystemExit(f"expected 0 among --fractions, got {arguments.fractions}: growth is that over no delay")
    case = {"network": arguments.network, "ranks": arguments.ranks, "batch": arguments.batch, "image": arguments.image}
    measured = arguments.network, arguments.batch, arguments.image, arguments.fractions, arguments.rounds
    found = common.on_ranks(arguments.ranks, measure, *measured)
    common.print_table(
        f"backward of {title_of(case)}; median weight gradients of a unit {found[0]['unit_ms']:.2f} ms",
        ["form", "delay, ms", "calls", "all delays, ms", "backward, ms", "growth / all delays"],
        [[r["candidate"], f"{r['delay_ms']:.2f}", str(r["calls"]), f"{r['calls'] * r['delay_ms']:.0f}",
          f"{r['backward_ms']:.0f}", "" if r["growth"] is None else f"{r['growth']:.2f}"] for r in found],
    )  # fmt: skip
    rows = [{**common.head(), **case, **row} for row in found]
    common.append_rows(arguments.csv, rows)
    draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
