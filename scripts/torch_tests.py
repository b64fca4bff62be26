"""Run torch's own tests of SyncBatchNorm with our layer, and our layer on the inputs of torch's BatchNorm tests.

    python scripts/torch_tests.py        # under a minute, no GPU

The tests come from the installed torch: every test of `torch.testing._internal.distributed.distributed_test` whose
source names SyncBatchNorm, on ranks of gloo. In their module, the class is ours and `.cuda()` does nothing. Then the
inputs that `torch.testing._internal.common_modules` has for BatchNorm1d, 2d and 3d: results, gradients, second
derivatives, layouts, copies and states like torch's. Tests in DIFFERENCES must fail; docs/differences.md says why.
"""

import argparse
import copy
import inspect
import io
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from rich.table import Table
from torch import nn

import syncbn

os.environ |= {"BACKEND": "gloo", "WORLD_SIZE": "2", "TEMP_DIR": tempfile.gettempdir()}  # read by the test module
try:
    from torch.testing._internal import common_modules, common_utils
    from torch.testing._internal.distributed import distributed_test
except ModuleNotFoundError as error:
    sys.exit(f"expected what torch's tests import, got {error}: pip install expecttest")

DIFFERENCES = {  # test: a part of the message of its failure, the reason
    "test_sync_bn_logged": ("0 is not true", "DDP's telemetry has_sync_bn looks for torch's class"),
}
for _dims in (1, 2, 3):
    DIFFERENCES[f"BatchNorm{_dims}d eps=0"] = ("got none", "accepted: a channel without variance yields the bias")
    DIFFERENCES[f"BatchNorm{_dims}d train zero_batch"] = ("num_batches_tracked", "an empty batch is not counted")
TIMEOUT_S = 60
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}  # for a number of dimensions
Outcome = tuple[str, str, str]  # test, "passed", "failed" or "differs", reason


def main() -> None:
    """Run both parts and print a table; exit with status 1 if a test fails, or a difference is none any more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.set_num_threads(1)
    outcomes = [*distributed_outcomes(arguments.ranks), *module_outcomes()]
    table = Table("test", "outcome", "reason")
    for outcome in outcomes:
        table.add_row(*outcome)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    counts = {kind: sum(outcome[1] == kind for outcome in outcomes) for kind in ("passed", "differs", "failed")}
    console.print(
        f"torch {torch.__version__}, {arguments.ranks} ranks: "
        + ", ".join(f"{count} {kind}" for kind, count in counts.items())
        + f", {time.perf_counter() - start:.0f} s"
    )
    sys.exit(counts["failed"] > 0)


def outcome_of(name: str, run: Callable[[], None]) -> Outcome:
    """Run one test; one in DIFFERENCES has to fail."""
    message, difference = DIFFERENCES.get(name, (None, ""))
    try:
        run()
    except Exception as error:
        if message is not None and message in str(error):
            return name, "differs", difference
        return name, "failed", f"{type(error).__name__}: {error}".strip()
    return (name, "passed", "") if message is None else (name, "failed", f"expected to differ: {difference}")


# --- torch's distributed tests ---------------------------------------------------------------------------------------


class Replaced(types.ModuleType):
    """A module with some names replaced, for the code of one other module."""

    def __init__(self, module: types.ModuleType, **names: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


class OnRanks(common_utils.TestCase, distributed_test.DistributedTest._DistTestBase):
    """torch's tests without the decorators that ask for GPUs."""

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return dist.get_rank()

    def _barrier(self, *args: Any, **kwargs: Any) -> None:
        dist.barrier()


def names_of_distributed_tests() -> list[str]:
    """Return the tests whose source, or that of a helper they call, names SyncBatchNorm."""
    base = distributed_test.DistributedTest._DistTestBase
    sources = {name: inspect.getsource(inspect.unwrap(f)) for name, f in vars(base).items() if inspect.isfunction(f)}
    helpers = [name for name, source in sources.items() if not name.startswith("test") and "SyncBatchNorm" in source]
    wanted = ["SyncBatchNorm", *(f"self.{helper}(" for helper in helpers)]
    return [
        name for name, source in sources.items() if name.startswith("test") and any(word in source for word in wanted)
    ]


