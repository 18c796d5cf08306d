"""Several workers on one study: a shared lock, and detection of dead workers.

Workers are processes that run the same command. A killed worker must release the lock and must be
recognized as dead. The lock is therefore held by the kernel or by a database session, which end
with the process, and a worker on the same machine is alive while its process exists. A worker on
another machine counts as dead when its heartbeats stop.
"""

import hashlib
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import psutil
import sqlalchemy
from sqlalchemy.pool import NullPool

from flash.errors import is_stop
from flash.records import is_locked, locked

_working: set[str] = set()
"""Tokens of the searches that run in this process."""


class Lock(Protocol):
    """Lock that one worker of a study holds at a time, and signs of the workers that are there."""

    remote: ClassVar[bool]
    """True if a server holds the lock, which can go away and come back."""

    def hold(self) -> AbstractContextManager[None]:
        """Wait for the lock, and release it at the end of the block."""
        ...

    def sign(self, token: str) -> AbstractContextManager[None]:
        """Keep a sign that the worker `token` is there; it stays only if the worker crashes."""
        ...

    def crashed(self, token: str) -> bool:
        """Tell whether the worker `token`, which is gone, has crashed and not been stopped."""
        ...

    def remove_signs(self) -> None:
        """Remove the signs of all workers that are gone."""
        ...


@dataclass(frozen=True)
class FileLock:
    """Lock for the workers of one machine, which the kernel releases if the holder dies.

    The sign of a worker is a file beside it, which the worker keeps locked. A worker that a full
    disk stops can remove a file, but write nothing into the database.

    Attributes:
        path: Lock file; nothing else may use it.
    """

    path: Path
    remote: ClassVar[bool] = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        with locked(self.path):
            yield

    @contextmanager
    def sign(self, token: str) -> Iterator[None]:
        with ExitStack() as stack:
            with self.hold():  # `remove_signs` would take a file without a lock for one of the dead
                stack.enter_context(locked(self._sign(token)))
            try:
                yield
            except BaseException as error:
                if is_stop(error):
                    self._sign(token).unlink(missing_ok=True)
                raise
            self._sign(token).unlink(missing_ok=True)

    def crashed(self, token: str) -> bool:
        return self._sign(token).exists()

    def remove_signs(self) -> None:
        for path in self.path.parent.glob(self._sign("*").name):
            if not is_locked(path):
                path.unlink(missing_ok=True)

    def _sign(self, token: str) -> Path:
        return self.path.with_name(f".{self.path.stem}.{token}.worker")


@dataclass(frozen=True)
class PostgresLock:
    """Lock for several machines, which the server releases when the holder's connection ends.

    There are no signs: a worker that is stopped can write into a database on a server. One whose
    server is away for long counts as crashed.

    Attributes:
        url: URL of the database.
        name: Name of the study.
    """

    url: str
    name: str
    remote: ClassVar[bool] = True

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

    def sign(self, token: str) -> AbstractContextManager[None]:
        return nullcontext()

    def crashed(self, token: str) -> bool:
        return True

    def remove_signs(self) -> None:
        pass


@cache
def _machine() -> str:
    """Identify this machine, its boot and, in a container, its process namespace."""
    parts = [socket.gethostname(), str(psutil.boot_time())]
    if Path("/proc/self/ns/pid").exists():
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


@dataclass(frozen=True)
class Owner:
    """Search that evaluates a trial.

    Attributes:
        machine: Machine and process namespace in which `pid` is valid.
        pid: Process id.
        started: Start of the process [s since 1970], since ids are reused.
        token: Unique id of the search, as one process may run several.
    """

    machine: str
    pid: int
    started: float
    token: str

    @classmethod
    def make(cls) -> "Owner":
        """Return the owner for a new search of this process."""
        pid = os.getpid()
        return cls(_machine(), pid, psutil.Process(pid).create_time(), uuid.uuid4().hex)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Mark the search as alive, for the duration."""
        _working.add(self.token)
        try:
            yield
        finally:
            _working.discard(self.token)

    def gone(self) -> bool | None:
        """Return True if the search has ended, None if this machine cannot tell."""
        if self.machine != _machine():
            return None
        if self.pid == os.getpid():
            return self.token not in _working
        try:
            process = psutil.Process(self.pid)
            other = abs(process.create_time() - self.started) > 1.0
            # One whose parent does not wait for it, as in a container without an init process.
            return other or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
