"""The callback that Hydra calls before it creates the run directory."""

import tempfile
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from train import distenv


class WritableRunDirectory(Callback):
    """Exits with a one-sentence error if the run could not write its files."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """On rank 0, create the directory and a temporary file, unless it holds a run that must not be resumed."""
        if distenv.rank() != 0:
            return
        directory = Path(config.run_dir)
        if directory.is_dir():
            from train import resume

            try:
                resume.find(config)  # before Hydra writes the configuration there
            except distenv.Refusal as refusal:
                distenv.leave(str(refusal))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            distenv.leave(
                f"the run directory {directory} cannot be written ({error.strerror}): choose another with run_dir=DIR"
            )
