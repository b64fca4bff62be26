"""Population statistics for evaluation: measured over a data set, or merged from ranks that trained without sync."""

import math
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
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
from syncbn.module import SyncBatchNorm
from syncbn.statistics import pack, unbiased, unpack


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    num_batches: int | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> int:
    """Set the running statistics of every batch normalization to those of its input over `batches` of all ranks.

    These are the mean and the unbiased variance over all values that reached a layer, so that batches and ranks are
    weighted by their size. During the passes each layer normalizes with the statistics of its batch, as in training (a
    `SyncBatchNorm` with those of its group). All other modules are in evaluation mode: dropout is off, no random
    generator is used, and no other buffer changes. A running average lags behind the weights and depends on momentum;
    these statistics do neither.

    Every rank of the group must call it. Loaders may differ in length: a rank that has no batch left takes part with an
    empty batch, which the model must accept.

    Args:
        model: with `SyncBatchNorm`, `torch.nn.BatchNorm*d` or `torch.nn.SyncBatchNorm` layers; layers without running
            statistics are not changed.
        batches: inputs of the model, or tuples or lists whose first element is the input; on the model's device.
        num_batches: the largest number of batches of this rank; all by default.
        process_group: the ranks whose data is used; all of them by default.

    Returns:
        The number of batches that this rank has read.

    Raises:
        ValueError: no rank has a batch; on every rank.
        TypeError: a batch is neither a tensor nor a tuple or list that begins with one; on this rank.
        RuntimeError: the loader, the batch or (if the model does not communicate) the model of another rank has failed.
            On its own rank, an exception of the model or the loader is raised unchanged. Statistics then stay as they
            were; training flags are restored in any case.

    Source: Ioffe & Szegedy 2015, Algorithm 2, lines 8 to 12; Wu & Johnson 2021, section 3 (PreciseBN).
    """
    layers = _tracking_layers(model)
    communicates = any(isinstance(layer, SyncBatchNorm | nn.SyncBatchNorm) for layer in model.modules())
    sums: dict[int, Tensor] = {}
    calls: Counter[int] = Counter()
    read = 0
    with _only_batch_norms_in_training(model, layers), _observed(layers, sums, calls):
        steps = _in_step(batches, num_batches, process_group)
        for batch, is_own in steps:
            try:
                model(batch)
            except Exception as error:
                error.add_note(f"This was batch {read + is_own} of recalibrate on this rank, {tuple(batch.shape)}.")
                if communicates:  # the other ranks are in the model's collectives, not in those between steps
                    raise
                steps.throw(error)
            read += is_own
    if layers:
        _write_population_statistics(layers, sums, calls, process_group)
    return read


@torch.no_grad()
def merge_running_stats(model: nn.Module, count: float = 1.0, process_group: dist.ProcessGroup | None = None) -> None:
    """Replace the running statistics of each rank by those of the ranks together, for models trained without sync.

    The pooled variance is E[var] + Var[mean] over ranks; an average of the variances alone would ignore that the means
    of the ranks differ.

    Args:
        count: weight of this rank, for example the number of samples that it has trained on. A rank with 0 is ignored.
        process_group: the ranks to merge; all of them by default.

    Raises:
        ValueError: a count is negative or not finite, or none is positive; on every rank, nothing is changed.
    """
    layers = _tracking_layers(model)
    if not layers:
        return
    is_valid = math.isfinite(count) and count >= 0
    weight = layers[0].running_mean.new_tensor(count if is_valid else math.nan, dtype=torch.float64)
    vectors = [pack(weight, layer.running_mean, layer.running_var.double() * weight) for layer in layers]
    vectors = [torch.where(weight == 0, 0, vector) for vector in vectors]
    merged = all_reduce_(torch.cat(vectors), process_group).split([len(vector) for vector in vectors])
    total = merged[0][0]
    if not total > 0:
        raise ValueError(
            f"expected finite counts of at least 0, one of them positive, got {count} on this rank and {float(total)} "
            "over all (nan: another rank's is not valid)"
        )
    for layer, vector in zip(layers, merged, strict=True):
        _, mean, var = unpack(vector / total, group_size(process_group))  # a weight may be below 1, a count may not
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
def _observed(layers: list[Any], sums: dict[int, Tensor], calls: Counter[int]) -> Iterator[None]:
    """Add the packed statistics of each input of this rank to `sums`, and count them, by index of the layer."""

    def observe(index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        mask = args[2] if len(args) > 2 else kwargs.get("mask")
        packed = backends.select(x, mask).pack_stats(x, mask)
        sums[index] = sums[index] + packed if index in sums else packed
        calls[index] += 1

    handles = [
        layer.register_forward_pre_hook(partial(observe, index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _in_step(
    batches: Iterable[Any], num_batches: int | None, process_group: dist.ProcessGroup | None
) -> Generator[tuple[Tensor, bool], None, None]:
    """Yield the inputs of this rank, then empty ones until no rank has any left; with each, whether it is a real one.

    An exception raised here, or thrown into the generator, is raised after the other ranks have been told.
    """
    iterator: Iterator[Any] | None = None
    own: Tensor | None = None
    template: Tensor | None = None
    error: Exception | None = None
    has_any = False
    while True:
        try:
            if error is None:
                iterator = islice(batches, num_batches) if iterator is None else iterator
                own = _next_input(iterator)
        except Exception as exception:
            error, own = exception, None
        state = (None if own is None else (own.shape[1:], own.dtype, own.device.type), error and repr(error))
        states = [state] * group_size(process_group)
        if len(states) > 1:
            dist.all_gather_object(states, state, group=process_group)
        if error is not None:
            raise error
        failures = {rank: failure for rank, (_, failure) in enumerate(states) if failure}
        if failures:
            raise RuntimeError(
                f"expected every rank of the group to go on, got from ranks {failures}: see the error there"
            )
        found = [shape for shape, _ in states if shape is not None]
        if not found:
            break
        has_any = True
        shape, dtype, device = found[0]
        if own is not None:
            template = own
        batch = own if own is not None else _empty_batch(template, shape, dtype, device)
        try:
            yield batch, own is not None
        except Exception as exception:
            error = exception
    if not has_any:
        raise ValueError("expected at least one batch on some rank, got none: is the loader exhausted?")


def _next_input(iterator: Iterator[Any]) -> Tensor | None:
    """Return the model's input of the next batch, None after the last."""
    end = object()
    batch = next(iterator, end)
    if batch is end:
        return None
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, Tensor):
        raise TypeError(
            f"expected batches that are tensors, or tuples or lists that begin with one, got {type(batch).__name__}: "
            "pass a generator that yields the model's input"
        )
    return first


def _empty_batch(template: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: str) -> Tensor:
    return torch.empty((0, *shape), dtype=dtype, device=device) if template is None else template[:0]


def _write_population_statistics(
    layers: list[Any], sums: dict[int, Tensor], calls: Counter[int], process_group: dist.ProcessGroup | None
) -> None:
    vectors = [
        sums.get(index, layer.running_mean.new_zeros(2 * layer.num_features + 1, dtype=torch.float64))
        for index, layer in enumerate(layers)
    ]
    total = all_reduce_(torch.cat(vectors), process_group).split([len(vector) for vector in vectors])
    for index, (layer, vector) in enumerate(zip(layers, total, strict=True)):
        count, mean, var = unpack(vector, calls[index] * group_size(process_group))  # ranks take equally many steps
        seen = count > 0  # a layer that the model did not use keeps what it has
        layer.running_mean.copy_(torch.where(seen, mean, layer.running_mean))
        layer.running_var.copy_(torch.where(seen, unbiased(var, count), layer.running_var))
