"""Shared by `train.evaluate`, `train.export` and `train.predict`: command line, and loading a run from a checkpoint."""

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train import distenv, errors, identity, resume, run, settings, trust
from train.classifier import ImageClassifier
from train.data import ImageData
from train.distenv import Refusal


class Run(NamedTuple):
    """A trained model with its configuration and data."""

    config: DictConfig
    model: ImageClassifier
    data: ImageData
    classes: list[str]


def from_checkpoint(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Rebuild the model, with plain BatchNorm, and its data from a checkpoint file alone.

    Args:
        overrides: `key=value` overrides of the configuration in the checkpoint.

    Raises:
        Refusal: the file is not a valid checkpoint or names something that `train.trust` does not list, or a key is not
            in its configuration.
    """
    distenv.register_resolvers()
    checkpoint = resume.load(path)
    trust.check(path, checkpoint["config"])
    config: Any = OmegaConf.create(checkpoint["config"])
    for override in overrides:
        key, _, _ = override.partition("=")
        if key not in resume.flat(checkpoint["config"]):
            raise Refusal(f"the configuration in {path} has no value {key}: use a name from the run's config.yaml")
        config = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
    config.compile = False
    settings.check(config)
    model, data = run.build_model(config, needs_weights=False)
    classes = checkpoint.get("classes") or data.class_names()
    identity.check_number(classes, data.num_classes)
    resume.check_weights(path, checkpoint, model.network)
    model.load_state_dict(checkpoint["state_dict"])
    model.eval()
    return Run(config, model, data, classes)


def trainer_for(config: DictConfig, callbacks: list[Callback]) -> Trainer:
    """Return a Trainer with the configured devices and limits, without loggers, checkpoints and profile.

    Raises:
        Refusal: the devices contradict the launcher; on every rank.
    """
    settings.check_processes(config, "train.evaluate")
    return run.instantiate(
        config.trainer,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        profiler=None,
        precision="64-true" if str(config.trainer.precision).startswith("64") else "32-true",
    )


def options(arguments: Sequence[str], defaults: dict[str, str | None]) -> tuple[dict[str, Any], list[str]]:
    """Return a command's own `key=value` options, and all other arguments.

    Raises:
        Refusal: an option without a default is missing.
    """
    pairs = [argument.partition("=") for argument in arguments]
    given = {name: value for name, equals, value in pairs if name in defaults and equals}
    rest = ["".join(pair) for pair in pairs if pair[0] not in defaults or not pair[1]]
    for name, default in defaults.items():
        if default is None and name not in given:
            raise Refusal(f"{name}=... is needed: add it, as in {name}=outputs/RUN/checkpoints/last.ckpt")
    return {**defaults, **given}, rest


def main(command: Callable[[list[str]], None], help: str | None) -> None:
    """Run a command with this process's arguments; a user error prints one sentence and exits with code 1.

    `trust=true` is an option of every command.
    """
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{help}\n{trust.OPTION}")
        return
    run.quiet()
    try:
        own, arguments = options(sys.argv[1:], {"trust": "false"})
        if own["trust"] not in ("true", "false"):
            raise Refusal(f"trust must be true or false, got {own['trust']}")
        with trust.everything(own["trust"] == "true"):
            command(arguments)
    except (Exception, OmegaConfBaseException) as error:
        sentence = errors.refusal_in(error)
        if sentence is None:
            traceback.print_exc()
            sys.exit(1)
        distenv.leave(sentence)
