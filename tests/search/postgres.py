"""A PostgreSQL server of one's own, from Debian's package."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEBIAN = Path("/usr/lib/postgresql")
"""Debian's programs, which are not on the path."""


def programs() -> tuple[str, str] | None:
    """Return the paths of initdb and pg_ctl; None where they are not installed."""
    path = ":".join([os.environ["PATH"], *sorted(map(str, DEBIAN.glob("*/bin")))])
    initdb, pg_ctl = (shutil.which(name, path=path) for name in ("initdb", "pg_ctl"))
    return (initdb, pg_ctl) if initdb and pg_ctl else None


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Run a server on its own socket within the block, and yield the URL of its database.

    Args:
        folder: Empty folder for its data. The server refuses to run as root, and runs as `nobody`
            then, who must be able to reach it.
    """
    found = programs()
    assert found is not None
    initdb, pg_ctl = found
    as_user: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(folder, "nobody")
        as_user = ["setpriv", "--reuid=nobody", "--clear-groups"]

    def call(*command: str) -> None:
        subprocess.run([*as_user, *command], check=True, capture_output=True, cwd=folder)

    data = str(folder / "data")
    call(initdb, "--pgdata", data, "--username", "flash", "--auth", "trust")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    control = (pg_ctl, "--pgdata", data, "--log", str(folder / "log"), "--wait")
    call(*control, "--options", options, "start")
    try:
        yield f"postgresql://flash@/postgres?host={folder}"
    finally:
        call(*control, "--mode", "immediate", "stop")
