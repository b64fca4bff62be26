"""Bad input is refused by every rank at once, and the group works on afterwards."""

import re

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

import syncbn

GOOD = torch.randn(4, 3, 2)
BAD = {
    "channels": (torch.randn(4, 5, 2), r"expected input of shape \(N, 3, ...\), got \(4, 5, 2\): num_features is 3"),
    "no_batch_dimension": (torch.randn(3), r"expected input of shape \(N, 3\) or \(N, 3, ...\), got \(3,\)"),
    "integers": (torch.ones(4, 3, 2, dtype=torch.int64), "expected input of a floating dtype, got torch.int64"),
    "complex": (torch.randn(4, 3, dtype=torch.complex64), "expected input of a floating dtype, got torch.complex64"),
    "float64": (torch.randn(4, 3, dtype=torch.float64), "expected input of torch.float32 like the parameters"),
    "device": (torch.empty(4, 3, 2, device="meta"), "expected input on cpu like the parameters, got meta"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("training", [True, False])
def test_one_process_refuses_it_with_what_must_hold_what_came_and_what_to_do(name, training):
    x, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        syncbn.SyncBatchNorm(3).train(training)(x)


def refusals(bad: dict) -> list[str]:
    """Give rank 1 each bad input in turn, and every rank good input after it."""
    messages = []
    layer = syncbn.SyncBatchNorm(3)
    for x, _ in bad.values():
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
    bad = {name: case for name, case in BAD.items() if name != "device"}  # a meta tensor cannot be sent
    ranks = run_ranks(3, refusals, bad)
    for message, (_, expected) in zip(ranks[1], bad.values(), strict=True):
        assert re.search(expected, message)
    for rank in (0, 2):
        assert ranks[rank] == ["expected valid input on every rank, got a refusal from another rank of the group: its "
                               "error says why"] * len(bad)  # fmt: skip


def refuse_functional(shapes: list[tuple[int, ...]]) -> str:
    try:
        syncbn.sync_batch_norm(torch.randn(shapes[dist.get_rank()]), None, None, torch.ones(3), training=True)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_the_functional_form_releases_its_peers_too():
    ranks = run_ranks(2, refuse_functional, [(4, 3), (4, 2)])
    assert "refusal from another rank" in ranks[0]
    assert "got (4, 2)" in ranks[1]


@pytest.mark.parametrize("name", ["running_mean", "running_var", "bias"])
@pytest.mark.parametrize("training", [True, False])
def test_the_functional_form_wants_one_value_per_channel_of_everything(name, training):
    tensors = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "weight": torch.ones(3)}
    with pytest.raises(ValueError, match=rf"expected {name} of shape \(3,\), got \(2,\)"):
        syncbn.sync_batch_norm(GOOD, **tensors | {name: torch.ones(2)}, training=training)


def refuse_something_else() -> str:
    """Rank 1 fails in the check by an error that is no ValueError."""
    try:
        syncbn.SyncBatchNorm(3)(GOOD, residual=None if dist.get_rank() == 0 else "not a tensor")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_peers_are_released_whatever_the_check_raises():
    first, second = run_ranks(2, refuse_something_else)
    assert "refusal from another rank" in first
    assert second.startswith("AttributeError")


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


def test_one_value_per_channel_is_refused_by_a_compiled_layer_too():
    layer = torch.compile(syncbn.SyncBatchNorm(3), backend="aot_eager")
    with pytest.raises(Exception, match="expected more than 1 value per channel when training, got 1 over all 1 ranks"):
        layer(torch.randn(1, 3))


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
            assert message.startswith(
                f"expected more than 1 value per channel when training, got 1 over all {len(sizes)} ranks"
            )


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
