"""Errors as sentences: those of a run that need no traceback, and misspelt overrides with the nearest existing keys."""

import errno
import inspect
import os
import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from hydra.errors import HydraException, InstantiationException
from hydra.utils import get_object
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import conf
import syncbn
from train import distenv
from train.distenv import Refusal

CONF = Path(str(conf.__file__)).parent
LAST_BATCH = "if an epoch's last batch is too small, change data.global_batch_size"
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
# Errors of torch and Lightning that have no class of their own, by words of theirs, with what to do; if empty, they are
# shown as they are. If the words change, a traceback is shown, and a test fails.
PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")  # gloo
BY_WORDS: dict[type[Exception], dict[str, str]] = {
    ValueError: {
        "more than 1 value per channel when training": LAST_BATCH,  # torch's own batch normalization
        "val_check_interval": "",
    },
    RuntimeError: {
        "Expected to have finished reduction in the prior iteration": "a part of the network has no gradient in some "
        "steps: set trainer.strategy.find_unused_parameters=true",
    },
}
OTHER_WORDS = {
    **dict.fromkeys(("lr", "learning_rate"), "lr_per_256"),
    **dict.fromkeys(("batch_size", "batchsize", "bs"), "global_batch_size"),
    **dict.fromkeys(("epochs", "n_epochs", "num_epochs"), "max_epochs"),
    **{"wd": "weight_decay", "name": "run_name"},
}
CLEAR_MATCH = 0.85  # of two names, by SequenceMatcher
POOR_MATCH = 0.6


def refusal_in(error: BaseException) -> str | None:
    """Return a sentence for the user if an error, or one of its causes, needs no traceback; otherwise None.

    Errors are recognized by their classes, except those in `BY_WORDS` and `PEER_IS_GONE`. With HYDRA_FULL_ERROR=1 every
    error shows its traceback.
    """
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        return None
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Refusal):
            return str(cause).split("Refusal: ")[-1].strip()  # a DataLoader worker prepends its traceback
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    text = " ".join(str(error).split())
    if isinstance(error, syncbn.TooFewValuesError):
        return f"{text}; {LAST_BATCH}"
    if isinstance(error, syncbn.DesyncError):
        return str(error)  # with a table of the ranks
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{text.split(': ')[0]}: lower data.global_batch_size or data.batch_size_per_rank, with "
            "trainer.accumulate_grad_batches for as many images in a step, or set trainer.precision=bf16-mixed"
        )
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        where = f"{error.filename} " if error.filename else "a file of the run "
        return f"{where}cannot be written ({error.strerror}): make space or name another directory with run_dir=DIR"
    is_gone = isinstance(error, dist.DistNetworkError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in PEER_IS_GONE)
    )
    if isinstance(error, syncbn.PeerError) or (distenv.world_size() > 1 and is_gone):
        return "another rank has ended, and this one cannot continue without it: see the error of that rank"
    if isinstance(error, InstantiationException) and isinstance(error.__cause__, ValueError):
        target = re.search(r"call to target '([\w.]+)'", text)
        return f"{target[1]}: {error.__cause__}" if target else text
    if isinstance(error, InstantiationException | OmegaConfBaseException | MisconfigurationException):
        return text
    for kind, words in BY_WORDS.items():
        found = next((part for part in words if isinstance(error, kind) and part in text), None)
        if found is not None:
            return f"{text}; {words[found]}" if words[found] else text
    return None


def explain(
    message: str,
    arguments: Iterable[str],
    command: str = "python -m train --cfg job",
    known: dict[str, Any] | None = None,
) -> str:
    """Return Hydra's message about a wrong override, with the nearest keys or choices instead of its advice.

    Args:
        arguments: the command line.
        command: what lists all keys.
        known: the configuration whose keys an override may name; by default the one that the choices compose.
    """
    arguments = list(arguments)
    if key := re.search(r"Could not override '([^']+)'", message):
        given = next((part for part in arguments if part.partition("=")[0] == key[1]), f"{key[1]}=")
        config = _composed(arguments) if known is None else known
        return f"Could not override '{key[1]}': {no_such_key(key[1], given.partition('=')[2], config, command)}"
    if choice := re.search(r"Could not find '([^']+)/([^'/]+)'", message):
        near = _nearest(choice[2], _choices(choice[1]))
        return f"{message.strip()}\n\nNearest: {choice[1]}={near[0]}" if near else message.strip()
    return message.strip()


