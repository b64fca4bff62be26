"""Every rank refuses bad input at once, and the group remains usable."""

import re
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.activations import ACTIVATIONS

GOOD = torch.randn(4, 3, 2)
BAD = {
    "channels": (torch.randn(4, 5, 2), r"expected input of shape \(N, 3, ...\), got \(4, 5, 2\): num_features is 3"),
    "no_batch_dimension": (torch.randn(3), r"expected input of shape \(N, 3\) or \(N, 3, ...\), got \(3,\)"),
    "integers": (torch.ones(4, 3, 2, dtype=torch.int64), "expected input of a floating dtype, got torch.int64"),
    "complex": (torch.randn(4, 3, dtype=torch.complex64), "expected input of a floating dtype, got torch.complex64"),
    "float64": (torch.randn(4, 3, dtype=torch.float64), "expected input of torch.float32 like the parameters"),
    "device": (torch.empty(4, 3, 2, device="meta"), "expected input on cpu like the parameters, got meta"),
    "list": ([GOOD], "expected input to be a torch.Tensor, got list: pass one tensor"),
    "none": (None, "expected input to be a torch.Tensor, got NoneType"),
    "array": (GOOD.numpy(), "expected input to be a torch.Tensor, got ndarray"),
    "sparse": (GOOD.to_sparse(), "expected input to be a dense tensor, got layout torch.sparse_coo"),
    "nested": (
        torch.nested.nested_tensor(list(GOOD), layout=torch.jagged),
        "expected input to be a dense tensor, got a nested tensor",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("training", [True, False])
def test_one_process_refuses_it_with_what_must_hold_what_came_and_what_to_do(name, training):
    x, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        syncbn.SyncBatchNorm(3).train(training)(x)


def refusals() -> list[str]:
    """Give rank 1 each bad input in turn, and every rank good input after it."""
    messages = []
    layer = syncbn.SyncBatchNorm(3)
    for x, _ in BAD.values():
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        try:
            layer(x if dist.get_rank() == 1 else GOOD)
            messages.append("accepted")
        except ValueError as error:
            messages.append(str(error))
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        assert layer(GOOD).isfinite().all()
    return messages


def test_one_rank_with_bad_input_makes_every_rank_raise_at_once_and_nothing_is_lost():
    ranks = run_ranks(3, refusals)
    for message, (_, expected) in zip(ranks[1], BAD.values(), strict=True):
        assert re.search(expected, message)
    for rank in (0, 2):
        assert ranks[rank] == ["expected valid input on every rank, got a refusal from another rank of the group: its "
                               "error says why"] * len(BAD)  # fmt: skip


def refuse_functional(shapes: list[tuple[int, ...]]) -> str:
    try:
        syncbn.sync_batch_norm(torch.randn(shapes[dist.get_rank()]), None, None, torch.ones(3), training=True)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_the_functional_form_releases_its_peers_too():
    ranks = run_ranks(2, refuse_functional, [(4, 3), (4, 2)])
    assert "refusal from another rank" in ranks[0]
    assert "the input, (4, 2)" in ranks[1]


@pytest.mark.parametrize("name", ["running_mean", "running_var", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_the_functional_form_wants_one_value_per_channel_of_everything(name, training):
    tensors = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "weight": torch.ones(3)}
    with pytest.raises(ValueError, match=rf"expected {name} of shape \(3,\), got \(2,\)"):
        syncbn.sync_batch_norm(GOOD, **tensors | {name: torch.ones(2)}, training=training)


@pytest.mark.parametrize(
    "names", [["weight"], ["running_mean", "running_var"], ["running_mean", "running_var", "bias"]]
)
@pytest.mark.parametrize("training", [True, False])
def test_the_functional_form_names_the_arguments_that_do_not_fit_the_input(names, training):
    tensors = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)} | dict.fromkeys(names, torch.ones(5))
    message = rf"expected {names[0]} of shape \(3,\), got \(5,\): one value per channel of the input, \(4, 3, 2\)"
    with pytest.raises(ValueError, match=message):
        syncbn.sync_batch_norm(GOOD, **tensors, training=training)


class FailsIn(torch.Tensor):
    """A tensor for which one operation runs out of memory."""

    operation = "sum"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ == cls.operation:
            raise MemoryError(f"no room for {func.__name__}")
        return super().__torch_function__(func, types, args, kwargs or {})


class Broken:
    """An input that raises on every access."""

    def __getattr__(self, name):
        raise RuntimeError(f"no {name}")


class Scale(torch.nn.Module):
    def forward(self, weight):
        raise FloatingPointError("no weight today")


class ChecksItself(torch.nn.BatchNorm1d):
    """A subclass whose own forward refuses input, before torch's."""

    def forward(self, input):
        assert input.shape[-1] == 2, "expected length 2"
        return super().forward(input)


class CallsTheFunction(torch.nn.BatchNorm1d):
    def forward(self, input):
        assert input.shape[-1] == 2, "expected length 2"
        return torch.nn.functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


def broken_weight() -> torch.nn.Module:
    layer = syncbn.SyncBatchNorm(3)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Scale(), unsafe=True)
    return layer


