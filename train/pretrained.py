"""Weights from a local file: read without running code, matched by name, with a new head for other classes."""

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.distenv import Refusal
from train.models import adapt_input, first_convolution

# Where a checkpoint keeps its weights, and what wrappers put before their names.
CONTAINERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params")
WRAPPERS = ("module.", "model.", "network.", "net.", "_orig_mod.", "backbone.", "encoder.", "encoder_q.")
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # classifiers of GoogLeNet and Inception v3 that serve training alone
COUNTER = "num_batches_tracked"  # absent from files of torch before 0.4.1
NUMBERED = re.compile(r"\.(norm|conv)\.([12])\.")  # DenseNet's layers in torchvision's own files
# What checkpoints of other trainers hold beside weights: arguments of the command line, and metrics as NumPy numbers,
# whose own pickling names their constructor. None of these runs code.
DTYPES = (np.float64, np.float32, np.int64)
HARMLESS: list[Any] = [Namespace, np.dtype, np.float64(0).__reduce__()[0], *(type(np.dtype(dtype)) for dtype in DTYPES)]
ADDRESS = re.compile(r"[a-z][\w+-]+:")  # as of a web page; `Path` leaves one of its two slashes
SHOWN = 3  # names in a message


class Loaded(NamedTuple):
    """What was taken from a file of weights.

    Attributes:
        taken: number of tensors, buffers included.
        new: names of the tensors that keep their random values: those of the head.
        classes: number of classes of the head in the file; None if it has no head, or its head was taken.
        adapted: name of the first convolution's weight, if it was changed for another number of channels.
    """

    taken: int
    new: list[str]
    classes: int | None
    adapted: str | None

    def line(self, path: Path) -> str:
        """Return a line for the user."""
        parts = [f"pretrained: {self.taken} tensors from {path}"]
        if self.new:
            head = self.new[0].rpartition(".")[0]
            parts.append(f"new head {head}" + (f" (the file has {self.classes} classes)" if self.classes else ""))
        if self.adapted:
            parts.append(f"{self.adapted} adapted to the number of channels")
        return ", ".join(parts)


