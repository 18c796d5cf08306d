"""Results as JSON files: plain values, digests, atomic writes, and readers that report damage.

After a kill or on a full disk a file is complete, as before or as written, or missing.
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast, get_origin

from flash.errors import InputError, short

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
log = logging.getLogger(__name__)

_LONGEST_VALUE = 60
"""Most characters of a wrong value that an error repeats."""


def plain(values: Any) -> Any:
    """Convert to JSON values: dataclasses become objects, enums their values, paths text."""
    return json.loads(json.dumps(values, default=_plain_leaf))


def _plain_leaf(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def digest(values: Any, length: int = 16, *, compact: bool = False) -> str:
    """Compute a short SHA-256 of plain JSON values, as a key of results that depend on them.

    Args:
        values: Values to hash; the order of keys does not matter.
        length: Number of hexadecimal digits of the result.
        compact: Hash the JSON text without spaces, as the measurement store does.
    """
    separators = (",", ":") if compact else None
    text = json.dumps(values, sort_keys=True, separators=separators)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def file_digest(path: Path) -> str:
    """Compute the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_UNFINISHED = ".flash-unfinished"
"""End of the names of folders for files that are being written."""
_LOCK = ".lock"
"""Name of the file in such a folder that its writer has locked."""
_cleaned: set[Path] = set()
"""Folders from which this process has removed what killed writers left."""


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Yield the path of a file or folder to write, in a hidden folder beside `path`.

    The block moves what it has written to `path`. The hidden folder is removed at the end, or
    after a kill by the next process that writes beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with ExitStack() as lock:
        folder = _owned_folder(path, lock)
        try:
            yield folder / path.name
        finally:
            lock.close()  # first, as a file that is open cannot be removed on NFS
            shutil.rmtree(folder, ignore_errors=True)


def _owned_folder(path: Path, lock: ExitStack) -> Path:
    """Create a hidden folder beside `path`, with a lock that says that its writer is alive.

    The kernel holds the lock and frees it when the process dies, on any machine that shares the
    folder over NFS. A process id would say nothing about other machines, nor an age about a writer
    that is slow.
    """
    prefix = f".{path.name[:40]}."  # names of files have a greatest length
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=_UNFINISHED, dir=path.parent))
        file = lock.enter_context(locked(folder / _LOCK))
        if os.fstat(file.fileno()).st_nlink:  # not removed before it was locked
            return folder


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`, once per process.

    What living processes write stays, and what belongs to other users.
    """
    where = folder.absolute()
    if where in _cleaned:
        return
    _cleaned.add(where)
    with suppress(FileNotFoundError, PermissionError):
        for entry in os.scandir(where):
            if entry.name.startswith(".") and entry.name.endswith(_UNFINISHED):
                with suppress(OSError):
                    _remove_if_dead(Path(entry.path))


def _remove_if_dead(folder: Path) -> None:
    with open(folder / _LOCK, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # its writer is alive
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()  # on NFS the open lock has kept it
    log.info("%s: removed what a killed process had left", folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` at the end, once it is safely on disk.

    Raises:
        InputError: A folder stands in the way.
    """
    if path.is_dir():
        raise InputError(f"{path}: expected a file, found a folder; delete it and start again")
    with unfinished(path) as temporary:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file open for writing that replaces `path` at the end; see `replacing`."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file


def write_text(path: Path, text: str) -> None:
    """Replace `path` with `text` in UTF-8, atomically."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_json(path: Path, values: Any) -> None:
    """Replace `path` with `values` as indented JSON, atomically; `plain` converts the values."""
    write_text(path, json.dumps(values, indent=1, default=_plain_leaf) + "\n")


def convert(schema: type[T], values: Any) -> T:
    """Convert JSON values to a dataclass, or to another type that its fields may have.

    Every value must have the type that the schema says, at any depth: no text counts as a number,
    and no number as true. Keys that the schema lacks are left out.

    Args:
        schema: Class to convert to.
        values: Parsed JSON.

    Raises:
        InputError: A value is missing, of another type, or refused by its class; names its place
            among the values.
    """
    return parse_json(schema, json.dumps(values))


