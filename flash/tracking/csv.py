"""CSV backend of the tracking: a file of metrics for each run."""

import itertools
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from flash.tracking.backend import Backend, Metrics, RunInfo


class CsvBackend(Backend):
    """Writes `csv/JOB/NAME/metrics.csv`; a run that goes on has `NAME.2`, and so on.

    Args:
        folder: Folder of local files.
        info: Description of the run.
    """

    def __init__(self, folder: Path, info: RunInfo) -> None:
        names = (f"{info.name}.{n}" if n > 1 else info.name for n in itertools.count(1))
        place = folder / "csv" / info.job.value
        name = next(name for name in names if not (place / name).exists())
        self._logger = CSVLogger(place, name="", version=name)

    def log(self, metrics: Metrics, step: int | None) -> None:
        self._logger.log_metrics(dict(metrics), step)

    def close(self, failed: bool) -> None:
        self._logger.save()