def no_such_key(key: str, value: str, config: dict[str, Any], command: str = "python -m train --cfg job") -> str:
    """Return a sentence that names the keys nearest to one that does not exist.

    Args:
        key: dotted name that the configuration lacks.
        value: what the user assigned to it; may be empty.
        config: the composed configuration.
        command: what lists all keys.
    """
    value = value or "VALUE"
    group, _, name = key.rpartition(".")
    owner = OmegaConf.select(OmegaConf.create(config), group) if group else None
    near = _nearest(key, {*_keys(config), *groups()} - {key})
    siblings = [other.rpartition(".")[2] for other in near if other.rpartition(".")[0] == group]
    if owner is not None and not any(_likeness(name, other) >= CLEAR_MATCH for other in siblings):
        arguments = _nearest(name, set(parameters_of(owner.get("_target_"))) - set(owner))
        if name in arguments:
            return f"it has no value yet, add it with +{key}={value}"
        near = [f"+{group}.{other}" for other in arguments] + near
    if not near:
        return f"there is no such key, `{command}` lists them all"
    others = f" (or {' or '.join(near[1:3])})" if near[1:] else ""
    return f"there is no such key, use {near[0]}={value}{others}; `{command}` lists them all"


def parameters_of(target: str | None) -> dict[str, inspect.Parameter]:
    """Return the parameters of a constructor or function by name; none if it cannot be found or has no signature."""
    try:
        return dict(inspect.signature(get_object(target)).parameters) if target else {}
    except (ImportError, AttributeError, TypeError, ValueError):
        return {}


def _nearest(name: str, others: Iterable[str]) -> list[str]:
    """Return the names most like one, best first; none if all are unlike it."""
    ranked = sorted(
        ((_likeness(name, other), other) for other in others), key=lambda pair: (-pair[0], len(pair[1]), pair[1])
    )
    return [other for likeness, other in ranked if likeness >= max(POOR_MATCH, ranked[0][0] - 0.05)]


def _likeness(name: str, other: str) -> float:
    """Return how much two dotted names are alike: by their last parts, and a little by what precedes them."""
    group, _, last = name.rpartition(".")
    other_group, _, other_last = other.rpartition(".")
    last = OTHER_WORDS.get(last, last)
    plain, other_plain = last.replace("_", "").lower(), other_last.replace("_", "").lower()
    likeness = SequenceMatcher(None, plain, other_plain).ratio()
    if plain and (last in other_last.split("_") or (len(plain) > 3 and plain in other_plain)):
        likeness = max(likeness, 0.9)
    return likeness + 0.1 * SequenceMatcher(None, group, other_group).ratio()


def _composed(arguments: list[str]) -> dict[str, Any]:
    """Return the configuration with the valid choices of a command line, and without its values."""
    distenv.register_resolvers()
    choices = [part for part in arguments if _is_choice(part)]
    with initialize_config_module("conf", version_base="1.3"):
        try:
            config = compose("train", choices)
        except HydraException:
            config = compose("train")
    return OmegaConf.to_container(config)  # type: ignore[return-value]


def _is_choice(argument: str) -> bool:
    group, _, choice = argument.partition("=")
    return choice in _choices(group)


def groups() -> list[str]:
    """Return the names of the groups of configuration files."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and list(path.glob("*.yaml")))


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _keys(config: Any, prefix: str = "") -> list[str]:
    """Return the dotted names of all mappings and values."""
    keys = [prefix] if prefix else []
    if isinstance(config, dict):
        for name, value in config.items():
            if not str(name).startswith("_"):
                keys += _keys(value, f"{prefix}.{name}" if prefix else str(name))
    return keys
