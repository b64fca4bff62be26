"""Networks of torchvision, of timm and of the user's own code, with the chosen normalization."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
import torchvision
from hydra.utils import get_object
from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.distenv import Refusal

NormLayer = Callable[[int], nn.Module]

SOURCES = ("weights", "weights_backbone", "pretrained", "checkpoint_path", "cache_dir")  # of weights, in both libraries
RGB = 3
instantiate = partial(hydra_instantiate, _convert_="all")


def torchvision_model(
    name: str, *, num_classes: int, in_channels: int = RGB, image_size: int = 224, **arguments: Any
) -> nn.Module:
    """Return a classifier of `torchvision.models` with random weights.

    Auxiliary classifiers (GoogLeNet, Inception v3) are left out. With another number of channels than 3, the first
    convolution is replaced.

    Args:
        name: as in `torchvision.models.list_models(module=torchvision.models)`.
        image_size: height and width of the images; vision transformers are built for it.
        arguments: further arguments of the network.

    Raises:
        Refusal: there is no such model, or it does not accept the arguments.
    """
    _refuse_sources(arguments)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise Refusal(_no_such_model(name, known, "torchvision", "classifier of torchvision.models"))
    if name in ("googlenet", "inception_v3"):
        arguments = {"aux_logits": False, "init_weights": True} | arguments
    has_fixed_size = name.startswith("vit_")
    if has_fixed_size:
        arguments = {"image_size": image_size} | arguments
    make = partial(torchvision.models.get_model, name, weights=None, num_classes=num_classes)
    network = _built(make, f"torchvision's {name}", arguments)
    if in_channels != RGB:
        _replace_first_convolution(network, in_channels, name)
    network.has_fixed_size = has_fixed_size  # type: ignore[assignment]
    return network


def timm_model(
    name: str, *, num_classes: int, in_channels: int = RGB, image_size: int = 224, **arguments: Any
) -> nn.Module:
    """Return a classifier of timm with random weights.

    Args:
        name: as in `timm.list_models()`.
        image_size: height and width of the images; networks with a fixed input size are built for it.
        arguments: further arguments of `timm.create_model`.

    Raises:
        Refusal: timm is not installed, there is no such model, or it does not accept the arguments.
    """
    try:
        import timm
    except ImportError as error:
        raise Refusal(f"model=timm needs the package timm ({error}): pip install timm") from error
    _refuse_sources(arguments)
    if not timm.is_model(name):
        raise Refusal(_no_such_model(name, timm.list_models(), "timm", "model of timm"))
    defaults = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    has_fixed_size = bool(defaults is not None and defaults.fixed_input_size)
    if has_fixed_size:
        arguments = {"img_size": image_size} | arguments
    make = partial(timm.create_model, name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    network = _built(make, f"timm's {name}", arguments)
    network.has_fixed_size = has_fixed_size  # type: ignore[assignment]
    return network


def build(config: DictConfig, norm_layer: NormLayer) -> nn.Module:
    """Return the network of a `model` configuration, with random weights and the chosen normalization.

    A constructor with a parameter `norm_layer` gets it. Any other network keeps its batch normalization, which is
    synchronized like that of the networks here, unless the chosen layer is of another kind and replaces it.

    Args:
        config: `_target_` and its arguments.
        norm_layer: `norm_layer(num_channels)` returns a new layer.

    Raises:
        Refusal: the constructor returns no module, or the normalization cannot be replaced.
    """
    arguments = {name: config[name] for name in config if name != "pretrained"}
    if _takes_norm_layer(config._target_):
        return _module(instantiate(arguments, norm_layer=norm_layer), config._target_)
    network = _module(instantiate(arguments), config._target_)
    replace_norms(network, norm_layer, str(config.get("name", config._target_)))
    return network


def is_own(config: DictConfig) -> bool:
    """Return whether a `model` configuration is of a network that this package defines."""
    return config._target_.startswith("train.") and not config._target_.startswith("train.models.")


def replace_norms(network: nn.Module, norm_layer: NormLayer, name: str) -> None:
    """Replace every batch normalization of a network, unless the chosen one is torch's BatchNorm too.

    The new layers take over the initial weight and bias, which some networks start at 0. The activation that timm
    fuses into a layer follows the new one.

    Args:
        norm_layer: `norm_layer(num_channels)` returns a new layer.
        name: of the network, for messages.

    Raises:
        Refusal: the network has no batch normalization, or a kind that cannot be replaced; or the chosen layer has a
            fused activation or a temperature.
    """
    sample = norm_layer(8)
    if type(sample) is nn.BatchNorm2d:
        return
    if isinstance(sample, _BatchNorm):
        raise Refusal(
            f"norm.activation and norm.temperature are for networks that take a norm layer, and {name} has layers of "
            "its own: leave them out"
        )
    layers: list[tuple[str, Any]] = [
        (place, module) for place, module in network.named_modules() if isinstance(module, _BatchNorm)
    ]
    if not layers:
        raise Refusal(
            f"{name} has no batch normalization that {type(sample).__name__} could replace: use norm=sync, which "
            "leaves other layers as they are"
        )
    for place, layer in layers:
        is_known = type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) or _has_activation(layer)
        if not is_known or not place:
            raise Refusal(
                f"{name} takes no other norm layer: {type(sample).__name__} cannot replace {type(layer).__name__} at "
                f"{place or 'the network itself'}, use norm=sync or norm=local"
            )
    for place, layer in layers:
        new = norm_layer(layer.num_features)
        for parameter in ("weight", "bias"):
            before, after = getattr(layer, parameter), getattr(new, parameter, None)
            if isinstance(after, nn.Parameter) and before is not None:
                after.data.copy_(before.data)
        parent, _, own = place.rpartition(".")
        replacement = nn.Sequential(new, layer.drop, layer.act) if _has_activation(layer) else new
        setattr(network.get_submodule(parent), own, replacement)


def check_output(network: nn.Module, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Run one image of zeros through a network in evaluation mode, and refuse an output that is not its logits.

    Args:
        image_shape: (C, H, W).

    Raises:
        Refusal: the network fails, or its output is not a tensor of shape (1, num_classes).
    """
    training = {module: module.training for module in network.modules()}
    parameter = next(network.parameters(), torch.zeros(()))
    images = torch.zeros(1, *image_shape, dtype=parameter.dtype)
    shape = " x ".join(map(str, image_shape))
    try:
        with torch.no_grad():
            logits = network.eval()(images)
    except Exception as error:
        raise Refusal(
            f"the network does not run on an image of {shape} ({_first_line(error)}): change data.image_size, "
            "data.in_channels or the values of model"
        ) from error
    finally:
        for module, flag in training.items():
            module.training = flag
    check_logits(logits, 1, num_classes)


