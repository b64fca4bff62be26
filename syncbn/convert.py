"""convert_sync_batchnorm and revert_sync_batchnorm: the same module objects, with another class.

Only the class of a module changes, so parameters, buffers, hooks, flags, attributes and every reference to the module
stay as they are, and the way back restores the class exactly.
"""

import inspect
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from syncbn import groups
from syncbn.functional import sync_batch_norm
from syncbn.module import BatchNorm, SyncBatchNorm

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_PLAIN_CLASSES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNorm)


def convert_sync_batchnorm(module: ModuleT, process_group: dist.ProcessGroup | None = None) -> ModuleT:
    """Make every batch normalization in `module`, itself included, a `SyncBatchNorm`, in place; return `module`.

    BatchNorm1d, 2d, 3d and torch's SyncBatchNorm become `SyncBatchNorm`; a subclass of theirs becomes a class that
    inherits from both, so that its own methods stay. Layers that are synchronized already only get the process group.

    Args:
        process_group: the ranks that share statistics; all of them by default.

    Raises:
        ValueError: a lazy module has not seen its first batch; nothing is converted.
        TypeError: `process_group` is not a process group; nothing is converted.
        TypeError: a subclass has a forward that calls neither super().forward() nor torch's batch_norm function, so
            that it cannot be synchronized; nothing is converted.
    """
    groups.check_process_group(process_group)
    layers: list[tuple[str, Any]] = [
        (name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)
    ]
    classes = [_synced_class(name or "the module itself", layer) for name, layer in layers]
    for (_, layer), synced_class in zip(layers, classes, strict=True):
        if not isinstance(layer, SyncBatchNorm):
            layer.unsynced_class = type(layer)
            layer.unsynced_group = vars(layer).get("process_group")
            layer.__class__ = synced_class
        if process_group is not None:
            layer.process_group = process_group
    return module


def revert_sync_batchnorm(module: ModuleT) -> ModuleT:
    """Give every `SyncBatchNorm` in `module`, itself included, the class it was converted from; return `module`.

    A `SyncBatchNorm` that was constructed as such becomes a `syncbn.BatchNorm`. Statistics and parameters stay.
    """
    layer: Any
    for layer in module.modules():
        if isinstance(layer, SyncBatchNorm):
            plain_class: Any = layer.unsynced_class or BatchNorm
            process_group = layer.unsynced_group
            for attribute in ("unsynced_class", "unsynced_group", "process_group"):
                vars(layer).pop(attribute, None)
            layer.__class__ = plain_class
            if plain_class is nn.SyncBatchNorm:
                layer.process_group = process_group
    return module


def _synced_class(name: str, layer: _BatchNorm) -> type[nn.Module]:
    """Return the class that `layer` gets; raise for one that cannot be synchronized."""
    plain_class: Any = type(layer)
    if isinstance(layer, SyncBatchNorm):
        return plain_class
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        raise ValueError(
            f"expected initialized parameters, got {plain_class.__name__} at '{name}' that has not seen a batch: "
            "run one batch through the model before converting it"
        )
    if plain_class in _PLAIN_CLASSES:
        return SyncBatchNorm
    if not _calls_from_forward(plain_class) & {"super", "batch_norm"}:
        raise TypeError(
            f"expected a batch normalization whose forward calls super().forward() or torch's batch_norm function, got "
            f"{plain_class.__name__} at '{name}': call one there, or replace the module by a BatchNorm"
        )
    return _synced_subclass(plain_class)


def _calls_from_forward(plain_class: Any) -> set[str]:
    """Return which of super and batch_norm the forward of `plain_class` calls; super where it has none of its own."""
    forward = plain_class.forward
    if forward is _BatchNorm.forward:
        return {"super"}
    code = getattr(inspect.unwrap(forward), "__code__", None)
    names = set(code.co_names) if code is not None else set()
    return names & {"batch_norm"} | ({"super"} if {"super", "forward"} <= names else set())


class _SyncedFunctional(TorchFunctionMode):
    """Within it, torch's batch_norm function in training is ours, over the process group of `layer`."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        call = inspect.signature(F.batch_norm).bind(*args, **(kwargs or {})).arguments
        if not call.get("training", False):
            return func(*args, **(kwargs or {}))
        return sync_batch_norm(**call, process_group=self.layer.process_group)


@cache
def _synced_subclass(plain_class: Any) -> type[nn.Module]:
    """Return a class with the forward of `plain_class`, in which normalization in training is synchronized.

    What it calls as `super().forward()` is then that of SyncBatchNorm; what it calls as `batch_norm` is intercepted.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return plain_class.forward(self, *args, **kwargs)
        with _SyncedFunctional(self):
            return plain_class.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:  # the class has no module to be found in
        return _rebuild, (plain_class,), self.__getstate__()

    members: dict[str, Any] = {"__reduce_ex__": reduce}
    if "batch_norm" in _calls_from_forward(plain_class):
        members["forward"] = forward
    return type(f"Sync{plain_class.__name__}", (plain_class, SyncBatchNorm), members)


def _rebuild(plain_class: Any) -> nn.Module:
    synced_class = _synced_subclass(plain_class)
    return synced_class.__new__(synced_class)
