"""Fine-tuning: parts of a network that stay as they are, and learning rates by layer."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from train.distenv import Refusal

STATISTICS, NORMS, BACKBONE, HEAD = "statistics", "norms", "backbone", "head"


def freeze(network: nn.Module, names: Sequence[str] | str | None, head: Iterable[str]) -> list[nn.Module]:
    """Freeze parts of a network, and return the modules that must stay in evaluation mode while it trains.

    Args:
        names: each one of:

            - `statistics`: batch normalization uses its running statistics and keeps them; weights and biases train;
            - `norms`: also their weights and biases, and those of all other normalization layers, stay;
            - `backbone`: all but the head;
            - the name or pattern of a module or parameter, such as `layer1`, `features.[0-3]` or `pos_embed`.

            A frozen module trains no parameter, and neither drops out nor updates its statistics.
        head: names of the modules that compute the logits.

    Raises:
        Refusal: a name is not in the network, or nothing is left to train.
    """
    chosen = [names] if isinstance(names, str) else list(names or [])
    frozen: list[nn.Module] = []
    for name in chosen:
        frozen += _freeze(network, name, list(head))
    if chosen and not any(parameter.requires_grad for parameter in network.parameters()):
        raise Refusal(f"finetune.freeze={chosen} leaves nothing to train: leave a part out")
    for module in frozen:
        module.eval()
    return frozen


def rates(
    network: nn.Module, layer_decay: float, factors: Mapping[str, float], head: Iterable[str]
) -> dict[str, float]:
    """Return the factor on the learning rate of every parameter, by name.

    Args:
        layer_decay: the rate of each block is that of the next one times this factor; the last block, which is the
            head in most networks, has the full rate. A block is a child of the network, of a list or sequence in it,
            or of a module that has half of all parameters. One without matrices and kernels, such as a normalization,
            counts with the block before it.
        factors: further factor by name or pattern of a module or parameter, or for `head`; the last one that fits
            counts.
        head: names of the modules that compute the logits.

    Raises:
        Refusal: a name is not in the network.

    Source: layer-wise decay as in Clark et al. 2020 (ELECTRA), section 3.1.
    """
    names = [name for name, _ in network.named_parameters()]
    patterns: list[tuple[str, float]] = []
    for pattern, factor in factors.items():
        own = list(head) if pattern == HEAD else [pattern]
        if not any(_fits(name, part) for name in names for part in own):
            raise Refusal(_no_such_part(network, pattern, "finetune.rates"))
        patterns += [(part, factor) for part in own]
    blocks = _blocks(network)
    last = max(blocks.values(), default=0)
    found = {}
    for name in names:
        factor = next((factor for pattern, factor in reversed(patterns) if _fits(name, pattern)), 1.0)
        found[name] = factor * layer_decay ** (last - blocks[name])
    return found


def _freeze(network: nn.Module, name: str, head: list[str]) -> list[nn.Module]:
    modules = dict(network.named_modules())
    if name in (STATISTICS, NORMS):
        norms = [module for module in modules.values() if _is_norm(module)]
        batch_norms = [module for module in norms if isinstance(module, _BatchNorm)]
        if not (batch_norms if name == STATISTICS else norms):
            raise Refusal(f"finetune.freeze={name} needs a network with such layers: leave it out")
        if name == NORMS:
            for parameter in (own for norm in norms for own in norm.parameters()):
                parameter.requires_grad = False
        return list(batch_norms)
    if name == BACKBONE:
        if not head:
            raise Refusal(
                "finetune.freeze=backbone needs to know the head, and no layer has data.num_classes outputs: name the "
                "modules to freeze instead"
            )
        chosen = {part for part in modules if part and not any(_belongs_to(network, part, own) for own in head)}
        parameters = {own for own, _ in network.named_parameters() if not any(_is_within(own, part) for part in head)}
    else:
        chosen = {part for part in modules if part and _fits(part, name)}
        parameters = {own for own, _ in network.named_parameters() if _fits(own, name)}
        if not chosen and not parameters:
            raise Refusal(_no_such_part(network, name, "finetune.freeze"))
    for own, parameter in network.named_parameters():
        if own in parameters:
            parameter.requires_grad = False
    return [modules[part] for part in chosen]


def _blocks(network: nn.Module) -> dict[str, int]:
    """Return the number of the block of every parameter, counted from the input."""
    half = sum(parameter.numel() for parameter in network.parameters()) / 2
    found = {name: _block_of(network, name, half) for name, _ in network.named_parameters()}
    heavy = {found[name] for name, parameter in network.named_parameters() if parameter.ndim > 1}
    numbers: dict[str, int] = {}
    number = -1
    for block in found.values():
        is_counted = block in heavy and not _is_opened(network.get_submodule(block), half)
        if block not in numbers:
            number += is_counted
            numbers[block] = max(number, 0)
    return {name: numbers[block] for name, block in found.items()}


def _block_of(network: nn.Module, name: str, half: float) -> str:
    """Return the name of the outermost module around a parameter that is a block; that of its owner if none is."""
    path: list[str] = []
    for part in name.split(".")[:-1]:
        path.append(part)
        if not _is_opened(network.get_submodule(".".join(path)), half):
            break
    return ".".join(path)


def _is_opened(module: nn.Module, half: float) -> bool:
    """Return whether a module consists of blocks: it is a list of modules, or has half of all parameters."""
    is_list = isinstance(module, nn.Sequential | nn.ModuleList)
    has_half = sum(parameter.numel() for parameter in module.parameters()) >= half
    return any(True for _ in module.children()) and (is_list or has_half)


def _fits(name: str, pattern: str) -> bool:
    """Return whether a name, or that of a module around it, fits a pattern."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def _belongs_to(network: nn.Module, name: str, head: str) -> bool:
    """Return whether a module is in a head, or around it, or its dropout or the like in one sequence with it."""
    parent = head.rpartition(".")[0]
    has_parameters = next(network.get_submodule(name).parameters(), None) is not None
    is_beside = bool(parent) and name.rpartition(".")[0] == parent and not has_parameters
    return _is_within(name, head) or _is_within(head, name) or is_beside


def _is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module normalizes: by its class, or by its name and its vectors, as libraries have their own."""
    own = list(module.parameters(recurse=False))
    is_named_so = "Norm" in type(module).__name__ and bool(own) and all(parameter.ndim <= 1 for parameter in own)
    return isinstance(module, _BatchNorm) or is_named_so


def _no_such_part(network: nn.Module, name: str, key: str) -> str:
    known = [own for own, _ in network.named_modules() if own]
    near = get_close_matches(name, known, n=3, cutoff=0.5) or [own for own, _ in network.named_children()][:6]
    return f"{key} names {name}, which the network does not have: use {', '.join(near)}, or a pattern of such names"
