"""Settings of the tracking (config group `logger`)."""

from dataclasses import dataclass
from enum import Enum


class LoggerKind(Enum):
    """Backends of config group `logger`."""

    wandb = "wandb"
    """Weights & Biases; offline without a key or a connection."""
    csv = "csv"
    """CSV files."""
    none = "none"
    """No logger."""


@dataclass(kw_only=True)
class LoggerSettings:
    """Config group `logger`."""

    name: str
    """Name of the option."""
    kind: LoggerKind = LoggerKind.wandb
    """Backend."""
    project: str | None = None
    """W&B project; null is that of WANDB_PROJECT, else `flash`."""
    entity: str | None = None
    """W&B team or user; null is that of WANDB_ENTITY, else the default of the key's account."""
    group: str | None = None
    """W&B group of the run; null is the study that the architecture comes from, else the name of
    the backbone."""
    offline: bool | None = None
    """Keep runs on disk only, for `wandb sync`; null does so if WANDB_MODE says so, or with a
    warning if no key is found or W&B does not answer."""
    upload: bool = False
    """Upload the files of artifacts; false records their paths, sizes and digests only."""
