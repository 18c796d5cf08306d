"""Link from a result to its W&B run: the file `wandb.json` beside the result."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.records import find_json, write_json

_NAME = "wandb.json"


def write_link(folder: Path, values: dict[str, Any]) -> None:
    """Write the link of a result: id, project and entity of the run, its URL and local files."""
    write_json(folder / _NAME, values)


def find_url(folder: Path) -> str | None:
    """Return the URL of the W&B run of the result in `folder`; None if it is not on a server.

    Raises:
        InputError: The file is damaged.
    """
    link = find_json(folder / _NAME, _Link, "log the result again")
    return link.url if link is not None else None


@dataclass(frozen=True)
class _Link:
    url: str | None
