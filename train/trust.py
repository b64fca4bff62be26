"""What a checkpoint file may name: the classes and functions that its configuration may build.

`train.evaluate`, `train.export` and `train.predict` build what the configuration in the file names. Such a file may
come from anyone, and Hydra calls any function that it names. A resumed run builds nothing from the file, whose
configuration it only compares with its own.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any

import torchvision
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from train.distenv import Refusal

# By module. The data sets are those that `train.datasets.torchvision_dataset` opens; none unpickles unknown content.
FACTORIES = {
    "lightning.pytorch": ("Trainer",),
    "lightning.pytorch.callbacks": ("EarlyStopping", "LearningRateMonitor", "ModelCheckpoint"),
    "lightning.pytorch.profilers": ("SimpleProfiler",),
    "syncbn.lightning": ("SyncBatchNormPlugin",),
    "timm": ("create_model",),
    "torchvision.datasets": ("CIFAR10", "CIFAR100", "EMNIST", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"),
    "train.augment": ("CropAndFlip",),
    "train.best": ("Best",),
    "train.callbacks": ("History", "Throughput", "progress"),
    "train.data": ("ImageData",),
    "train.datasets": ("digits", "fake", "imagefolder", "torchvision_dataset"),
    "train.loggers": ("MLFlow", "MetricsFile", "TensorBoard", "WandB"),
    "train.mixing": ("Mixing",),
    "train.mlp": ("MLP",),
    "train.models": ("timm_model", "torchvision_model"),
    "train.norms": ("Norm", "batch_norm", "group_norm", "local", "synchronized", "torch_synchronized"),
    "train.optim": ("build_optimizer", "constant", "one_cycle", "warmup_cosine", "warmup_steps"),
    "train.plugins": ("TorchSyncBatchNormPlugin", "strategy"),
    "train.preact_resnet": ("preact_resnet",),
    "train.snapshots": ("Snapshots",),
    "train.statistics": ("AveragedWeights", "EqualBuffers", "Histograms", "Recalibrate", "ReplicaCheck"),
    "train.timing": ("TimeShares",),
}
NAMES = frozenset(f"{module}.{name}" for module, names in FACTORIES.items() for name in names)
# Any other class of these kinds: package, module that must define the class, base class.
KINDS: tuple[tuple[str, str, type], ...] = (
    ("syncbn", "syncbn.", nn.Module),
    ("torch.nn", "torch.nn.modules.", nn.Module),
    ("torch.optim", "torch.optim.", Optimizer),
    ("torch.optim", "torch.optim.", LRScheduler),
    ("torchvision.models", "torchvision.models.", nn.Module),
    ("torchvision.transforms", "torchvision.transforms.", object),
)
RESOLVERS = ("accelerator", "local_world_size", "num_nodes", "run_stamp", "world_size")  # those of `distenv`
REFERENCE = re.compile(r"\$\{[\w.]+\}")
RESOLVER = re.compile(rf"\$\{{({'|'.join(RESOLVERS)}):\}}")
NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+")
OPTION = "trust=true builds whatever the checkpoint names: for a file of your own that uses your own classes."

_everything: ContextVar[bool] = ContextVar("everything", default=False)


@contextmanager
def everything(granted: bool = True) -> Iterator[None]:
    """Build whatever a checkpoint names, as `trust=true` does; only for files from a known source."""
    token = _everything.set(granted)
    try:
        yield
    finally:
        _everything.reset(token)


def check(path: Path, config: Any) -> None:
    """Raise Refusal if the configuration in a checkpoint names something that a checkpoint may not build.

    Nothing that it names is built or called, and no module outside the packages of this list is imported.

    Args:
        path: file name for the message.
        config: as stored in the checkpoint, with its interpolations.
    """
    if not isinstance(config, Mapping):
        raise Refusal(f"{path} must contain a configuration of names and values, got {type(config).__name__}")
    if _everything.get():
        return
    try:
        for key, value in _values(config):
            _check_interpolations(path, key, value)
        resolved = OmegaConf.to_container(OmegaConf.create(_without_resolvers(config)), resolve=True)
        for key, value in _values(resolved):
            if isinstance(value, str) and "${" in value:
                raise _refusal(path, f"{value} in {key}, which is composed of parts")
            if isinstance(value, Mapping) and "_target_" in value:
                _check_target(path, key, value)
    except (OmegaConfBaseException, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise Refusal(f"the configuration in {path} cannot be resolved ({reason}): use another checkpoint") from None


def may_be_built(name: str) -> bool:
    """Return whether a checkpoint may name this class or function."""
    if name in NAMES:
        return True
    if not NAME.fullmatch(name):
        return False
    found = _found(name)
    if isinstance(found, type):
        return any(found.__module__.startswith(home) and issubclass(found, base) for _, home, base in KINDS)
    return found is not None and (found is torchvision.models.get_model or _is_model_builder(found))


def _found(name: str) -> Any:
    """Return the object of a name in one of the packages of `KINDS`, or None; it is found where Hydra finds it."""
    for package in {package for package, _, _ in KINDS}:
        if name.startswith(f"{package}."):
            found: Any = import_module(package)
            for part in name.removeprefix(f"{package}.").split("."):
                found = getattr(found, part, None)
            return found
    return None


def _is_model_builder(found: Any) -> bool:
    models = torchvision.models
    return str(getattr(found, "__module__", "")).startswith("torchvision.models.") and any(
        found is models.get_model_builder(name) for name in models.list_models()
    )


def _check_interpolations(path: Path, key: str, value: Any) -> None:
    """Check that a value refers to other values and our own resolvers only, and a target to nothing."""
    if isinstance(value, str) and "${" in (
        value if key.endswith("_target_") else RESOLVER.sub("", REFERENCE.sub("", value))
    ):
        raise _refusal(path, f"the interpolation {value} in {key}")


def _check_target(path: Path, key: str, node: Mapping[str, Any]) -> None:
    name = node["_target_"]
    where = f"{key}._target_" if key else "_target_"
    if name == "hydra.utils.get_class":
        _check_class(path, key, node)
    elif not isinstance(name, str) or not may_be_built(name):
        raise _refusal(path, f"{name} in {where}")
    elif name == "timm.create_model":
        _check_timm(path, key, node)


def _check_class(path: Path, key: str, node: Mapping[str, Any]) -> None:
    """Check `hydra.utils.get_class`, which returns the class of a name without calling it."""
    name = node.get("path")
    if set(node) != {"_target_", "path"} or not isinstance(name, str) or not may_be_built(name):
        raise _refusal(path, f"{name} in {key}.path")


def _check_timm(path: Path, key: str, node: Mapping[str, Any]) -> None:
    """Check the arguments of `timm.create_model`: some name files or addresses of weights and code."""
    for name, value in node.items():
        is_source = name in ("_args_", "checkpoint_path", "cache_dir") or str(name).startswith("pretrained_")
        if is_source and value is not None:
            raise _refusal(path, f"{name} of timm.create_model in {key}")
    if not re.fullmatch(r"[\w.]+", str(node.get("model_name"))):
        raise _refusal(path, f"{node.get('model_name')} in {key}.model_name, which is not a model of timm")


def _values(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every mapping, list and value of a tree with its dotted key."""
    yield key, node
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _values(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for position, child in enumerate(node):
            yield from _values(child, f"{key}[{position}]")


def _without_resolvers(node: Any) -> Any:
    """Return a copy of a tree in which every resolver is replaced by its name, so that none is called."""
    if isinstance(node, Mapping):
        return {name: _without_resolvers(child) for name, child in node.items()}
    if isinstance(node, list | tuple):
        return [_without_resolvers(child) for child in node]
    return RESOLVER.sub(r"\1", node) if isinstance(node, str) else node


def _refusal(path: Path, what: str) -> Refusal:
    return Refusal(
        f"a checkpoint may build only what train/trust.py lists, and {path} names {what}: nothing was built; if the "
        "file and the code that it names are your own, add trust=true"
    )
