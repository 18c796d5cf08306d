"""Logger of Lightning's trainer that passes the metrics of a training to a tracker."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger

from flash.tracking.tracker import Tracker


class TrackerLogger(Logger):
    """Passes metrics on, and nothing else that Lightning would record.

    Args:
        tracker: Tracker of the training.
    """

    def __init__(self, tracker: Tracker) -> None:
        super().__init__()
        self._tracker = tracker

    @property
    def name(self) -> None:
        """None, as the trainer writes no files for this logger."""

    @property
    def version(self) -> None:
        """None, as the trainer writes no files for this logger."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._tracker.log(metrics, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the tracker has the settings."""
