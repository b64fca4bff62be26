"""What Hydra calls before it makes the directory of a run."""

import tempfile
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from train import distenv


class WritableRunDirectory(Callback):
    """Ends the process with a sentence where the run could not write its files."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the directory and a file in it, on rank 0, unless it holds a run that is not to be continued."""
        if distenv.rank() != 0:
            return
        directory = Path(config.run_dir)
        if directory.is_dir():
            from train import resume

            try:
                resume.find(config)  # before Hydra notes the configuration there
            except distenv.Refusal as refusal:
                distenv.leave(str(refusal))
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            distenv.leave(
                f"the run directory {directory} cannot be written ({error.strerror}): name another with run_dir=DIR"
            )
