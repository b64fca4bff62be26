"""convert_sync_batchnorm and revert_sync_batchnorm: the same module objects, with another class.

Only the class of a module changes, so parameters, buffers, hooks, flags, attributes and every reference to the module
stay as they are, and the way back restores the class exactly.
"""

import inspect
import sys
from contextlib import nullcontext
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from syncbn import groups
from syncbn.collectives import release_peers
from syncbn.functional import (
    check_per_channel,
    most_common_size,
    normalize_over_group,
    running_of,
    sync_batch_norm,
)
from syncbn.module import (
    BatchNorm,
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    call_module,
    initialize_lazy,
)
from syncbn.recomputation import may_be_checkpointed, unless_recomputing
from syncbn.statistics import Epilogue

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_COUNTERPARTS: dict[type[nn.Module], type[SyncBatchNorm]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    BatchNorm: SyncBatchNorm,
}


def convert_sync_batchnorm(module: ModuleT, process_group: Any = None) -> ModuleT:
    """Turn every batch normalization in `module`, including itself, into a `SyncBatchNorm`, in place; return `module`.

    A BatchNorm1d, 2d or 3d, and any subclass, becomes an instance of a class that inherits from both, so that
    `isinstance` and its own methods stay; torch's SyncBatchNorm becomes ours. Lazy layers become synchronized when they
    are initialized. For a `SyncBatchNorm`, only the process group is set.

    Args:
        process_group: the ranks that share statistics, or a DeviceMesh with one dimension; all ranks by default.

    Raises:
        TypeError: `process_group` is not a process group; nothing is converted.
        TypeError: a layer cannot be synchronized; nothing is converted. These are layers whose forward neither calls
            super().forward() nor torch's batch_norm function, or is set on the instance; subclasses of torch's
            SyncBatchNorm; layers compiled by torch.jit.script; and layers whose class a tool has generated, such as
            parametrizations and fully_shard, which are to be applied after the conversion.
    """
    process_group = groups.checked(process_group)
    layers: list[tuple[str, Any]] = []
    for name, layer in module.named_modules():
        if isinstance(layer, torch.jit.ScriptModule) and "BatchNorm" in layer.original_name:
            raise TypeError(
                f"expected modules that run in Python, got a scripted {layer.original_name} at '{name}': convert the "
                "model before torch.jit.script"
            )
        if isinstance(layer, _BatchNorm):
            layers.append((name, layer))
    classes = [_synced_class(name or "the module itself", layer) for name, layer in layers]
    for (_, layer), synced_class in zip(layers, classes, strict=True):
        if not isinstance(layer, SyncBatchNorm):
            layer.unsynced_class = type(layer)
            layer.unsynced_group = vars(layer).get("process_group")
            layer.__class__ = synced_class
        if process_group is not None:
            layer.process_group = process_group
    return module


def _class_method(cls: type[SyncBatchNorm], module: ModuleT, process_group: Any = None) -> ModuleT:
    """Call `syncbn.convert_sync_batchnorm`, for code written for torch's class; in place, unlike torch's method."""
    return convert_sync_batchnorm(module, process_group)


SyncBatchNorm.convert_sync_batchnorm = classmethod(_class_method)  # type: ignore[assignment]


