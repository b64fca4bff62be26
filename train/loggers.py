"""Loggers whose files a resumed run continues exactly from its checkpoint."""

import csv
import math
import uuid
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from train import lightning_internals
from train.distenv import Refusal

SETTINGS = ("world_size", "parameters")  # figures of the report that are no results


class MetricsFile(Logger):
    """Writes every logged row to `metrics.csv`, on rank 0.

    Lightning's own CSV logger deletes the file of an earlier process when it opens it.

    Args:
        directory: directory of the file.
        flush_every_n_rows: maximum number of rows kept in memory.
    """

    def __init__(self, directory: str, flush_every_n_rows: int = 50) -> None:
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self.flush_every_n_rows = flush_every_n_rows
        self._columns: list[str] = []
        self._written = 0
        self._waiting: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        """Return the name that Lightning requires."""
        return "metrics"

    @property
    def version(self) -> str:
        """Return the version that Lightning requires; empty, as a run has one file."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row."""
        self._waiting.append({**metrics, "step": step})
        if len(self._waiting) >= self.flush_every_n_rows:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write the buffered rows; a new column rewrites the whole file."""
        if not self._waiting:
            return
        columns = sorted(set(self._columns).union(*self._waiting))
        if columns != self._columns:
            rows = self._read() if self._written else []
            self._columns = columns
            self._rewrite(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, columns).writerows(self._waiting)
        self._written += len(self._waiting)
        self._waiting = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the buffered rows."""
        self.save()

    def state_dict(self) -> dict[str, int]:
        """Write the buffered rows and return the number of rows in the file."""
        self.save()
        return {"rows": self._written}

    @rank_zero_only
    def resume(self, state: dict[str, int]) -> None:
        """Truncate the file to the rows of a checkpoint; later rows are appended."""
        rows = self._read()[: state["rows"]] if self.path.exists() else []
        self._columns = sorted(set().union(*rows))
        self._written = len(rows)
        self._rewrite(rows)

    def _read(self) -> list[dict[str, Any]]:
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self.path)


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger with grouped names; a resumed run hides the events after its checkpoint.

    The metrics of the training are under `train/`, of the validation under `val/`, of the test under `test/`. At the
    end the run has its settings and results in the HParams tab, and the pictures of the report.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"default_hp_metric": False, **kwargs})
        self._next_step = 0

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write the metrics of a step."""
        super().log_metrics({grouped(name): value for name, value in metrics.items()}, step)
        self._next_step = max(self._next_step, (step or 0) + 1)

    @rank_zero_only
    def record(self, config: Mapping[str, Any], figures: Mapping[str, Any], drawn: Sequence[Path]) -> None:
        """Write the settings, the results and the pictures of a run.

        Args:
            config: values by dotted name.
            figures: of the report.
            drawn: files of pictures.
        """
        numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        results = {f"result/{name}": value for name, value in numbers.items() if name not in SETTINGS}
        self.log_hyperparams({name: str(value) for name, value in config.items()}, results, step=self._next_step)
        for path in drawn:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self.experiment.add_image(f"report/{path.stem}", pixels, self._next_step, dataformats="HWC")
        self.save()

    def state_dict(self) -> dict[str, int]:
        """Return the first step without metrics."""
        self.save()
        return {"next_step": self._next_step}

    def resume(self, state: dict[str, int]) -> None:
        """Hide the events from this step on; call it before `log_metrics`."""
        self._next_step = state["next_step"]
        lightning_internals.hide_events_from(self, self._next_step)


class WandB(WandbLogger):
    """Lightning's WandbLogger, of which a resumed run continues the same run; it needs the package wandb.

    Args:
        options: those of Lightning's class.
    """

    def __init__(self, **options: Any) -> None:
        _require("wandb", "wandb")
        self.options = {"id": uuid.uuid4().hex[:12], **options}
        super().__init__(**self.options)

    @rank_zero_only
    def record(self, config: Mapping[str, Any], figures: Mapping[str, Any], drawn: Sequence[Path]) -> None:
        """Send the settings, the results and the pictures of a run."""
        self.log_hyperparams(dict(config))
        self.log_metrics({f"result/{name}": value for name, value in figures.items() if isinstance(value, int | float)})
        for path in drawn:
            self.log_image(f"report/{path.stem}", [str(path)])

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the run."""
        return {"id": self.options["id"]}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue that run; call it before anything is logged."""
        self.options |= state
        super().__init__(**self.options)


class MLFlow(MLFlowLogger):
    """Lightning's MLFlowLogger, of which a resumed run continues the same run; it needs the package mlflow.

    Args:
        options: those of Lightning's class.
    """

    def __init__(self, **options: Any) -> None:
        _require("mlflow", "mlflow")
        self.options = dict(options)
        super().__init__(**self.options)

    @rank_zero_only
    def record(self, config: Mapping[str, Any], figures: Mapping[str, Any], drawn: Sequence[Path]) -> None:
        """Send the settings, the results and the pictures of a run."""
        self.log_hyperparams(dict(config))
        numbers = {name: float(value) for name, value in figures.items() if isinstance(value, int | float)}
        self.log_metrics({f"result/{name}": value for name, value in numbers.items() if math.isfinite(value)})
        for path in drawn:
            self.experiment.log_artifact(self.run_id, str(path))

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the run."""
        return {"run_id": self.run_id}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue that run; call it before anything is logged."""
        self.options |= state
        super().__init__(**self.options)


def grouped(name: str) -> str:
    """Return the name of a metric in its group: `val/loss` for `val_loss`."""
    part, _, rest = name.partition("_")
    if part in ("train", "val", "test") and rest:
        return f"{part}/{rest}"
    return f"train/{name}" if name in ("lr", "images_per_second", "data_wait") else name


def _require(module: str, package: str) -> None:
    """Raise Refusal, on every rank, if the package of a logger is not installed."""
    try:
        import_module(module)
    except ImportError as error:
        raise Refusal(f"logger={module} needs the package {package} ({error}): pip install {package}") from error
