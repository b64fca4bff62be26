"""If ranks run synchronized layers differently, every rank raises an error that names them, instead of hanging."""

import importlib
import os
import re
import time

import pytest
import torch
import torch.distributed as dist
from ranks import COLLECTIVE_TIMEOUT_S, run_ranks

import syncbn
from syncbn import checks

ALL_RANKS = 3


class Network(torch.nn.Module):
    """Two blocks whose normalization can be skipped, swapped, frozen or given other input on one rank."""

    def __init__(self, disturbance: str | None):
        super().__init__()
        self.first = torch.nn.Sequential(torch.nn.Linear(4, 3), syncbn.SyncBatchNorm(3))
        self.second = torch.nn.Sequential(torch.nn.Linear(3, 3), syncbn.SyncBatchNorm(3))
        self.disturbance = disturbance
        if disturbance == "evaluates":
            self.second[1].eval()
        if disturbance == "has other channels":
            self.second = torch.nn.Sequential(torch.nn.Linear(3, 5), syncbn.SyncBatchNorm(5))
        if disturbance == "has frozen parameters":
            self.second[1].requires_grad_(False)

    def forward(self, x):
        if self.disturbance == "runs another order":
            return self.first(torch.nn.functional.pad(self.second(x[:, :3]), (0, 1)))
        x = self.first(x)
        if self.disturbance == "raises":
            raise MemoryError("no room for this batch")
        if self.disturbance == "skips a layer":
            return x
        if self.disturbance == "has another dtype":
            x = x.bfloat16()
            self.second.bfloat16()
        return self.second(x)


def train(disturbance: str, timeout_s: float | None) -> tuple[str, str, float]:
    model = Network(disturbance if dist.get_rank() == 1 else None)
    start = time.monotonic()
    try:
        with syncbn.detect_desync(timeout_s):
            for _ in range(2):
                model(torch.randn(4, 4)).float().pow(3).sum().backward()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "nothing", "", time.monotonic() - start


DISTURBANCES = {  # the row of rank 1 in the table
    "skips a layer": r"1 +first.1 +backward +3 +float32 +True",
    "runs another order": r"1 +second.1 +forward",
    "evaluates": r"1 +first.1 +backward .* after evaluating second.1",
    "has other channels": r"1 +second.1 +forward +5 +float32 +True +input weight bias",
    "has another dtype": r"1 +second.1 +forward +3 +bfloat16",
    "has frozen parameters": r"1 +second.1 +forward +3 +float32 +True +input\s*\n",
    "raises": r"1 +first.1 .* raised MemoryError: no room for this batch",
}


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_the_rank_and_the_layer_are_named_on_every_rank_in_time(disturbance):
    for rank, (error, message, seconds) in enumerate(run_ranks(ALL_RANKS, train, disturbance, 2.0)):
        if disturbance == "raises" and rank == 1:
            assert error == "MemoryError"
            continue
        assert error == "DesyncError"
        assert seconds < COLLECTIVE_TIMEOUT_S / 2
        row = r"0 +(second|first).1 +forward +3 +float32 +True +input weight bias"
        assert re.search(row, message) or rank == 1, message
        assert re.search(DISTURBANCES[disturbance], message), message


def test_ranks_in_step_go_undisturbed_and_leave_no_hooks():
    for error, _, _ in run_ranks(2, train, "nothing", 5.0):
        assert error == "nothing"
    hooks = torch.nn.modules.module._global_forward_pre_hooks
    with syncbn.detect_desync():
        assert len(hooks) == 1
    assert len(hooks) == 0


def train_in_nested_blocks() -> str:
    layer, x = syncbn.SyncBatchNorm(3), torch.randn(4, 3)
    with syncbn.detect_desync(5.0):
        layer(x)
        for _ in range(2):
            with syncbn.detect_desync(5.0):
                layer(x)
                layer.double()(x.double())
                layer.float()
        for _ in range(4):
            layer(x)
    return "in step"


def test_blocks_may_be_nested():
    assert run_ranks(2, train_in_nested_blocks) == ["in step", "in step"]


def test_a_compiled_network_runs_within_a_block():
    layer = syncbn.SyncBatchNorm(3)
    layer.compile(backend="aot_eager", fullgraph=True)
    with syncbn.detect_desync():
        assert layer(torch.randn(4, 3)).shape == (4, 3)