def distributed_outcomes(ranks: int) -> list[Outcome]:
    """Run the tests on ranks of gloo, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        arguments = (ranks, f"{folder}/store", queue)
        torch.multiprocessing.start_processes(run_rank, arguments, nprocs=ranks, start_method="fork")
        found = [queue.get() for _ in range(ranks)]
    merged = []
    for outcomes in zip(*found, strict=True):
        merged.append(max(outcomes, key=lambda outcome: ("passed", "differs", "failed").index(outcome[1])))
    return merged


def run_rank(rank: int, ranks: int, store: str, queue: Any) -> None:
    """Run every test on this rank, and put the outcomes into the queue."""
    os.environ["WORLD_SIZE"] = str(ranks)
    dist.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT_S)
    )
    run_on_cpu_with_our_layer()
    outcomes = []
    for name in names_of_distributed_tests():
        test = OnRanks(name)
        common_utils.set_rng_seed(1234)
        outcomes.append(outcome_of(name, lambda test=test, name=name: inspect.unwrap(getattr(OnRanks, name))(test)))
        dist.barrier()
    queue.put(outcomes)
    dist.destroy_process_group()


def run_on_cpu_with_our_layer() -> None:
    """Replace SyncBatchNorm and CUDA in torch's test module."""
    our_nn = Replaced(nn, SyncBatchNorm=syncbn.SyncBatchNorm)
    cuda = Replaced(torch.cuda, set_device=lambda device: None, current_device=lambda: 0)
    distributed_test.nn = our_nn

    def randn(*size: int, device: Any = None, **options: Any) -> torch.Tensor:
        return torch.randn(*size, **options)

    on_cpu: dict[str, Any] = {"cuda": cuda, "device": lambda *_: torch.device("cpu"), "randn": randn}
    distributed_test.torch = Replaced(torch, nn=our_nn, **on_cpu)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    wrapped = nn.parallel.DistributedDataParallel.__init__

    def init(
        self: Any, module: nn.Module, *, device_ids: Any = None, output_device: Any = None, **options: Any
    ) -> None:
        wrapped(self, module, **options)

    nn.parallel.DistributedDataParallel.__init__ = init  # type: ignore[method-assign, assignment]


# --- torch's inputs for modules --------------------------------------------------------------------------------------


def module_outcomes() -> list[Outcome]:
    """Compare our layer with torch's on torch's inputs, and its errors on torch's invalid inputs."""
    outcomes = []
    for info in common_modules.module_db:
        if info.module_cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            for name, run in checks_of(info):
                outcomes.append(outcome_of(name, run))
    return outcomes


def checks_of(info: Any) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield a name and a check for each input of a class."""
    kind = info.module_cls.__name__
    for training in (True, False):
        inputs = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=True, training=training)
        for given in inputs:
            mode = "train" if training else "eval"
            yield f"{kind} {mode} {given.desc or 'default'}", lambda given=given, t=training: check(info, given, t)
    if info.module_error_inputs_func is not None:
        errors = info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=False, training=True
        )
        for given in errors:
            options = given.module_error_input.constructor_input.kwargs
            described = ", ".join(f"{name}={value:g}" for name, value in options.items())
            yield f"{kind} {described}", lambda given=given: check_error(given)


def check(info: Any, given: Any, training: bool) -> None:
    """Compare our layer, constructed and converted, with torch's on one input."""
    arguments, options = given.constructor_input.args, given.constructor_input.kwargs | {"dtype": torch.float64}
    expected = info.module_cls(*arguments, **options).train(training)
    with torch.no_grad():
        for tensor in (*expected.parameters(), *expected.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 2)
    converted = syncbn.convert_sync_batchnorm(copy.deepcopy(expected))
    constructed = syncbn.SyncBatchNorm(*arguments, **options).train(training)
    constructed.load_state_dict(expected.state_dict())
    x = given.forward_input.args[0]
    for layer in (converted, constructed):
        assert layer.extra_repr() == expected.extra_repr()
        check_copies(layer)
        twin = copy.deepcopy(expected)
        check_step(layer, twin, x)
        twin.load_state_dict(layer.state_dict())
        if x.numel() == 0:
            continue
        for other in layouts_of(x):
            check_step(layer, twin, other)
        with_grads = [x.detach().requires_grad_(), *(p for p in layer.parameters())]
        torch.autograd.gradcheck(lambda x, *_, layer=layer: layer(x), with_grads, fast_mode=True)
        torch.autograd.gradgradcheck(lambda x, *_, layer=layer: layer(x), with_grads, fast_mode=True)


def check_copies(layer: nn.Module) -> None:
    """Compare copies and a saved layer with the layer."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.copy(layer), copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert type(other) is type(layer)
        assert repr(other) == repr(layer)
        torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)


def check_step(layer: nn.Module, expected: nn.Module, x: torch.Tensor) -> None:
    """Compare output, gradients and the state afterwards."""
    found = []
    grad_output = torch.randn_like(x)
    for module in (layer, expected):
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        found.append((y, *torch.autograd.grad(y, [leaf, *module.parameters()], grad_output)))
    torch.testing.assert_close(*found)
    for memory_format in (torch.contiguous_format, FORMATS.get(x.dim(), torch.contiguous_format)):
        if x.is_contiguous(memory_format=memory_format):
            assert found[0][0].is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(layer.state_dict(), expected.state_dict())


def layouts_of(x: torch.Tensor) -> list[torch.Tensor]:
    """Return the values of x in other layouts."""
    x = x.detach()
    found = [torch.stack([x, x], -1)[..., 0], x.transpose(0, 1).contiguous().transpose(0, 1)]
    if x.dim() in FORMATS:
        found.append(x.contiguous(memory_format=FORMATS[x.dim()]))
    return found


def check_error(given: Any) -> None:
    """Require the type of error that torch requires, at construction or in the forward pass."""
    constructor, forward = given.module_error_input.constructor_input, given.module_error_input.forward_input
    try:
        syncbn.SyncBatchNorm(*constructor.args, **constructor.kwargs, dtype=torch.float64)(
            *forward.args, **forward.kwargs
        )
    except given.error_type:
        return
    raise AssertionError(f"expected {given.error_type.__name__}, got none")


if __name__ == "__main__":
    main()
