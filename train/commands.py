"""Shared by `train.evaluate`, `train.export` and `train.predict`: options through Hydra, and runs from checkpoints."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train import console, distenv, errors, hydra_app, identity, resume, run, settings, trust
from train.classifier import ImageClassifier
from train.data import ImageData
from train.distenv import Refusal

COMPOSED = "run_of_a_checkpoint"  # name of the configuration in Hydra's store
PATHS = ("checkpoint", "output")  # options whose values are taken as they are, without Hydra's grammar
# Nothing is written to a run directory, and a checkpoint decides nothing about Hydra.
QUIET = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
OF_HYDRA = ("defaults", "hydra")


class Run(NamedTuple):
    """A trained model with its configuration and data."""

    config: DictConfig
    model: ImageClassifier
    data: ImageData
    classes: list[str]


Command = Callable[[DictConfig, Run], None]


def from_checkpoint(path: Path, overrides: Sequence[str] = ()) -> Run:
    """Rebuild the model, with plain BatchNorm, and its data from a checkpoint file alone.

    Args:
        overrides: of the configuration in the checkpoint, in Hydra's grammar.

    Raises:
        Refusal: the file is not a valid checkpoint or names something that `train.trust` does not list, or an override
            does not fit its configuration.
    """
    distenv.register_resolvers()
    checkpoint = resume.load(path)
    config, rest = _with_choices(_trusted(path, checkpoint), overrides)
    _store(config)
    with initialize_config_module("conf", version_base="1.3"):
        try:
            composed = compose(COMPOSED, rest)
        except HydraException as error:
            raise Refusal(errors.explain(str(error), rest, "the run's config.yaml", config)) from error
    return _rebuilt(path, checkpoint, composed)


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


def main(name: str, command: Command, help: str | None) -> None:
    """Run a command with this process's arguments; a user error prints one sentence and exits with code 1.

    The options in conf/NAME.yaml and the configuration in the checkpoint are composed by Hydra as one configuration.

    Args:
        name: of the command and of the file.
        command: gets the options and the run.
        help: text for `--help`.
    """
    console.quiet()
    distenv.register_resolvers()
    options: Any = OmegaConf.to_container(OmegaConf.load(errors.CONF / f"{name}.yaml"))
    arguments, images = _separated(sys.argv[1:], options)
    if "images" in options:
        options["images"] = images
    elif images:
        distenv.leave(f"train.{name} takes KEY=VALUE, got {images[0]}: see python -m train.{name} --help")
    needs_run = not {"-h", "--help"} & set(arguments)
    checkpoint: dict[str, Any] = {}
    config: dict[str, Any] = {}
    try:
        given, is_trusted = _value(arguments, "checkpoint"), _value(arguments, "trust") or "false"
        if is_trusted.lower() not in ("true", "false"):
            raise Refusal(f"trust must be true or false, got {is_trusted}")
        if needs_run:
            if given is None:
                raise Refusal("checkpoint=... is needed: add it, as in checkpoint=outputs/RUN/checkpoints/last.ckpt")
            checkpoint = resume.load(Path(given))
            with trust.everything(is_trusted.lower() == "true"):
                config, arguments = _with_choices(_trusted(Path(given), checkpoint), arguments)
    except Refusal as refusal:
        distenv.leave(str(refusal))
    _store({**config, **options}, f"{help}\n{trust.OPTION}\n")

    def task(composed: DictConfig) -> None:
        hydra_app.begin()
        chosen = OmegaConf.masked_copy(composed, list(options))
        rest = OmegaConf.masked_copy(composed, [str(key) for key in composed if key not in options])
        try:
            with trust.everything(chosen.trust is True):
                command(chosen, _rebuilt(Path(chosen.checkpoint), checkpoint, rest))
        except (Exception, OmegaConfBaseException) as error:
            sentence = errors.refusal_in(error)
            if sentence is None:
                traceback.print_exc()
                sys.exit(1)
            distenv.leave(sentence)

    sys.argv[1:] = arguments
    start = hydra.main(config_path="pkg://conf", config_name=COMPOSED, version_base="1.3")(task)
    hydra_app.start(start, f"python -m train.{name} checkpoint=FILE --cfg job", {**config, **options})


def _trusted(path: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration in a checkpoint; raise Refusal if it names what it must not."""
    trust.check(path, checkpoint["config"])
    return {name: value for name, value in checkpoint["config"].items() if name not in OF_HYDRA}


