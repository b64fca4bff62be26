"""Population statistics for evaluation: measured over a data set, or merged from ranks that trained without sync."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import backends
from syncbn.collectives import all_reduce_
from syncbn.groups import group_size
from syncbn.statistics import pack, unpack


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> int:
    """Set the running statistics of every batch normalization to those of its input over `batches` of all ranks.

    The mean and the unbiased variance over all values that a layer saw, so that batches and ranks count by their size.
    Meanwhile each layer normalizes with the statistics of its batch, as in training (a `SyncBatchNorm` with those of
    its group), and all else is in evaluation: dropout is off, no generator is used, no other buffer changes. A running
    average lags behind the weights and depends on momentum; these statistics do neither.

    Every rank of the group must call it. Loaders may differ in length: a rank without a batch left takes part with an
    empty one, which the model has to let pass.

    Args:
        model: with `SyncBatchNorm`, `torch.nn.BatchNorm*d` or `torch.nn.SyncBatchNorm` layers; those without running
            statistics are left alone.
        batches: the model's input, or tuples or lists of which it is the first element; on the model's device.
        num_batches: of this rank at most; all by default.
        process_group: the ranks whose data counts; all of them by default.

    Returns:
        The number of batches that this rank has read.

    Raises:
        ValueError: no rank has a batch, on every rank; statistics stay as they were. What the model or the loader
            raises passes through. Statistics then stay as they were; training flags are restored in any case.

    Source: Ioffe & Szegedy 2015, Algorithm 2, lines 8 to 12; Wu & Johnson 2021, section 3 (PreciseBN).
    """
    layers = _tracking_layers(model)
    sums: dict[int, Tensor] = {}
    read = 0
    with _only_batch_norms_in_training(model, layers), _observed(layers, sums):
        for batch, is_own in _in_step(islice(batches, num_batches), process_group):
            model(batch)
            read += is_own
    if layers:
        _write_population_statistics(layers, sums, process_group)
    return read


@torch.no_grad()
def merge_running_stats(model: nn.Module, count: float = 1.0, process_group: dist.ProcessGroup | None = None) -> None:
    """Replace the running statistics of each rank by those of the ranks together, for models trained without sync.

    The pooled variance is E[var] + Var[mean] over ranks; an average of the variances alone would leave out how the
    ranks' means differ.

    Args:
        count: weight of this rank, for example the number of samples that it has trained on.
        process_group: the ranks to merge; all of them by default.

    Raises:
        ValueError: no rank has a positive count, on every rank.
    """
    layers = _tracking_layers(model)
    if not layers:
        return
    weight = torch.tensor(float(count), dtype=torch.float64, device=layers[0].running_mean.device)
    vectors = [pack(weight, layer.running_mean, layer.running_var.double() * weight) for layer in layers]
    merged = all_reduce_(torch.cat(vectors), process_group).split([len(vector) for vector in vectors])
    for layer, vector in zip(layers, merged, strict=True):
        total = vector[0]
        if not total > 0:
            raise ValueError(f"expected a positive count on some rank, got {float(total)} over all of them")
        _, mean, var = unpack(vector / total)  # a weight may be below 1, a count may not
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)


def _tracking_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


@contextmanager
def _only_batch_norms_in_training(model: nn.Module, layers: list[Any]) -> Iterator[None]:
    """Put `layers` into training without an update of their running statistics, all else into evaluation."""
    training = {module: module.training for module in model.modules()}
    tracking = {layer: layer.track_running_stats for layer in layers}
    try:
        model.eval()
        for layer in layers:
            layer.training, layer.track_running_stats = True, False
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for layer, flag in tracking.items():
            layer.track_running_stats = flag


@contextmanager
def _observed(layers: list[Any], sums: dict[int, Tensor]) -> Iterator[None]:
    """Add the packed statistics of each input of this rank to `sums`, by index of the layer."""

    def observe(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        mask = args[2] if len(args) > 2 else kwargs.get("mask")
        packed = backends.select(x).pack_stats(x, mask)
        sums[index] = sums[index] + packed if index in sums else packed

    handles = [
        layer.register_forward_pre_hook(partial(observe, index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_step(batches: Iterable[Any], process_group: dist.ProcessGroup | None) -> Iterator[tuple[Tensor, bool]]:
    """Yield the inputs of this rank, then empty ones until every rank has had its last; and whether it was its own."""
    iterator = iter(batches)
    template: Tensor | None = None
    has_any = False
    while True:
        batch = next(iterator, None)
        batch = batch[0] if isinstance(batch, tuple | list) else batch
        shapes = [None if batch is None else (batch.shape[1:], batch.dtype, batch.device.type)]
        if group_size(process_group) > 1:
            shapes = shapes * group_size(process_group)
            dist.all_gather_object(shapes, shapes[0], group=process_group)
        found = [shape for shape in shapes if shape is not None]
        if not found:
            break
        has_any = True
        if batch is not None:
            template = batch
            yield batch, True
        else:
            shape, dtype, device = found[0]
            yield (torch.empty((0, *shape), dtype=dtype, device=device) if template is None else template[:0]), False
    if not has_any:
        raise ValueError("expected at least one batch on some rank, got none: is the loader exhausted?")


def _write_population_statistics(
    layers: list[Any], sums: dict[int, Tensor], process_group: dist.ProcessGroup | None
) -> None:
    vectors = [
        sums.get(index, layer.running_mean.new_zeros(2 * layer.num_features + 1, dtype=torch.float64))
        for index, layer in enumerate(layers)
    ]
    total = all_reduce_(torch.cat(vectors), process_group).split([len(vector) for vector in vectors])
    for layer, vector in zip(layers, total, strict=True):
        count, mean, var = unpack(vector)
        seen = count > 0  # a layer that the model did not use keeps what it has
        layer.running_mean.copy_(torch.where(seen, mean, layer.running_mean))
        unbiased_var = var * (count / (count - 1).clamp(min=1))
        layer.running_var.copy_(torch.where(seen, unbiased_var, layer.running_var))
