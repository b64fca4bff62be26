"""Loggers whose files a resumed run continues exactly from its checkpoint."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from train import lightning_internals


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
    """Lightning's TensorBoardLogger; a resumed run hides the events after its checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._next_step = 0

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write the metrics of a step."""
        super().log_metrics(metrics, step)
        self._next_step = max(self._next_step, (step or 0) + 1)

    def state_dict(self) -> dict[str, int]:
        """Return the first step without metrics."""
        self.save()
        return {"next_step": self._next_step}

    def resume(self, state: dict[str, int]) -> None:
        """Hide the events from this step on; call it before `log_metrics`."""
        self._next_step = state["next_step"]
        lightning_internals.hide_events_from(self, self._next_step)
