"""Readers of data files, row by row.

Nothing is inferred from the rows of a file: a value is what its own row says, whatever the rows
around it say. A row that cannot be read is handed on as an error, so that the rows after it keep
their numbers.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import pyarrow as pa
import pyarrow.parquet as pq

from flash.data.encoders import json_type
from flash.data.settings import DocumentUnit, FileFormat
from flash.errors import InputError, short

UNREADABLE = (
    pa.ArrowException,
    ValueError,
    OverflowError,
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
)
"""Errors of files that are damaged or cannot be opened."""
_DECOMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"),
}
COMPRESSED = tuple(_DECOMPRESSED)
"""Suffixes of compressed text files."""
_ROWS = 1000
"""Rows of a parquet file that are read at a time."""


class Row(NamedTuple):
    """One row of a file.

    Attributes:
        file: Path of the file.
        number: Number of the row from 1, which is its line in text and in JSON lines; 0 if the row
            is the whole file.
        value: Value of the column, or an `InputError` if the row cannot be read.
    """

    file: str
    number: int
    value: Any

    @property
    def place(self) -> str:
        """File and number, for messages."""
        return f"{self.file}, row {self.number}" if self.number else self.file


def read_rows(
    path: Path, kind: FileFormat, column: str, unit: DocumentUnit, wanted: Iterator[int]
) -> Iterator[Row]:
    """Read some rows of a file; only these are parsed.

    Args:
        path: File to read.
        kind: Format of the file.
        column: Column to read. It has no effect on text files.
        unit: Extent of a row of a text file.
        wanted: Increasing indices of rows from 0, without end.

    Raises:
        OSError: The file is damaged (or any other error of `UNREADABLE`).
    """
    if kind is FileFormat.parquet:
        yield from _parquet_rows(path, column, wanted)
        return
    with _opened(path) as file:
        if kind is FileFormat.jsonl:
            contents, parse = _json_contents(file, path), partial(_column_of, column=column)
        else:
            contents, parse = _text_contents(file, unit), _decoded
        target = next(wanted)
        for index, (number, content) in enumerate(contents):
            if index == target:
                try:
                    value = parse(content)
                except InputError as error:
                    value = error
                yield Row(str(path), number, value)
                target = next(wanted)


def pick(
    arrays: Iterable[pa.Array | pa.ChunkedArray], wanted: Iterator[int], first: int = 0
) -> Iterator[tuple[int, Any]]:
    """Select some rows of a column that comes in parts.

    Args:
        arrays: Parts of the column, in order.
        wanted: Increasing indices of rows, without end.
        first: Index of the first row of the first part.

    Returns:
        The index and the value of each row.
    """
    target = next(wanted)
    for array in arrays:
        chosen = []
        while target < first + len(array):
            chosen.append(target - first)
            target = next(wanted)
        if pa.types.is_string_view(array.type):  # which `take` does not know
            array = array.cast(pa.large_string())
        taken = array.take(pa.array(chosen, pa.int64()))
        try:
            values = taken.to_pylist()
        except UnicodeDecodeError:
            values = [_scalar(scalar) for scalar in taken]
        for index, value in zip(chosen, values, strict=True):
            yield first + index, value
        first += len(array)


def _scalar(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return _not_utf8(error)


def _parquet_rows(path: Path, column: str, wanted: Iterator[int]) -> Iterator[Row]:
    """Read rows of a parquet file, from the row group of the first one on."""
    target = next(wanted)
    with pq.ParquetFile(path) as file:
        first, group = 0, 0
        while group < file.num_row_groups:
            rows = file.metadata.row_group(group).num_rows
            if target < first + rows:
                break
            first, group = first + rows, group + 1
        batches = file.iter_batches(
            _ROWS, row_groups=range(group, file.num_row_groups), columns=[column]
        )
        arrays = (batch.column(column) for batch in batches)
        for index, value in pick(arrays, chain([target], wanted), first):
            yield Row(str(path), index + 1, value)


def _opened(path: Path) -> io.BufferedReader:
    """Open a file for reading its bytes, without compression and byte order mark."""
    raw: Any = _DECOMPRESSED.get(path.suffix.lower(), lambda path: path.open("rb"))(path)
    file = io.BufferedReader(raw)
    if file.peek(3).startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    return file


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(error) from None


def _not_utf8(error: UnicodeDecodeError) -> InputError:
    return InputError(f"is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start})")


def _json_contents(file: io.BufferedReader, path: Path) -> Iterator[tuple[int, Any]]:
    """Contents of all rows: lines of JSON or, if the file is one JSON value, parsed values.

    Blank lines are no rows. A file that begins with a bracket may be a list of rows, and one that
    is named `.json` a single row on several lines.
    """
    if file.peek(1).lstrip().startswith(b"[") or _suffix(path) == ".json":
        values = _shared_values(path)
        if values is not None:
            yield from enumerate(values, 1)
            return
    yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _shared_values(path: Path) -> "_Values | None":
    """Rows of a file that is one JSON value; None for lines of JSON."""
    stat = path.stat()
    key = (path, stat.st_size, stat.st_mtime_ns)
    values = _SHARED.get(key)
    if values is None:
        with _opened(path) as file:
            first = next((line for line in file if line.strip()), b"")
            if first.lstrip().startswith(b"[") or _parsed(first)[1] is not None:
                values = _values(first + file.read())
        if values is not None:
            _SHARED[key] = values
    return values


def _suffix(path: Path) -> str:
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def _parsed(content: bytes) -> tuple[Any, str | None]:
    """Value of a JSON text, and the problem of a text that is none."""
    try:
        return json.loads(_decoded(content)), None
    except InputError as error:
        return None, str(error)
    except (ValueError, RecursionError) as error:
        return None, f"is no JSON ({error})"


def check_objects(path: Path) -> None:
    """Check that each row of a JSON file is an object.

    Raises:
        InputError: A row is something else; names file and row.
        OSError: The file is damaged (or any other error of `UNREADABLE`).
    """
    with _opened(path) as file:
        for number, content in _json_contents(file, path):
            whole = isinstance(content, bytes)
            row, problem = _parsed(content) if whole else (content, None)
            if not isinstance(row, dict):
                found = problem or f"is {json_type(row)}; expected an object"
                raise InputError(f"{path}, row {number}: {found}")


class _Values(list[Any]):
    """Rows of a file, which can be referred to weakly."""


_SHARED: WeakValueDictionary[tuple[Path, int, int], _Values] = WeakValueDictionary()
"""Rows of lists that are being read: all logical shards of a process read the same ones."""


def _values(content: bytes) -> _Values | None:
    """Rows of a file that is one JSON value.

    A text in a list is a row with a `text`, as `datasets` takes it.
    """
    value, problem = _parsed(content)
    if problem is not None:
        return None
    rows = value if isinstance(value, list) else [value]
    return _Values({"text": row} if isinstance(row, str) else row for row in rows)


def _column_of(content: Any, column: str) -> Any:
    row, problem = _parsed(content) if isinstance(content, bytes) else (content, None)
    if problem is not None:
        raise InputError(problem)
    if not isinstance(row, dict):
        raise InputError(f"is {json_type(row)}; expected an object with {column}")
    if column not in row:
        raise InputError(f"expected {column}, found {short(', '.join(row)) or 'an empty object'}")
    return row[column]


def _text_contents(file: io.BufferedReader, unit: DocumentUnit) -> Iterator[tuple[int, bytes]]:
    """Contents of all rows of a text file; every line ends with a newline alone.

    Blank lines are no rows, and paragraphs lie between them.
    """
    if unit is DocumentUnit.document:
        content = _with_newlines(file.read())
        if content.strip():
            yield 0, content
        return
    start, paragraph = 0, []
    lines = (part for line in file for part in _with_newlines(line).splitlines(keepends=True))
    for number, line in enumerate(chain(lines, [b"\n"]), 1):
        if unit is DocumentUnit.line and line.strip():
            yield number, line.removesuffix(b"\n")
        elif line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield start, b"".join(paragraph).removesuffix(b"\n")
            paragraph = []


def _with_newlines(content: bytes) -> bytes:
    return content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