def revert_sync_batchnorm(module: ModuleT) -> ModuleT:
    """Restore the class of every `SyncBatchNorm` in `module`, including itself; return `module`.

    A layer that was constructed as `SyncBatchNorm` becomes a `syncbn.BatchNorm`. Statistics and parameters stay.

    Raises:
        TypeError: the class of a layer has changed since the conversion (as parametrizations and fully_shard do), or is
            a subclass of SyncBatchNorm, which has no counterpart without synchronization; nothing is reverted.
    """
    layers: list[tuple[str, Any]] = [
        (name, layer) for name, layer in module.named_modules() if isinstance(layer, SyncBatchNorm)
    ]
    for name, layer in layers:
        plain_class = _plain_class(layer)
        expected: Any = SyncBatchNorm if plain_class is None else _counterpart(plain_class)
        if plain_class is None and isinstance(layer, nn.modules.lazy.LazyModuleMixin):
            raise TypeError(
                f"expected initialized layers to revert, got a {type(layer).__name__} at '{name}' that has not seen a "
                "batch: run one through the model first"
            )
        if type(layer) is not expected:
            raise TypeError(
                f"expected a {expected.__name__} to revert, got {type(layer).__name__} at '{name}': undo what changed "
                "its class first (parametrizations, fully_shard); a subclass of SyncBatchNorm has no way back"
            )
    for _, layer in layers:
        plain_class = _plain_class(layer) or BatchNorm
        process_group = layer.unsynced_group
        for attribute in ("unsynced_class", "unsynced_group", "process_group"):
            vars(layer).pop(attribute, None)
        layer.__class__ = plain_class
        if plain_class is nn.SyncBatchNorm:
            layer.process_group = process_group
    return module


def _synced_class(name: str, layer: _BatchNorm) -> type[nn.Module]:
    """Return the class for `layer`; raise if it cannot be synchronized."""
    plain_class: Any = type(layer)
    if isinstance(layer, SyncBatchNorm):
        return plain_class
    if _is_generated(plain_class):
        raise TypeError(
            f"expected a class with a definition, got a {plain_class.__name__} at '{name}', which "
            f"{plain_class.__module__} has generated: convert the model first, and apply that afterwards"
        )
    if "forward" in vars(layer):
        raise TypeError(
            f"expected the forward of the class, got a {plain_class.__name__} at '{name}' with a forward set on the "
            "instance, which cannot be synchronized: remove it, or subclass the layer"
        )
    if plain_class not in _COUNTERPARTS and not _is_within_reach(plain_class):
        raise TypeError(
            f"expected a batch normalization whose forward calls super().forward() or torch's batch_norm function, got "
            f"{plain_class.__name__} at '{name}': call one there, or replace the module by a BatchNorm"
        )
    clashes = _clashing_names(layer)
    if clashes:
        raise TypeError(
            f"expected a layer without attributes that a SyncBatchNorm has, got {', '.join(clashes)} in "
            f"{plain_class.__name__} at '{name}': rename them"
        )
    return _counterpart(plain_class)


_OUR_NAMES = (
    frozenset(dir(SyncBatchNorm)) - frozenset(dir(nn.BatchNorm2d)) - {"unsynced_class", "unsynced_group", "qconfig"}
)


def _clashing_names(layer: _BatchNorm) -> list[str]:
    """Return attributes of a user's subclass that our class would hide, or take for its own."""
    plain_class: Any = type(layer)
    if plain_class in _COUNTERPARTS or issubclass(plain_class, BatchNorm):
        return []
    defined = {name for cls in plain_class.__mro__[: plain_class.__mro__.index(_BatchNorm)] for name in vars(cls)}
    own = {*vars(layer), *layer._parameters, *layer._buffers, *layer._modules}
    return sorted((defined | own) & _OUR_NAMES)


def _plain_class(layer: SyncBatchNorm) -> Any:
    """Return the class to restore, or None for a layer that was not converted."""
    plain_class: Any = layer.unsynced_class
    is_initialized = not isinstance(layer, nn.modules.lazy.LazyModuleMixin)
    if plain_class is not None and issubclass(plain_class, nn.modules.lazy.LazyModuleMixin) and is_initialized:
        return plain_class.cls_to_become
    return plain_class


def _is_generated(cls: Any) -> bool:
    """Return whether a tool has made the class: it is neither found in its module nor defined inside a function."""
    found: Any = sys.modules.get(cls.__module__)
    for name in cls.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is not cls and "<locals>" not in cls.__qualname__


def _counterpart(plain_class: Any) -> type[nn.Module]:
    return _COUNTERPARTS.get(plain_class) or _synced_subclass(plain_class)


