"""Files of JSON lines to which several processes append results that take hours."""

import json
import os
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec
from flash.records import locked


def read(path: Path) -> list[dict[str, Any]]:
    """Read the lines, `spec` as an `ArchSpec`; a line truncated by a kill is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text("utf-8").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.append({**row, "spec": ArchSpec.from_dict(row["spec"])})
    return found


def append(path: Path, row: dict[str, Any]) -> None:
    """Append a line and flush it to disk; other processes may append at the same time."""
    with locked(path) as file:
        torn = file.tell() > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
