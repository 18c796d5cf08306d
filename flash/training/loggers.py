"""Where metrics go: Weights & Biases (offline without a key), CSV files, or nowhere."""

import netrc
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from flash.training.settings import LoggerKind, LoggerSettings


def has_wandb_key() -> bool:
    """Whether W&B could log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(netrc.netrc().authenticators("api.wandb.ai"))
    except (OSError, netrc.NetrcParseError):
        return False


def make_logger(
    settings: LoggerSettings, *, folder: Path, run: str, job: str, config: Mapping[str, Any]
) -> Logger | None:
    """The Lightning logger of one run.

    Args:
        settings: Which backend.
        folder: Where local files go.
        run: Name of the run.
        job: Kind of job, to group runs by: train, search or export.
        config: Settings to record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if settings.kind is LoggerKind.none:
        return None
    if settings.kind is LoggerKind.csv:
        return CSVLogger(folder, name="csv", version="")
    os.environ.setdefault("WANDB_SILENT", "true")
    offline = settings.offline if settings.offline is not None else not has_wandb_key()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return WandbLogger(
            name=run,
            project=settings.project,
            entity=settings.entity,
            save_dir=folder,
            offline=offline,
            mode="offline" if offline else "online",  # also where W&B was set up before
            group=job,
            job_type=job,
            config=dict(config),
        )


def close_logger(logger: Logger | None) -> None:
    """Flush and end a run, so that the next one in this process is a new one."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
    elif logger is not None:
        logger.save()