def _rebuilt(path: Path, checkpoint: dict[str, Any], config: DictConfig) -> Run:
    config.compile = False
    settings.check(config)
    model, data = run.build_model(config, needs_weights=False)
    classes = checkpoint.get("classes") or data.class_names()
    identity.check_number(classes, data.num_classes)
    resume.check_weights(path, checkpoint, model.network)
    model.load_state_dict(checkpoint["state_dict"])
    model.eval()
    return Run(config, model, data, classes)


def _store(config: dict[str, Any], help: str | None = None) -> None:
    """Make a configuration known to Hydra under the name `COMPOSED`."""
    of_hydra = {"run": {"dir": "."}, "output_subdir": None, "help": {"template": help or ""}}
    ConfigStore.instance().store(name=COMPOSED, node={"defaults": ["_self_", *QUIET], "hydra": of_hydra, **config})


def _with_choices(config: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration with the groups that overrides choose, as in `trainer=cpu`, and all other overrides.

    Raises:
        Refusal: there is no such choice.
    """
    rest = []
    for override in overrides:
        group, _, choice = override.partition("=")
        if group not in errors.groups() or not choice.replace("_", "").isalnum():
            rest.append(override)
            continue
        with initialize_config_module("conf", version_base="1.3"):
            try:
                chosen = compose("train", [override, *_searched(overrides)])
            except HydraException as error:
                raise Refusal(errors.explain(str(error), [override])) from error
        config = {**config, group: OmegaConf.to_container(chosen)[group]}  # type: ignore[index,call-overload]
    return config, rest


def _searched(arguments: Sequence[str]) -> list[str]:
    """Return the override that adds the directory of `--config-dir`."""
    for flag in ("--config-dir", "-cd"):
        if flag in arguments[:-1]:
            directory = arguments[list(arguments).index(flag) + 1]
            return [f"hydra.searchpath=[file://{os.path.abspath(directory)}]"]
    return []


def _separated(arguments: Sequence[str], options: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the arguments for Hydra, and the names of images.

    An image is what names an existing file or directory, unless it begins with an option of the command, and what has
    no `=` and is no flag.
    """
    of_hydra: list[str] = []
    images: list[str] = []
    for argument, is_flag in zip(arguments, hydra_app.are_flags(arguments), strict=True):
        name, equals, value = argument.partition("=")
        is_option = bool(equals) and name in options
        if is_option and name in PATHS:
            of_hydra.append(f"{name}={_quoted(value)}")
        elif is_flag or is_option or (equals and not os.path.lexists(argument)) or argument.startswith("~"):
            of_hydra.append(argument)
        else:
            images.append(argument)
    return of_hydra, images


def _quoted(value: str) -> str:
    """Return a path as a value in Hydra's grammar, with quotes where it needs them."""
    if value[:1] in ("'", '"') or value in ("null", ""):
        return value
    try:
        if OverridesParser.create().parse_override(f"x={value}").value() == value:
            return value
    except HydraException:
        pass  # the grammar reads something else, or nothing, in it
    return "'" + value.replace("\\'", "\\\\'").replace("'", "\\'") + "'"


def _value(arguments: Sequence[str], name: str) -> str | None:
    """Return the value that the last override of an option sets, or None."""
    given = [argument for argument in arguments if argument.lstrip("+").startswith(f"{name}=")]
    if not given:
        return None
    try:
        return str(OverridesParser.create().parse_override(given[-1]).value())
    except HydraException as error:
        raise Refusal(" ".join(str(error).split())) from error
