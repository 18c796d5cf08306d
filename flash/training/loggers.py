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
    """True if W&B finds a key in the environment or in `.netrc`, so that it need not ask."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return bool(netrc.netrc().authenticators("api.wandb.ai"))
    except (OSError, netrc.NetrcParseError):
        return False


def make_logger(
    logger: LoggerSettings, *, folder: Path, run: str, job: str, config: Mapping[str, Any]
) -> "Logger | None":
    """The Lightning logger of one run; None if metrics are not kept.

    Args:
        logger: Backend and its options.
        folder: Folder of local files; made if it is missing.
        run: Name of the run.
        job: Kind of job, to group runs by: train, search or export.
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
