"""Storage of a study: a SQLite file for one machine, PostgreSQL for several."""

import errno
import os
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from json import JSONDecodeError
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from flash.errors import InputError, ServiceError, under, without_secrets
from flash.search.settings import check_storage
from flash.search.workers import FileLock, Lock, PostgresLock

MISSED_BEATS = 6
"""Heartbeats that a worker on another machine may miss before it counts as dead."""
_BUSY_S = 60.0
"""Time that SQLite waits for a write of another process [s]."""
_ERRORS = (SQLAlchemyError, StorageInternalError, sqlite3.Error, JSONDecodeError)
"""Errors of a database, and of Optuna where it reads JSON of a damaged one."""


def connect(
    storage: Path | str,
    name: str,
    heartbeat_s: int,
    open_study: Callable[[RDBStorage], optuna.Study],
) -> tuple[optuna.Study, Lock]:
    """Connect to the storage and open a study in it.

    Args:
        storage: SQLite file, or URL of a PostgreSQL database.
        name: Name of the study.
        heartbeat_s: Interval of the heartbeats of a worker [s].
        open_study: Creates or loads the study in the connected storage.

    Returns:
        The study, and the lock that its workers share.

    Raises:
        InputError: The storage cannot be used.
        OSError: The disk is full.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    url, shown, lock = _resolve(storage, name)
    sqlite = isinstance(storage, Path)
    # Workers idle for hours while they train, and should not hold server connections meanwhile.
    engine = {"connect_args": {"timeout": _BUSY_S}} if sqlite else {"poolclass": NullPool}
    try:
        with lock.hold(), full_disk_named(shown), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            if isinstance(storage, Path):
                _enable_write_ahead_log(storage)
            database = RDBStorage(
                url,
                engine_kwargs=engine,
                heartbeat_interval=heartbeat_s,
                grace_period=MISSED_BEATS * heartbeat_s,
            )
            return open_study(database), lock
    except ImportError as error:
        raise InputError(
            f"search.storage={shown}: its driver is missing ({error.__cause__ or error}); "
            "pip install 'psycopg[binary]'"
        ) from error
    except _ERRORS as error:
        raise InputError(
            f"{shown}: expected a study's database ({_reason(error)}); move a damaged file away to "
            "begin anew"
            if sqlite
            else f"search.storage={shown}: expected a database that can be reached "
            f"({_reason(error)}); start it, or correct the URL"
        ) from error


@contextmanager
def named_errors(storage: Path | str, name: str) -> Iterator[None]:
    """Name the storage in errors of the database while a study is in use.

    Args:
        storage: SQLite file, or URL of a PostgreSQL database.
        name: Name of the study.

    Raises:
        ServiceError: The database is damaged, or can no longer be reached.
    """
    try:
        yield
    except (*_ERRORS, LookupError) as error:
        # SQLAlchemy raises a bare one for a damaged enum; its subclasses are faults of ours.
        if isinstance(error, LookupError) and type(error) is not LookupError:
            raise
        _, shown, _ = _resolve(storage, name)
        raise ServiceError(
            f"search.storage={shown}: the database failed ({_reason(error)}); run the same command "
            "again when it is back, or move a damaged file away to begin anew"
        ) from error


def _reason(error: BaseException) -> str:
    """Reason of the driver, which Optuna's own errors only have as their cause."""
    while isinstance(error, StorageInternalError) and error.__cause__ is not None:
        error = error.__cause__
    return without_secrets(str(error).strip().splitlines()[0])


_FULL = {"SQLITE_FULL", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_WRITE"}
"""Names of SQLite's errors on a full disk."""


@contextmanager
def full_disk_named(where: str) -> Iterator[None]:
    """Turn an error of SQLite on a full disk into that of the system.

    Args:
        where: What cannot be written, for the error.

    Raises:
        OSError: The disk is full.
    """
    try:
        yield
    except _ERRORS as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        found = getattr(cause, "orig", cause)
        if isinstance(found, sqlite3.Error) and found.sqlite_errorname in _FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), where) from error
        raise


def _enable_write_ahead_log(path: Path) -> None:
    """Set a SQLite file permanently to write-ahead logging: readers do not wait for writers."""
    with closing(sqlite3.connect(path, timeout=_BUSY_S)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")


def _resolve(storage: Path | str, name: str) -> tuple[str, str, Lock]:
    """Return the URL, its form for users, and the lock that the workers of the study share.

    Raises:
        InputError: The URL is not of PostgreSQL, or contains a password.
    """
    if isinstance(storage, Path):
        storage.parent.mkdir(parents=True, exist_ok=True)
        path = storage.resolve()
        return f"sqlite:///{path}", str(storage), FileLock(path.with_name(path.name + ".lock"))
    with under("search"):
        check_storage(storage)
    return storage, storage, PostgresLock(storage, name)
