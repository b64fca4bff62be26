"""Errors of others that need no traceback are sentences: recognized by class, or by words that torch still uses."""

import os

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks
from torch import nn
from torch.nn.functional import batch_norm
from torch.nn.parallel import DistributedDataParallel

import syncbn
from train import errors
from train.distenv import Refusal
from train.samplers import Collate

PEER = "another rank has ended, and this one cannot continue without it: see the error of that rank"


def caught(step, *arguments):
    """The sentence for the error that a step raises."""
    with pytest.raises(Exception) as error:  # noqa: PT011
        step(*arguments)
    return errors.refusal_in(error.value)


def test_a_batch_of_one_value_is_recognized_in_our_layer_and_in_torchs():
    x = torch.ones(1, 3, 1, 1)
    for layer in (syncbn.SyncBatchNorm(3), syncbn.BatchNorm(3), nn.BatchNorm2d(3)):
        sentence = caught(layer, x)
        assert "more than 1 value per channel when training" in sentence
        assert sentence.endswith("; if an epoch's last batch is too small, change data.global_batch_size")
    assert caught(batch_norm, x, None, None, None, None, True) is not None
    with pytest.raises(syncbn.TooFewValuesError):
        syncbn.SyncBatchNorm(3)(x)


def test_errors_of_the_package_have_classes_that_stay_what_callers_catch():
    assert issubclass(syncbn.TooFewValuesError, ValueError)
    assert issubclass(syncbn.PeerError, ValueError)
    assert issubclass(syncbn.DesyncError, RuntimeError)
    assert errors.refusal_in(syncbn.PeerError("x")) == PEER
    assert errors.refusal_in(syncbn.DesyncError("a\ntable")) == "a\ntable"
    assert errors.refusal_in(ValueError("expected input of shape (N, 3)")) is None


def test_a_full_gpu_says_what_to_change():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB: GPU 0 has 80 GiB")
    assert errors.refusal_in(error).startswith("CUDA out of memory. Tried to allocate 2 GiB: lower data.global_batch")


def test_images_of_different_sizes_are_refused_with_both():
    collate = Collate((3, 8, 8))
    with pytest.raises(Refusal, match="must have one size, got 3 x 8 x 8 and 3 x 9 x 8: resize or crop"):
        collate([(torch.zeros(3, 8, 8), 0), (torch.zeros(3, 9, 8), 1)])


class Forgetful(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def sentences_on_ranks():
    os.environ["WORLD_SIZE"] = "2"
    rank = dist.get_rank()
    layer = syncbn.SyncBatchNorm(3)
    x = torch.ones(4, 3, 2, 2) if rank else torch.ones(4, 5, 2, 2)  # rank 0's does not fit
    found = [caught(layer, x)]

    network = DistributedDataParallel(Forgetful())

    def two_steps():
        for _ in range(2):
            network(torch.ones(1, 2)).sum().backward()

    return [*found, caught(two_steps)]


def test_ranks_say_that_another_one_failed_and_that_a_part_has_no_gradient():
    first, second = run_ranks(2, sentences_on_ranks)
    assert first[0] is None  # its own error, with its traceback
    assert second[0] == PEER
    for found in (first, second):
        assert found[1].endswith("set trainer.strategy.find_unused_parameters=true")


def outlive_a_rank(path):
    os.environ["WORLD_SIZE"] = "2"
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(7)
    path.write_text(caught(dist.all_reduce, torch.ones(1)))


def test_a_rank_says_that_another_one_is_gone(tmp_path):
    with pytest.raises(RankError, match="exit code 7"):
        run_ranks(2, outlive_a_rank, tmp_path / "sentence")
    assert (tmp_path / "sentence").read_text() == PEER