def check_logits(logits: Any, num_images: int, num_classes: int) -> None:
    """Raise Refusal unless the output of a network is a tensor of shape (num_images, num_classes)."""
    if not isinstance(logits, Tensor):
        raise Refusal(
            f"the network must return logits of shape (N, {num_classes}), got {type(logits).__name__}: leave out its "
            "auxiliary outputs"
        )
    if logits.shape != (num_images, num_classes):
        raise Refusal(
            f"the network must return logits of shape (N, {num_classes}), got {tuple(logits.shape)} for {num_images} "
            "image(s): its num_classes must be data.num_classes"
        )


def adapt_input(weight: Tensor, in_channels: int) -> Tensor:
    """Return the weight of a first convolution for another number of channels: (O, in_channels, K, K) of (O, 3, K, K).

    For gray images it is the sum over the channels, which gives the same output as an RGB image of equal channels.
    Otherwise the channels are repeated and scaled, so that the outputs keep their size.
    """
    before = weight.shape[1]
    if in_channels == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight.repeat(1, -(-in_channels // before), 1, 1)[:, :in_channels]
    return repeated * (before / in_channels)


def first_convolution(network: nn.Module) -> str | None:
    """Return the name of the first convolution in the order of registration, or None."""
    return next((name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)), None)


def _takes_norm_layer(target: str) -> bool:
    """Return whether a constructor has a parameter `norm_layer` with our meaning; a library's has its own."""
    if target.startswith(("torchvision.", "timm.")):
        return False
    try:
        return "norm_layer" in inspect.signature(get_object(target)).parameters
    except Exception:  # it cannot be found: `instantiate` says so
        return False


def _module(made: Any, target: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise Refusal(f"model._target_ must build a torch.nn.Module, and {target} returned {type(made).__name__}")
    return made


def _built(make: Callable[..., nn.Module], name: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return make(**arguments)
    except Exception as error:  # of the library's constructor
        given = ", ".join(arguments) or "none"
        raise Refusal(
            f"{name} cannot be built ({_first_line(error)}): change the values of model, besides the name: {given}"
        ) from error


def _refuse_sources(arguments: Mapping[str, Any]) -> None:
    for name in arguments:
        if name in SOURCES or name.startswith("pretrained_"):
            raise Refusal(f"weights come from a local file, got model.{name}: use model.pretrained=FILE instead")


def _no_such_model(name: str, known: list[str], choice: str, what: str) -> str:
    near = get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(near)}" if near else f"there are {len(known)}"
    return f"model.name must be a {what}, got {name}: {hint}, as in model={choice} model.name={(near or known)[0]}"


def _replace_first_convolution(network: nn.Module, in_channels: int, name: str) -> None:
    place = first_convolution(network)
    old: Any = network.get_submodule(place) if place else None
    if old is None or old.in_channels != RGB:
        raise Refusal(f"data.in_channels must be 3 for {name}, got {in_channels}: its first layer cannot be replaced")
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        dilation=old.dilation,
        bias=old.bias is not None,
        padding_mode=old.padding_mode,
    )
    with torch.no_grad():
        new.weight.copy_(adapt_input(old.weight, in_channels))
        if old.bias is not None:
            new.bias.copy_(old.bias)  # type: ignore[union-attr]
    parent, _, own = str(place).rpartition(".")
    setattr(network.get_submodule(parent), own, new)


def _has_activation(layer: nn.Module) -> bool:
    """Return whether a layer is timm's batch normalization with dropout and an activation in it."""
    return all(isinstance(getattr(layer, part, None), nn.Module) for part in ("drop", "act"))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
