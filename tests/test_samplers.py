"""Global batches are the same for every number of ranks, and nothing is padded, dropped or repeated."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from train.samplers import Collate, GlobalBatchSampler, PreparedImages


def samplers(world_size, num_samples=21, size=4, epoch=0, **options):
    made = [
        GlobalBatchSampler(
            num_samples, size, rank=rank, world_size=world_size, **{"shuffle": True, "seed": 3, **options}
        )
        for rank in range(world_size)
    ]
    for sampler in made:
        sampler.set_epoch(epoch)
    return made


def global_batches(world_size, **options):
    """Return the indices of each global batch, combined from all ranks."""
    parts = zip(*samplers(world_size, **options), strict=True)
    return [sorted(index for index, _ in itertools.chain(*batch)) for batch in parts]


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
@pytest.mark.parametrize("num_samples, size", [(21, 4), (9, 8), (1, 3), (16, 5)])
def test_every_number_of_ranks_sees_the_same_global_batches(world_size, num_samples, size):
    options = {"num_samples": num_samples, "size": size}
    assert global_batches(world_size, **options) == global_batches(1, **options)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_is_seen_exactly_once(world_size, shuffle):
    seen = itertools.chain(*global_batches(world_size, shuffle=shuffle))
    assert sorted(seen) == list(range(21))


def test_every_rank_has_as_many_batches_and_as_many_samples_up_to_one():
    ranks = [list(sampler) for sampler in samplers(8, num_samples=9, size=8)]
    assert {len(batches) for batches in ranks} == {2}
    for batch in zip(*ranks, strict=True):
        sizes = [len(part) for part in batch]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[0] == max(sizes)


def test_a_rank_without_a_sample_gets_an_empty_batch():
    last = [list(sampler)[-1] for sampler in samplers(4, num_samples=9, size=8)]
    assert [len(part) for part in last] == [1, 0, 0, 0]


def test_the_global_size_is_known_without_asking_the_other_ranks():
    sampler, *_ = samplers(2, num_samples=21, size=4)
    assert [sampler.global_size(i) for i in range(len(sampler))] == [4, 4, 4, 4, 4, 1]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [global_batches(1, epoch=epoch, seed=seed) for epoch in (0, 1) for seed in (0, 1)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_lightning_finds_set_epoch_on_the_batch_sampler():
    from lightning.fabric.utilities.data import _set_sampler_epoch

    sampler, *_ = samplers(1)
    _set_sampler_epoch(DataLoader(TensorDataset(torch.zeros(21)), batch_sampler=sampler), 7)
    assert next(iter(sampler))[0][1] == 7


def test_a_global_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        GlobalBatchSampler(5, 0, rank=0, world_size=1, shuffle=False)


def test_an_image_is_augmented_alike_whatever_was_drawn_before():
    images = TensorDataset(torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8), torch.arange(5))
    augmented = PreparedImages(images, [v2.RandomCrop(8, padding=3)], seed=1)
    first, _ = augmented[3, 2]
    torch.manual_seed(5)
    again, _ = augmented[3, 2]
    other_epoch, _ = augmented[3, 4]
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other_epoch)


def test_augmenting_leaves_the_callers_random_numbers_alone():
    images = PreparedImages(TensorDataset(torch.zeros(1, 3, 8, 8), torch.zeros(1)), [v2.RandomCrop(8, padding=3)])
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    images[0, 0]
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_collate_stacks_and_keeps_the_shape_of_an_empty_batch():
    collate = Collate((2, 1, 1))
    pixels = torch.tensor([255, 51], dtype=torch.uint8).reshape(2, 1, 1)
    images, labels = collate([(pixels, 3)])
    assert torch.equal(images, pixels[None])
    assert labels.tolist() == [3]
    images, labels = collate([])
    assert (images.shape, images.dtype) == ((0, 2, 1, 1), torch.uint8)
    assert (labels.shape, labels.dtype) == ((0,), torch.int64)
