"""Many workers on one study: a lock that they share, and telling the dead from the living.

Workers are the same command started several times. A kill must neither leave the lock behind nor
look like life, so both hang on things that end with the process: a lock of the kernel or of a
database session, and the process itself. Only for workers on other machines silence has to do.
"""

import hashlib
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import psutil
import sqlalchemy
from sqlalchemy.pool import NullPool

from flash.records import locked

_working: set[str] = set()
"""Tokens of this process's searches that are under way."""


class Lock(Protocol):
    """Held by one worker of a study at a time."""

    def hold(self) -> AbstractContextManager[None]:
        """Wait for the lock; give it back at the end."""
        ...


@dataclass(frozen=True)
class FileLock:
    """For the workers of one machine. The kernel frees it when its holder dies.

    Attributes:
        path: A file that nothing else uses.
    """

    path: Path

    @contextmanager
    def hold(self) -> Iterator[None]:
        with locked(self.path):
            yield


@dataclass(frozen=True)
class PostgresLock:
    """For workers on many machines. The server frees it when its holder's connection ends.

    Attributes:
        url: The database.
        name: The study.
    """

    url: str
    name: str

    @contextmanager
    def hold(self) -> Iterator[None]:
        digest = hashlib.sha256(f"flash/{self.name}".encode()).digest()
        key = int.from_bytes(digest[:8], "big", signed=True)
        engine = sqlalchemy.create_engine(
            self.url, poolclass=NullPool, isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_lock({key})")
            yield  # the connection, hence the lock, ends here


@cache
def _machine() -> str:
    """This machine since it started; for containers, also which processes can be seen."""
    parts = [socket.gethostname(), str(psutil.boot_time())]
    if Path("/proc/self/ns/pid").exists():
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


@dataclass(frozen=True)
class Owner:
    """Who evaluates a trial.

    Attributes:
        machine: Where its process id means anything.
        pid: Process id.
        started: When the process began, as ids are used again [s since 1970].
        token: Tells this search from others of the same process.
    """

    machine: str
    pid: int
    started: float
    token: str

    @classmethod
    def make(cls) -> "Owner":
        """A new search of this process."""
        pid = os.getpid()
        return cls(_machine(), pid, psutil.Process(pid).create_time(), uuid.uuid4().hex)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @contextmanager
    def working(self) -> Iterator[None]:
        """While this lasts, the search counts as alive."""
        _working.add(self.token)
        try:
            yield
        finally:
            _working.discard(self.token)

    def gone(self) -> bool | None:
        """Whether the search has ended; None where that cannot be seen from this machine."""
        if self.machine != _machine():
            return None
        if self.pid == os.getpid():
            return self.token not in _working
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1.0
        except psutil.NoSuchProcess:
            return True