def functional(x, **arguments):
    return syncbn.sync_batch_norm(x, None, None, training=True, **arguments)


class Between(torch.nn.BatchNorm1d):
    """A subclass with a synchronized layer inside."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.inner = torch.nn.BatchNorm1d(num_features)

    def forward(self, input, fails=False):
        assert not fails, "before the inner layer"
        return super().forward(self.inner(input))


class Twice(torch.nn.BatchNorm1d):
    """A subclass that calls the function twice."""

    def forward(self, input, fails=False):
        function = torch.nn.functional.batch_norm
        y = function(input, None, None, self.weight, self.bias, True)
        return function(y, None, None, self.weight[:2] if fails else self.weight, self.bias, True)


def nested() -> torch.nn.Module:
    return syncbn.convert_sync_batchnorm(Between(3))


def twice() -> torch.nn.Module:
    return syncbn.convert_sync_batchnorm(Twice(3))


class FailsAgain(torch.nn.Module):
    def __init__(self, fails):
        super().__init__()
        self.fails, self.calls = fails, 0

    def forward(self, x):
        self.calls += 1
        assert not self.fails or self.calls < 2, "in the recomputation"
        return x * 2


def recompute(fails: bool) -> torch.Tensor:
    model = torch.nn.Sequential(FailsAgain(fails), LAYER(3))
    x = GOOD.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    return x


LAYER = syncbn.SyncBatchNorm
FAULTS = {  # the call of rank 1, the call of the others, and the error of rank 1
    "no memory": (lambda: LAYER(3)(GOOD.as_subclass(FailsIn)), lambda: LAYER(3)(GOOD), "got on this one MemoryError"),
    "residual": (lambda: LAYER(3)(GOOD, residual="x"), lambda: LAYER(3)(GOOD), "expected residual to be a torch.Ten"),
    "mask": (lambda: LAYER(3)(GOOD, mask=[True]), lambda: LAYER(3)(GOOD), "expected mask to be a torch.Tensor, got li"),
    "broken": (lambda: LAYER(3)(Broken()), lambda: LAYER(3)(GOOD), "expected input to be a torch.Tensor, got Broken"),
    "parametrized": (lambda: broken_weight()(GOOD), lambda: LAYER(3)(GOOD), "FloatingPointError: no weight today"),
    "nothing on a device": (
        lambda: LAYER(3, device="meta")(None), lambda: LAYER(3)(GOOD), "expected input to be a torch.Tensor",
    ),
    "subclass": (
        lambda: syncbn.convert_sync_batchnorm(ChecksItself(3))(GOOD[..., :1]),
        lambda: syncbn.convert_sync_batchnorm(ChecksItself(3))(GOOD),
        "the all-reduce of SyncChecksItself, got on this one AssertionError: expected length 2",
    ),
    "subclass with a function": (
        lambda: syncbn.convert_sync_batchnorm(CallsTheFunction(3))(GOOD[..., :1]),
        lambda: syncbn.convert_sync_batchnorm(CallsTheFunction(3))(GOOD),
        "AssertionError: expected length 2",
    ),
    "function, weight": (
        lambda: functional(GOOD, weight="x"), lambda: functional(GOOD), "expected weight to be a torch.Tensor or None",
    ),
    "function, activation": (
        lambda: functional(GOOD, activation=[]), lambda: functional(GOOD), "unhashable|expected activation",
    ),
    "function, device": (
        lambda: functional(GOOD.to("meta"), residual=GOOD), lambda: functional(GOOD), "expected a residual on meta",
    ),
    "function, no batch dimension": (
        lambda: functional(GOOD[0, :, 0]), lambda: functional(GOOD), r"expected input of shape \(N, C\)",
    ),
    "function, weight of the wrong size": (
        lambda: syncbn.sync_batch_norm(GOOD, torch.zeros(3), torch.ones(3), torch.ones(2), training=True),
        lambda: functional(GOOD), r"expected weight of shape \(3,\), got \(2,\)",
    ),
    "nested": (lambda: nested()(GOOD, True), lambda: nested()(GOOD), "AssertionError: before the inner layer"),
    "checkpoint": (lambda: recompute(True), lambda: recompute(False), "AssertionError: in the recomputation"),
    "function twice": (lambda: twice()(GOOD, True), lambda: twice()(GOOD), "expected weight of shape"),
}  # fmt: skip


def meet_faults() -> list[tuple[str, float]]:
    """Run each fault on rank 1, and a valid call on every rank after each."""
    found = []
    for fault, good, _ in FAULTS.values():
        start = time.monotonic()
        try:
            (fault if dist.get_rank() == 1 else good)()
            message = "accepted"
        except ValueError as error:
            message = f"{error} {getattr(error, '__notes__', '')}"
        found.append((message, time.monotonic() - start))
        assert LAYER(3)(GOOD).isfinite().all()
    return found


def test_whatever_one_rank_meets_before_the_all_reduce_is_a_value_error_on_every_rank_at_once():
    ranks = run_ranks(3, meet_faults)
    for name, own, *others in zip(FAULTS, ranks[1], ranks[0], ranks[2], strict=True):
        assert re.search(FAULTS[name][2], own[0]), (name, own[0])
        for message, seconds in others:
            assert "refusal from another rank" in message, (name, message)
            assert seconds < 5


def input_that_tells_nothing() -> str:
    if dist.get_rank() == 0:
        return ""
    with pytest.raises(ValueError, match="got list") as error:
        functional([GOOD])
    return error.value.__notes__[0]


def test_a_rank_that_cannot_tell_the_others_says_so():
    assert "The other ranks of the group were not told" in run_ranks(2, input_that_tells_nothing)[1]


def fail_to_unpack(tensor):
    raise MemoryError("no room to unpack")


def meet_faults_in_backward() -> list[tuple[str, str]]:
    found = []
    for fault in ("version", "unpack", "create_graph"):
        layer, x = LAYER(3, activation="relu"), GOOD.clone().requires_grad_()
        is_at_fault = dist.get_rank() == 1
        unpacks_badly = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, fail_to_unpack)
        with unpacks_badly if is_at_fault and fault != "version" else nullcontext():
            y = layer(x)
        if is_at_fault and fault == "version":
            with torch.no_grad():
                layer.weight.add_(1)
        start = time.monotonic()
        with pytest.raises(ValueError, match="expected") as error:
            torch.autograd.grad(y, x, torch.ones_like(y), create_graph=fault == "create_graph")
        assert time.monotonic() - start < 5
        found.append(str(error.value))
        x = GOOD.clone().requires_grad_()
        LAYER(3)(x).square().sum().backward()
        assert x.grad.isfinite().all()
    return found


def test_whatever_one_rank_meets_in_backward_is_a_value_error_on_every_rank_at_once():
    first, second, third = run_ranks(3, meet_faults_in_backward)
    assert first == third
    assert all("refusal from another rank" in message for message in first)
    assert "RuntimeError: one of the variables needed for gradient computation has been modified" in second[0]
    assert all("MemoryError: no room to unpack" in message for message in second[1:])


def no_room(z):
    raise MemoryError("no room for the activation")


def fail_between_the_collectives_of_create_graph() -> str:
    layer, x = LAYER(3, activation="silu"), GOOD.clone().requires_grad_()
    y = layer(x)
    if dist.get_rank() == 1:  # in this process alone; the activation follows the first all-reduce
        ACTIVATIONS["silu"] = ACTIVATIONS["silu"]._replace(apply=no_room)
    start = time.monotonic()
    try:
        torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    except ValueError as error:
        assert time.monotonic() - start < 5
        assert LAYER(3)(GOOD).isfinite().all()
        return str(error)
    return "accepted"


def test_between_the_two_collectives_of_create_graph_an_error_reaches_every_rank():
    first, second = run_ranks(2, fail_between_the_collectives_of_create_graph)
    assert "refusal from another rank" in first
    assert "MemoryError: no room for the activation" in second


def gradients_that_overflow() -> list[float]:
    x = GOOD.clone().requires_grad_()
    LAYER(3)(x).backward(torch.full_like(x, torch.nan if dist.get_rank() == 1 else 1.0))
    return x.grad.flatten().tolist()


def test_gradients_of_nan_on_one_rank_are_no_refusal():
    for grad in run_ranks(2, gradients_that_overflow):
        assert np.isnan(grad).all()


def test_in_one_process_an_error_keeps_its_class():
    with pytest.raises(MemoryError):
        LAYER(3)(GOOD.as_subclass(FailsIn))


def refused_with_running_statistics() -> list[torch.Tensor]:
    tensors = [torch.full((3,), 5.0), torch.full((3,), 7.0), torch.ones(3)]
    x = torch.randn(4, 3 if dist.get_rank() == 0 else 2)
    with pytest.raises(ValueError, match="expected"):
        syncbn.sync_batch_norm(x, *tensors, training=True, momentum=0.5)
    return tensors


def test_a_refusal_leaves_running_statistics_of_the_functional_form_alone():
    for mean, var, _ in run_ranks(2, refused_with_running_statistics):
        assert mean.tolist() == [5, 5, 5]
        assert var.tolist() == [7, 7, 7]


def single_value(sizes: list[int]) -> list[str]:
    messages = []
    layer = syncbn.SyncBatchNorm(3)
    for _ in range(2):
        try:
            layer(torch.randn(sizes[dist.get_rank()], 3, 1, 1))
            messages.append("accepted")
        except ValueError as error:
            messages.append(str(error))
    assert layer.num_batches_tracked == 0
    return messages


@pytest.mark.parametrize("sizes", [[1], [1, 0], [0, 0, 1]], ids=str)
def test_one_value_per_channel_over_all_ranks_raises_the_same_error_on_every_rank(sizes):
    for messages in run_ranks(len(sizes), single_value, sizes):
        for message in messages:
            over = f" over all {len(sizes)} ranks, here" if len(sizes) > 1 else ""
            assert message.startswith(f"expected more than 1 value per channel when training, got 1{over} in input")


def one_value_each() -> bool:
    return bool(syncbn.SyncBatchNorm(3)(torch.randn(1, 3)).isfinite().all())


def test_one_value_per_channel_on_each_of_two_ranks_is_enough():
    assert run_ranks(2, one_value_each) == [True, True]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_features": 0}, "expected num_features of at least 1, got 0"),
        ({"num_features": 3, "eps": -1e-5}, "expected eps of at least 0, got -1e-05"),
        ({"num_features": 3, "momentum": 1.5}, "expected momentum between 0 and 1, or None .*, got 1.5"),
        ({"num_features": 3, "process_group": [0, 1]}, "expected a process group, got list: make one with"),
    ],
)
def test_constructor_arguments_are_checked(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        syncbn.SyncBatchNorm(**arguments)


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_one_running_statistic_of_two_is_refused(missing, training):
    tensors = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)} | {missing: None}
    layer = syncbn.SyncBatchNorm(3).train(training)
    setattr(layer, missing, None)
    for call in (lambda: layer(GOOD), lambda: syncbn.sync_batch_norm(GOOD, **tensors, training=training)):
        with pytest.raises(ValueError, match=f"expected running_mean and running_var, or neither, .*{missing}=None"):
            call()


def test_evaluation_without_running_statistics_does_not_advise_to_evaluate():
    layer = syncbn.SyncBatchNorm(3, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="use a larger batch, or evaluate with running statistics"):
        layer(torch.randn(1, 3))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripting_says_to_revert_first():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)).eval()
    with pytest.raises(TypeError, match="got a SyncBatchNorm1d: call syncbn"):
        torch.jit.script(syncbn.convert_sync_batchnorm(model))
    scripted = torch.jit.script(syncbn.revert_sync_batchnorm(model))
    x = torch.randn(4, 3)
    torch.testing.assert_close(scripted(x), model(x))


def test_recalibrate_names_the_batch_that_is_too_small():
    model = syncbn.convert_sync_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="more than 1 value per channel") as error:
        syncbn.recalibrate(model, torch.randn(9, 3).split(4))
    assert error.value.__notes__ == ["This was batch 3 of recalibrate on this rank, (1, 3)."]


def outside_of_the_group() -> str:
    groups = [dist.new_group([0]), dist.new_group([1])]
    layer = syncbn.SyncBatchNorm(3, process_group=groups[0])
    try:
        layer(GOOD)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_rank_outside_of_its_group_is_told_so_and_the_members_go_on():
    assert run_ranks(2, outside_of_the_group) == [
        "accepted",
        "expected a process group that this rank belongs to, got one without it: give every rank the group it is a "
        "member of",
    ]