def _own_forwards(plain_class: Any) -> list[set[str]]:
    """Return the names that each forward before torch's own refers to, in the order of the classes."""
    names = []
    for cls in plain_class.__mro__:
        if cls is _BatchNorm:
            break
        if "forward" in vars(cls):
            code = getattr(inspect.unwrap(vars(cls)["forward"]), "__code__", None)
            names.append(set(code.co_names) if code is not None else set())
    return names


def _is_within_reach(plain_class: Any) -> bool:
    """Return whether every forward calls torch's batch_norm function or super().forward()."""
    if issubclass(plain_class, nn.SyncBatchNorm):
        return False
    for names in _own_forwards(plain_class):
        if "batch_norm" in names:
            return True
        if not {"super", "forward"} <= names:
            return False
    return True


class _SyncedFunctional(TorchFunctionMode):
    """Replaces torch's batch_norm functions by ours in training, over the group of the block `peers`."""

    def __init__(self, peers: release_peers) -> None:
        super().__init__()
        self.peers = peers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self.functional(*args, **kwargs)
        if func is torch.batch_norm:
            return self.native(*args, **kwargs)
        return func(*args, **kwargs)

    def functional(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """Compute torch.nn.functional.batch_norm, over the group in training."""
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if not self.peers.are_waiting:  # a group of one rank, or the second call in a forward
            group = self.peers.process_group
            return sync_batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps, group)
        tensors = {"weight": weight, "running_mean": running_mean, "bias": bias, "running_var": running_var}
        self.peers.num_features = most_common_size(input, list(tensors.values()))
        check_per_channel(input, tensors)
        running = running_of(running_mean, running_var, None, momentum)
        options: Any = {"num_features": None, "eps": eps, "running": running}
        return normalize_over_group(self.peers, input, weight, bias, Epilogue(), **options)

    def native(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        """Compute torch.batch_norm, over the group in training."""
        return self.functional(input, running_mean, running_var, weight, bias, training, momentum, eps)


@cache
def _synced_subclass(plain_class: Any) -> type[nn.Module]:
    """Return a class with the forward of `plain_class` whose normalization is synchronized in training.

    Its `super().forward()` is that of SyncBatchNorm; calls of torch's batch_norm functions are intercepted.
    """

    calls_functional = any("batch_norm" in names for names in _own_forwards(plain_class))

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        proxy = next((value for value in (*args, *kwargs.values()) if isinstance(value, Proxy)), None)
        if proxy is not None:
            return call_module(self, proxy, *args, **kwargs)
        if not self.training:
            return plain_class.forward(self, *args, **kwargs)
        counted = self.num_batches_tracked
        tracked = counted.clone() if counted is not None and may_be_checkpointed() else None
        try:
            with release_peers(self.process_group, self.num_features, layer=self) as peers:
                peers.announce(next(iter((*args, *kwargs.values())), None), self.weight, self.bias)
                with _SyncedFunctional(peers) if calls_functional else nullcontext():
                    return plain_class.forward(self, *args, **kwargs)
        finally:  # checkpointing ends a recomputation by an exception once it has all tensors
            if tracked is not None:
                self.num_batches_tracked.copy_(unless_recomputing(self.num_batches_tracked, tracked))

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:  # pickle cannot import a class made here
        return _rebuild, (plain_class,), self.__getstate__()

    members: dict[str, Any] = {"__reduce_ex__": reduce}
    if _own_forwards(plain_class):  # others inherit that of SyncBatchNorm
        members["forward"] = forward
    if issubclass(plain_class, nn.modules.lazy.LazyModuleMixin):
        members["cls_to_become"] = _counterpart(plain_class.cls_to_become)

        def initialize_parameters(self: Any, input: Tensor) -> None:
            initialize_lazy(self, partial(plain_class.initialize_parameters, self), input)

        members["initialize_parameters"] = initialize_parameters
    return type(f"Sync{plain_class.__name__}", (plain_class, SyncBatchNorm), members)


def _rebuild(plain_class: Any) -> nn.Module:
    synced_class = _synced_subclass(plain_class)
    return synced_class.__new__(synced_class)
