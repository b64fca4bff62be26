"""Which parameters have weight decay, how the rate depends on the batch size, and the LR schedules."""

from functools import partial

import pytest
import torch
from torch import nn

from train import run
from train.optim import build_optimizer, one_cycle, parameter_groups, warmup_cosine, warmup_steps


def small_model():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_kernels_and_matrices_decay_and_norms_and_biases_do_not():
    decaying, others = parameter_groups(small_model(), 0.1, 1.0)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert [tuple(parameter.shape) for parameter in decaying["params"]] == [(2, 1, 3, 3), (3, 8)]
    assert [tuple(parameter.shape) for parameter in others["params"]] == [(2,), (2,), (2,), (3,)]


def test_frozen_parameters_are_left_out():
    model = small_model()
    model[0].requires_grad_(False)
    groups = parameter_groups(model, 0.1, 1.0)
    assert [len(group["params"]) for group in groups] == [1, 3]


def test_the_rate_grows_with_the_global_batch():
    optimizer = build_optimizer(small_model(), factory=torch.optim.SGD, global_batch_size=64, lr_per_256=0.4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_parameters_are_updated_by_one_kernel_where_torch_has_it(kind):
    values = {}
    for fused in (True, False):
        torch.manual_seed(0)
        model = small_model().double()
        optimizer = build_optimizer(
            model, factory=kind, global_batch_size=256, lr_per_256=0.1, weight_decay=0.1, fused=fused
        )
        assert all(bool(group["fused"]) == fused for group in optimizer.param_groups)
        for _ in range(3):
            model(torch.randn(5, 1, 4, 4).double()).square().mean().backward()
            optimizer.step()
        values[fused] = torch.cat([parameter.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(values[True], values[False])


def own_optimizer(groups, lr):
    return torch.optim.SGD(groups, lr=lr)


@pytest.mark.parametrize("factory", [partial(torch.optim.SGD, foreach=True), own_optimizer, torch.optim.RMSprop])
def test_an_implementation_that_was_chosen_or_is_the_only_one_is_kept(factory):
    optimizer = build_optimizer(small_model(), factory=factory, global_batch_size=256, lr_per_256=0.1)
    assert not optimizer.defaults.get("fused")


def test_float16_with_clipping_is_not_fused():
    for precision, clip, is_fused in (("16-mixed", 1.0, False), ("16-mixed", "null", True), ("bf16-mixed", 1.0, True)):
        config = run.compose([f"trainer.precision={precision}", f"trainer.gradient_clip_val={clip}", "model.width=4"])
        model, _ = run.build_model(config)
        assert bool(model.make_optimizer(model.network).defaults.get("fused")) == is_fused


def rates(total_steps, **options):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0)
    scheduler = warmup_cosine(optimizer, total_steps=total_steps, **options)
    course = []
    for _ in range(total_steps):
        course.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return course


def test_the_rate_rises_linearly_and_falls_along_half_a_cosine():
    course = rates(104, steps_per_epoch=4, warmup_epochs=1)
    assert course[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert course[4 + 50] == pytest.approx(1.0)
    assert course == course[:5] + sorted(course[5:], reverse=True)
    assert 0 < course[-1] < 0.01


def test_the_rate_ends_at_the_fraction_asked_for():
    assert rates(1000, steps_per_epoch=1, warmup_epochs=0, final_fraction=0.25)[-1] == pytest.approx(0.5, abs=1e-3)


def test_a_run_shorter_than_its_warm_up_still_has_a_rate():
    assert rates(1, steps_per_epoch=10, warmup_epochs=1) == [2.0]


def course_of(scheduler_of, total_steps, **options):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0, momentum=0.9)
    scheduler = scheduler_of(optimizer, total_steps=total_steps, **options)
    course = []
    for _ in range(total_steps):
        course.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return course


def test_the_papers_steps_start_low_and_fall_tenfold_at_each_milestone():
    course = course_of(warmup_steps, 8, steps_per_epoch=2, milestones=[0.5, 0.75], warmup_epochs=1)
    assert course == pytest.approx([0.2, 0.2, 2, 2, 0.2, 0.2, 0.02, 0.02])


def test_milestones_outside_of_the_run_are_refused():
    with pytest.raises(ValueError, match=r"rising milestones between 0 and 1, shares of the run, got \[30, 60\]"):
        course_of(warmup_steps, 8, steps_per_epoch=2, milestones=[30, 60])


def test_one_cycle_goes_on_in_a_longer_run_than_the_one_it_was_saved_in():
    optimizers = [torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=2.0, momentum=0.9) for _ in range(2)]
    short, long = (
        one_cycle(optimizer, total_steps=steps, steps_per_epoch=2)
        for optimizer, steps in zip(optimizers, (6, 12), strict=True)
    )
    for _ in range(6):
        optimizers[0].step()
        short.step()
    long.load_state_dict(short.state_dict())
    for _ in range(6):
        optimizers[1].step()
        long.step()
    expected = course_of(one_cycle, 12, steps_per_epoch=2)
    assert optimizers[1].param_groups[0]["lr"] < expected[-1]


def test_one_cycle_peaks_at_the_rate_and_ends_far_below_its_start():
    course = course_of(one_cycle, 100, steps_per_epoch=10, warmup_fraction=0.3)
    assert course[0] == pytest.approx(0.08)
    assert max(course) == pytest.approx(2.0, rel=1e-2)
    assert 28 <= course.index(max(course)) <= 31
    assert course[-1] < course[0] / 10