def load(network: nn.Module, path: Path, num_classes: int) -> Loaded:
    """Copy the weights in a file into a network.

    Every tensor must match in name and shape, with three exceptions: the head keeps its random weights if the file has
    none, or one for another number of classes; the first convolution is adapted to another number of channels; and
    auxiliary classifiers in the file are not used.

    Args:
        path: a state_dict, or a checkpoint that contains one, saved by `torch.save` or as safetensors.

    Raises:
        Refusal: the file cannot be read or is of another network; on every rank that reads it. The network is then
            unchanged.
    """
    expected = network.state_dict()
    found = _with_names_of(expected, read(path))
    head = heads(network, num_classes)
    first = first_convolution(network)
    new_heads = {
        _module_of(name)
        for name, own in expected.items()
        if _module_of(name) in head and (name not in found or _differs_in_classes(found[name], own))
    }
    classes, adapted = None, None
    weights: dict[str, Tensor] = {}
    for name, own in expected.items():
        value = found.get(name)
        if _module_of(name) in new_heads:
            classes = classes if value is None else len(value)
        elif value is None and name.endswith(COUNTER):
            continue
        elif value is not None and value.shape == own.shape:
            weights[name] = value
        elif value is not None and name == f"{first}.weight" and _differs_in_channels(value, own):
            weights[name], adapted = adapt_input(value.float(), own.shape[1]), name
        else:
            raise _mismatch(path, network, name, value, own)
    left = [name for name in found if name not in expected and _module_of(name) not in head]
    left = [name for name in left if not name.startswith(AUXILIARY)]
    if left:
        raise _mismatch(path, network, left[0], found[left[0]], None)
    for name, value in weights.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise Refusal(f"{path} has values in {name} that are not finite: use another file")
    network.load_state_dict(weights, strict=False)
    return Loaded(len(weights), [name for name in expected if _module_of(name) in new_heads], classes, adapted)


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of weights, by name, on the CPU.

    Raises:
        Refusal: the file is missing or damaged, holds other objects than tensors, or no weights.
    """
    if ADDRESS.match(str(path)):
        raise Refusal(f"model.pretrained must be a local file, got {path}: download it first")
    if path.is_dir():
        raise Refusal(f"model.pretrained must be a file, and {path} is a directory: name a file in it")
    if not path.is_file():
        raise Refusal(f"there is no file {path}: name one with model.pretrained=FILE")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    while isinstance(content, Mapping):
        weights = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        container = next((name for name in CONTAINERS if isinstance(content.get(name), Mapping)), None)
        if container is None:
            if weights:
                return weights
            break
        content = content[container]
    raise Refusal(
        f"{path} has no weights: expected a state_dict, or one under {', '.join(CONTAINERS)}; save it with "
        "torch.save(model.state_dict(), FILE)"
    )


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise any exception
        if named := _refused_in(path):
            raise Refusal(
                f"{path} contains objects of {_shown(named)}, which are not built, as they could run any code: "
                "save the weights alone, with torch.save(model.state_dict(), FILE)"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refusal(f"{path} is damaged or not a file of weights ({reason}): use another one") from error


def _refused_in(path: Path) -> list[str]:
    """Return the names of the classes and functions that reading a file would call and that are not harmless."""
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file is damaged, or of the format before torch 1.6
        return []


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise Refusal(f"{path} needs the package safetensors ({error}): pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:
        raise Refusal(f"{path} is damaged or not a safetensors file ({error}): use another one") from error


def _with_names_of(expected: Mapping[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file without the prefixes of wrappers, until their names are those of the network."""
    while not expected.keys() & found.keys():
        inner = [
            {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
            for prefix in WRAPPERS
        ]
        if not any(inner):
            break
        found = max(inner, key=len)
    renamed = {name: NUMBERED.sub(r".\1\2.", name) for name in found}
    return {
        renamed[name] if name not in expected and renamed[name] in expected else name: value
        for name, value in found.items()
    }


def heads(network: nn.Module, num_classes: int) -> set[str]:
    """Return the names of the modules that compute the logits; none if no layer has as many outputs as classes."""
    named = getattr(network, "default_cfg", None)  # of timm's networks
    classifier = named.get("classifier") if isinstance(named, Mapping) else None
    if classifier:
        return {classifier} if isinstance(classifier, str) else set(classifier)
    sized = [
        name
        for name, module in network.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim > 1
    ]
    fitting = {name for name in sized if len(network.get_submodule(name).weight) == num_classes}  # type: ignore[arg-type]
    return {sized[-1]} if sized and sized[-1] in fitting else fitting


def _module_of(name: str) -> str:
    return name.rpartition(".")[0]


def _differs_in_classes(value: Tensor, own: Tensor) -> bool:
    return value.ndim == own.ndim and value.shape[1:] == own.shape[1:] and len(value) != len(own)


def _differs_in_channels(value: Tensor, own: Tensor) -> bool:
    shapes = [(*tensor.shape[:1], *tensor.shape[2:]) for tensor in (value, own)]
    return value.ndim == own.ndim == 4 and shapes[0] == shapes[1]


def _mismatch(path: Path, network: nn.Module, name: str, value: Tensor | None, own: Tensor | None) -> Refusal:
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (value, own)]
    has_batch_norm = any(isinstance(module, _BatchNorm) for module in network.modules())
    if name.endswith(("running_mean", "running_var", COUNTER)) and not has_batch_norm:
        remedy = "its weights are for batch normalization, use norm=sync or norm=local"
    elif "pos_embed" in name and None not in shapes:
        remedy = "its positions are those of another data.image_size"
    else:
        remedy = "choose the model of the file with model=... and its values"
    return Refusal(
        f"{path} is of another network: {name} has shape {shapes[0] or 'none'} in the file and {shapes[1] or 'none'} "
        f"in the network; {remedy}"
    )


def _shown(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