def wait_for_a_rank_that_never_comes(collective_timeout_s: float) -> tuple[str, float]:
    layer, start = syncbn.SyncBatchNorm(3), time.monotonic()
    try:
        with syncbn.detect_desync():
            layer(torch.randn(4, 3))
            if dist.get_rank() == 0:
                layer(torch.randn(4, 3))
            else:
                time.sleep(collective_timeout_s / 2 + 1)
    except syncbn.DesyncError as error:
        return str(error), time.monotonic() - start
    return "nothing", 0


def test_without_a_time_out_of_its_own_it_speaks_before_the_collectives_would():
    timeout_s = 6
    ranks = run_ranks(2, wait_for_a_rank_that_never_comes, timeout_s, collective_timeout_s=timeout_s)
    (first, seconds), (second, _) = ranks
    assert "1     SyncBatchNorm  forward  3         float32  True      weight bias  not here" in first
    assert timeout_s / 2 <= seconds < timeout_s
    assert "(end of detect_desync)" in second


def train_in_a_group_of_two() -> str:
    group = syncbn.new_sync_groups(2)
    layer = syncbn.SyncBatchNorm(3 if dist.get_rank() != 3 else 2, process_group=group)
    block = syncbn.detect_desync(5.0)  # not exited, as with the environment variable: all ranks must exit together
    block.__enter__()
    try:
        layer(torch.randn(4, layer.num_features))
    except syncbn.DesyncError as error:
        return str(error)
    return "nothing"


def test_only_the_group_of_the_deviating_rank_is_affected():
    ranks = run_ranks(4, train_in_a_group_of_two)
    assert ranks[:2] == ["nothing", "nothing"]
    for message in ranks[2:]:
        assert "\n2     SyncBatchNorm  forward  3 " in message
        assert "\n3     SyncBatchNorm  forward  2 " in message


def train_with_a_frozen_rank(value: str) -> str:
    os.environ["SYNCBN_DETECT_DESYNC"] = value
    importlib.reload(checks)  # reads the variable
    layer = syncbn.SyncBatchNorm(3).requires_grad_(dist.get_rank() == 0)
    try:
        layer(torch.randn(4, 3))
    except Exception as error:
        return type(error).__name__
    return "nothing"


@pytest.mark.parametrize("value, error", [("1", "DesyncError"), ("0", "nothing")])
def test_the_environment_variable_switches_it_on(value, error):
    assert run_ranks(2, train_with_a_frozen_rank, value) == [error] * 2


def refusal_under_detection() -> str:
    try:
        with syncbn.detect_desync(5.0):
            syncbn.SyncBatchNorm(3)(torch.randn(4, 3 + dist.get_rank()))
    except syncbn.DesyncError as error:
        return str(error)
    return "nothing"


def test_bad_input_on_one_rank_is_shown_beside_the_good_one():
    for message in run_ranks(2, refusal_under_detection):
        assert "\n0     SyncBatchNorm  forward  3 " in message
        assert "\n1     SyncBatchNorm  forward  4 " in message


def compare(change: str) -> str:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model.register_buffer("empty", torch.empty(0, 3))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    model.register_buffer("conjugate", torch.ones(2, dtype=torch.complex64).conj())
    if dist.get_rank() == 1:
        if change == "value":
            model[1].running_mean[1] = 1e-30
            model[0].bias.data.add_(1)
        elif change == "dtype":
            model[0].half()
        elif change == "no data":
            model[0].to_empty(device="meta")
        elif change == "missing":
            model[1] = torch.nn.BatchNorm1d(2, affine=False)
    try:
        syncbn.assert_replicas_equal(model)
    except AssertionError as error:
        return str(error)
    return "equal"


@pytest.mark.parametrize(
    "change, expected",
    [
        ("nothing", "equal"),
        ("value", "0.bias: ranks [0, 2] against ranks [1]\n  1.running_mean: ranks [0, 2] against ranks [1]"),
        ("dtype", "0.weight: ranks [0, 2] against ranks [1]\n  0.bias: ranks [0, 2] against ranks [1]"),
        ("no data", "0.weight: ranks [0, 2] against ranks [1]\n  0.bias: ranks [0, 2] against ranks [1]"),
        ("missing", "1.weight: ranks [0, 2]; missing on ranks [1]\n  1.bias: ranks [0, 2]; missing on ranks [1]"),
    ],
)
def test_replicas_that_differ_are_named_with_their_ranks(change, expected):
    for message in run_ranks(3, compare, change):
        assert message == expected or message == f"expected equal replicas, got differences in:\n  {expected}"


def test_replicas_of_one_process_are_equal():
    syncbn.assert_replicas_equal(torch.nn.Linear(2, 2))
