"""CSV backend of the tracking: one file of metrics."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from flash.tracking.artifacts import Artifact
from flash.tracking.backend import Metrics


class CsvBackend:
    """Writes `csv/metrics.csv`; summaries, tables, figures and artifacts are for other backends.

    Args:
        folder: Folder of local files.
    """

    def __init__(self, folder: Path) -> None:
        self._logger = CSVLogger(folder, name="csv", version="")

    def log(self, metrics: Metrics, step: int | None) -> None:
        self._logger.log_metrics(dict(metrics), step)

    def summarize(self, values: Metrics) -> None: ...

    def log_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None: ...

    def log_figures(self, draw: Callable[[], Mapping[str, Any]]) -> None: ...

    def use(self, artifact: Artifact) -> None: ...

    def publish(self, artifact: Artifact) -> None: ...

    def close(self, failed: bool) -> None:
        self._logger.save()
