"""Tracker of one run of a command: metrics, tables, figures and artifacts, sent to a backend.

A tracker never ends a command: what a backend cannot do is one warning, and the command goes on.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flash.errors import without_secrets
from flash.ranks import is_main_process
from flash.tracking.artifacts import Artifact
from flash.tracking.backend import Backend, Metrics, RunInfo
from flash.tracking.settings import LoggerKind, LoggerSettings

log = logging.getLogger(__name__)


class Tracker:
    """Tracker of one run; a context manager that ends the run.

    Args:
        backend: Receiver of the records; None records nothing.
        name: Name of the run, for messages.
    """

    def __init__(self, backend: Backend | None, name: str) -> None:
        self._backend, self._name = backend, name
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        backend, self._backend = self._backend, None
        if backend is None:
            return
        try:
            backend.close(failed=kind is not None)
        except Exception as exception:  # of any library, disk or network
            self._warn(exception)

    def log(self, metrics: Metrics, step: int | None = None) -> None:
        """Log metrics, at a step of the run if there is one."""
        self._do(lambda backend: backend.log(metrics, step))

    def summarize(self, values: Metrics) -> None:
        """Set values that describe the run as a whole, in place of those before."""
        self._do(lambda backend: backend.summarize(values))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table of numbers and texts, in place of the one before."""
        self._do(lambda backend: backend.log_table(name, columns, rows))

    def log_figures(self, draw: Callable[[], Mapping[str, Any]]) -> None:
        """Log plotly figures by name; `draw` is called only by a backend that shows figures."""
        self._do(lambda backend: backend.log_figures(draw))

    def use(self, artifact: Artifact) -> None:
        """Record an artifact that the run reads."""
        self._do(lambda backend: backend.use(artifact))

    def publish(self, artifact: Artifact) -> None:
        """Record an artifact that the run has written."""
        self._do(lambda backend: backend.publish(artifact))

    def _do(self, action: Callable[[Backend], None]) -> None:
        """Call the backend; if it fails, warn and end the tracking of the run."""
        if self._backend is None or self._failed:
            return
        try:
            action(self._backend)
        except Exception as error:  # of any library, disk or network
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._failed:
            log.warning(
                "%s: the logger failed (%s: %s); the run goes on and logs no more",
                self._name,
                type(error).__name__,
                str(error).partition("\n")[0],
            )
        self._failed = True


def open_tracker(settings: LoggerSettings, folder: Path, info: RunInfo) -> Tracker:
    """Open the tracker of a run; in other processes than the main one it records nothing.

    Args:
        settings: Backend and its options.
        folder: Folder of local files; created if it is missing.
        info: Description of the run.
    """
    if not is_main_process() or settings.kind is LoggerKind.none:
        return Tracker(None, info.name)
    backend = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if settings.kind is LoggerKind.csv:
            from flash.tracking.csv import CsvBackend

            backend = CsvBackend(folder, info)
        else:
            # W&B reads them once, when it starts. Its reports on itself write lines of their own
            # where there is no network.
            os.environ.setdefault("WANDB_SILENT", "true")
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            from flash.tracking.wandb import start

            backend = start(settings, folder, info)
    except Exception as error:  # of any library or disk
        reason = without_secrets(" ".join(str(error).split()))
        log.warning("%s: nothing is logged (%s: %s)", info.name, type(error).__name__, reason)
    return Tracker(backend, info.name)
