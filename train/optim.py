"""The optimizer and its LR schedulers: no decay on norms and biases, a rate per 256 images, a change every step."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

RATE_IMAGES = 256
IMPLEMENTATIONS = {"fused", "foreach", "capturable", "differentiable"}  # arguments of torch's optimizers


def parameter_groups(
    model: nn.Module, weight_decay: float, lr: float, rates: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return the trained parameters in groups: matrices and kernels decay, vectors (norms and biases) do not.

    Args:
        lr: learning rate.
        rates: factor on it by name of the parameter, see `train.finetune.rates`; 1 by default. The first groups have
            the highest rate.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(((rates or {}).get(name, 1.0), parameter.ndim > 1), []).append(parameter)
    return [
        {"params": groups[factor, decays], "weight_decay": weight_decay if decays else 0.0, "lr": lr * factor}
        for factor, decays in sorted(groups, reverse=True)
    ]


def build_optimizer(
    model: nn.Module,
    *,
    factory: Callable[..., Optimizer],
    global_batch_size: int,
    lr_per_256: float,
    weight_decay: float = 0.0,
    rates: Mapping[str, float] | None = None,
    fused: bool = True,
) -> Optimizer:
    """Return the optimizer of a model.

    Args:
        factory: `factory(parameter_groups, lr=)`, such as a partial of `torch.optim.SGD`.
        global_batch_size: images per optimizer step over all ranks.
        lr_per_256: learning rate for 256 images; the rate is proportional to the batch (Goyal et al. 2017).
        weight_decay: for all parameters except norms and biases.
        rates: factor on the learning rate by name of the parameter; 1 by default.
        fused: whether to use torch's kernel that updates all parameters at once, if the optimizer has one and `factory`
            chooses no implementation.
    """
    lr = lr_per_256 * global_batch_size / RATE_IMAGES
    options: dict[str, Any] = {"fused": True} if fused and _may_be_fused(factory) else {}
    return factory(parameter_groups(model, weight_decay, lr, rates), lr=lr, **options)


def _may_be_fused(factory: Callable[..., Optimizer]) -> bool:
    chosen = factory.keywords if isinstance(factory, partial) else {}
    return "fused" in inspect.signature(factory).parameters and not chosen.keys() & IMPLEMENTATIONS


def warmup_cosine(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: float,
    warmup_epochs: float = 1.0,
    final_fraction: float = 0.0,
) -> LambdaLR:
    """Return a linear warm-up over `warmup_epochs`, then a cosine decay to `final_fraction` of the rate.

    Source: Goyal et al. 2017 (warm-up), Loshchilov & Hutter 2017 (cosine).
    """
    warmup_steps = min(round(warmup_epochs * steps_per_epoch), total_steps - 1)
    return LambdaLR(
        optimizer,
        partial(_warmup_cosine_factor, total_steps=total_steps, warmup_steps=warmup_steps, final=final_fraction),
    )


def warmup_steps(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: float,
    milestones: Sequence[float],
    gamma: float = 0.1,
    warmup_epochs: float = 0.0,
    warmup_factor: float = 0.1,
) -> LambdaLR:
    """Return a rate that is multiplied by `gamma` at each milestone, and by `warmup_factor` during `warmup_epochs`.

    Args:
        milestones: fractions of the whole run, such as 0.5 and 0.75.

    Source: He et al. 2016, Identity Mappings, appendix: 0.01 for the first 400 steps, then 0.1, divided by 10 twice.
    """
    if sorted(milestones) != list(milestones) or not all(0 < milestone < 1 for milestone in milestones):
        raise ValueError(f"expected rising milestones between 0 and 1, shares of the run, got {list(milestones)}")
    course = partial(
        _steps_factor,
        warmup_steps=round(warmup_epochs * steps_per_epoch),
        warmup_factor=warmup_factor,
        milestones=[round(milestone * total_steps) for milestone in milestones],
        gamma=gamma,
    )
    return LambdaLR(optimizer, course)


def one_cycle(
    optimizer: Optimizer,
    *,
    total_steps: int,
    steps_per_epoch: float,
    warmup_fraction: float = 0.3,
    start_factor: float = 0.04,
    final_factor: float = 1e-4,
) -> OneCycleLR:
    """Return a rise to the optimizer's rate, then a fall far below it; momentum does the reverse.

    Source: Smith & Topin 2018.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycle(
        optimizer,
        peaks,
        total_steps=total_steps + 1,  # the scheduler is also stepped after the last optimizer step
        pct_start=warmup_fraction,
        div_factor=1 / start_factor,
        final_div_factor=start_factor / final_factor,
    )


class OneCycle(OneCycleLR):
    """OneCycleLR that keeps the length of this run when it resumes the checkpoint of a shorter run."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without the length of the run."""
        return {name: value for name, value in super().state_dict().items() if name not in self.of_this_run}

    of_this_run = ("total_steps", "_schedule_phases")


def constant(optimizer: Optimizer, *, total_steps: int, steps_per_epoch: float) -> LambdaLR:
    """Return a schedule with a constant rate."""
    return LambdaLR(optimizer, _one)


def _warmup_cosine_factor(step: int, *, total_steps: int, warmup_steps: int, final: float) -> float:
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return final + (1 - final) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def _steps_factor(
    step: int, *, warmup_steps: int, warmup_factor: float, milestones: Sequence[int], gamma: float
) -> float:
    factor = gamma ** sum(step >= milestone for milestone in milestones)
    return factor * warmup_factor if step < warmup_steps else factor


def _one(step: int) -> float:
    return 1.0
