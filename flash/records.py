"""Results as JSON files: plain values, digests, atomic writes, and readers that report damage.

After a kill or on a full disk a file is complete, as before or as written, or missing.
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` at the end, once it is safely on disk.

    Raises:
        InputError: A folder stands in the way.
    """
    if path.is_dir():
        raise InputError(f"{path}: expected a file, found a folder; delete it and start again")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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
    try:
        text = path.read_bytes()
        if isinstance(build, type) or get_origin(build) is not None:  # such as `dict[str, int]`
            return parse_json(cast(type[T], build), text)
        return build(json.loads(text))
    except IsADirectoryError as error:
        raise InputError(
            f"{path}: expected a file, found a folder; delete it to {remedy}"
        ) from error
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