@cache
def _adapter(schema: type[T]) -> "TypeAdapter[T]":
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def parse_json(schema: type[T], text: str | bytes) -> T:
    """Parse JSON to a dataclass, as `convert` does.

    Raises:
        InputError: It is not JSON, or as for `convert`.
    """
    from pydantic import ValidationError  # takes 0.2 s

    try:
        return _adapter(schema).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        own = first.get("ctx", {}).get("error")
        if isinstance(own, InputError):
            raise InputError(f"{place}.{own}" if place else str(own)) from error
        raise InputError(_explained(place, first["msg"], first["input"])) from error


def _explained(place: str, message: str, value: Any) -> str:
    if message.startswith("Invalid JSON"):
        return f"not JSON ({message.partition(': ')[2]})"
    if message == "Field required":
        return f"{place}: missing"
    text = short(json.dumps(value, default=str), _LONGEST_VALUE)
    return f"{place or 'value'}={text}: {message[:1].lower()}{message[1:]}"


def read_json(path: Path, build: Callable[[Any], T] | type[T], remedy: str) -> T:
    """Read the JSON file at `path`.

    Args:
        path: The file, which must exist.
        build: Class of the value (see `convert`), or a function of the parsed JSON that raises
            `InputError` for what it cannot use.
        remedy: Advice for the time after the file is deleted, such as `train again`.

    Raises:
        InputError: The file cannot be read, is not JSON, or is refused.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: expected a file; delete it to {remedy}")
    try:
        text = path.read_bytes()
        if isinstance(build, type) or get_origin(build) is not None:  # such as `dict[str, int]`
            return parse_json(cast(type[T], build), text)
        return build(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}); delete it to {remedy}") from error


def find_json(path: Path, build: Callable[[Any], T] | type[T], remedy: str) -> T | None:
    """Read a JSON file as `read_json` does; None if it does not exist.

    Raises:
        InputError: The file is damaged.
    """
    return read_json(path, build, remedy) if path.exists() else None


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[IO[bytes]]:
    """Hold the kernel's exclusive lock on `path`, which is freed when the process dies.

    Args:
        path: The file; it and its folder are created if they are missing. Its content is kept.
        on_wait: Called before waiting for another holder of the lock.

    Yields:
        The file, open for reading and appending.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def is_locked(path: Path) -> bool:
    """Return True if someone holds the lock of `locked` on a file that exists."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


class JsonLines:
    """File of JSON values, one per line, that several processes read and append to.

    A line is on disk when `append` returns. A last line that is incomplete, since its process was
    killed, is ignored by readers and overwritten by the next `append`.

    Args:
        path: The file; it and its folder are created by the first `append`.
        take: Called with the number of each complete line, from 1, and its text.
    """

    def __init__(self, path: Path, take: Callable[[int, bytes], None]) -> None:
        self.path = path
        self._take = take
        self._end = 0  # bytes that have been read, always complete lines
        self._lines = 0

    def refresh(self) -> None:
        """Read the lines that were appended since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._end:  # moved away: this is another file
                self._end = self._lines = 0
            file.seek(self._end)
            text = file.read()
        whole, _, torn = text.rpartition(b"\n")
        lines = whole.splitlines()
        for number, line in enumerate(lines, self._lines + 1):
            self._take(number, line)
        self._lines += len(lines)
        if torn:
            log.warning(
                "%s: dropped an incomplete last line of %d bytes (its process was killed while "
                "writing it)",
                self.path,
                len(torn),
            )
        self._end += len(text) - len(torn)

    def append(self, make: Callable[[], Any]) -> None:
        """Append the value that `make` returns; it is called after all earlier lines were read."""
        with locked(self.path) as file:
            self.refresh()
            file.truncate(self._end)  # removes an incomplete last line
            file.write(json.dumps(make(), separators=(",", ":")).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.refresh()
