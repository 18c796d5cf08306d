"""Loggers of metrics: Weights & Biases (offline without a key), CSV files, or none."""

import netrc
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash.training.settings import LoggerKind, LoggerSettings

if TYPE_CHECKING:  # Lightning takes seconds to import
    from lightning.pytorch.loggers import Logger


def has_wandb_key() -> bool:
    """Return True if W&B finds an API key in the environment or in `.netrc`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(netrc.netrc().authenticators("api.wandb.ai"))
    except (OSError, netrc.NetrcParseError):
        return False


def make_logger(
    logger: LoggerSettings, *, folder: Path, run: str, job: str, config: Mapping[str, Any]
) -> "Logger | None":
    """Make the Lightning logger of one run; None if metrics are not logged.

    Args:
        logger: Backend and its options.
        folder: Folder of local files; created if it is missing.
        run: Name of the run.
        job: Command that runs (train, search or export), by which W&B groups runs.
        config: Settings to record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if logger.kind is LoggerKind.none:
        return None
    from lightning.pytorch.loggers import CSVLogger, WandbLogger

    if logger.kind is LoggerKind.csv:
        return CSVLogger(folder, name="csv", version="")
    os.environ.setdefault("WANDB_SILENT", "true")
    offline = logger.offline if logger.offline is not None else not has_wandb_key()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return WandbLogger(
            name=run,
            project=logger.project,
            entity=logger.entity,
            save_dir=folder,
            offline=offline,
            mode="offline" if offline else "online",  # W&B ignores `offline` after an earlier run
            group=job,
            job_type=job,
            config=dict(config),
        )


def close_logger(logger: "Logger | None") -> None:
    """Flush and end a run, so that the next logger of this process starts a new one."""
    if logger is None:
        return
    from lightning.pytorch.loggers import WandbLogger

    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
    else:
        logger.save()
