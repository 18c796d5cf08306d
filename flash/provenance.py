"""Origin of a result: command, date, commit, versions and machine of the process that made it."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from flash.commands import this_command

PACKAGES = (
    "mobilellm-flash",
    "torch",
    "lightning",
    "transformers",
    "torchao",
    "executorch",
    "optuna",
    "botorch",
    "wandb",
)
"""Packages whose versions are recorded, as they are named on the package index."""


def provenance() -> dict[str, Any]:
    """Return command, date, commit, versions and machine of this process, as plain JSON values."""
    return {
        "command": this_command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }


@cache
def commit() -> str | None:
    """Return the commit of the clone that runs, `-dirty` if files differ; None without a clone."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    # Tags are excluded, so that the answer is a hash in every clone.
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages among `PACKAGES`."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def machine() -> str:
    """Describe system, processor and cores of this machine, and its GPU if torch is in use."""
    parts = [f"{platform.system()} {platform.machine()}", _processor(), f"{os.cpu_count()} cores"]
    torch = sys.modules.get("torch")  # a command that has not imported it uses no GPU
    if torch is not None and torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(part for part in parts if part)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
