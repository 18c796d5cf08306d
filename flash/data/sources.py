"""Sources of a mixture: opening, checking, and reading row by row."""

import glob
import hashlib
import logging
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from flash.compat.huggingface_hub import HTTPError
from flash.data.readers import COMPRESSED, UNREADABLE, Row, pick, read_rows
from flash.data.settings import DataSettings, DocumentUnit, FileFormat, TextSourceSettings
from flash.errors import InputError, short

log = logging.getLogger(__name__)

# The library logs each error before it raises it; our message says the same and adds a remedy.
logging.getLogger("datasets").setLevel(logging.CRITICAL)

_SUFFIXES = {
    ".parquet": FileFormat.parquet,
    ".jsonl": FileFormat.jsonl,
    ".ndjson": FileFormat.jsonl,
    ".json": FileFormat.jsonl,
    ".txt": FileFormat.txt,
}
_DESCRIPTIONS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
"""Files that describe a data set, which `datasets` leaves out of a folder as well."""
_MAX_HUB_FILES = 1 << 14
"""Most files of a data set of the hub that are read one by one. More are read in groups."""
_ROWS = 1000
"""Rows that are read at a time, and rows among which a usable one is expected at least."""
_TURN = 0x9E3779B97F4A7C15
"""Golden ratio as a fraction of 2**64: its multiples, modulo 1, are evenly spread."""


def turn_of(block: int, stride: int) -> int:
    """Turn of the rows of a block against its shares, from 0 to `stride - 1`.

    Every block of `stride` rows gives one row to each share. Blocks are turned against each other,
    so that a share does not get all even rows, or all questions of a list of questions and answers.
    """
    return (block * _TURN % (1 << 64)) * stride >> 64


def rows_of(offset: int, stride: int, start: int) -> Iterator[int]:
    """Increasing indices of the rows of share `offset` of `stride`, the first `start` left out."""
    for block in count(start):
        yield block * stride + (offset + turn_of(block, stride)) % stride


class TextSource:
    """One source of a mixture, opened and checked.

    Args:
        settings: Location and format of the source.
        key: Key of the setting that names the source, for errors, such as `data.sources[0]`.
        skip_damaged: Skip damaged files and rows, with a warning.

    Attributes:
        files: Files that have rows, in the order of their names. None for a data set of the hub.
        kind: Format of the files.
        fingerprint: Identity of the data: the commit on the hub, or for each file its name, its
            size and a hash of its first and last 64 KiB.
        num_files: Number of files or, on the hub, of groups of files where these are very many.

    Raises:
        InputError: The source is missing or cannot be read, or lacks the column.
    """

    def __init__(self, settings: TextSourceSettings, key: str, *, skip_damaged: bool) -> None:
        self.settings, self.key, self.skip_damaged = settings, key, skip_damaged
        self._skipped: defaultdict[str, set[int]] = defaultdict(set)
        self._reported: dict[str, int] = {}
        self._readers = 0
        self.files = find_files(settings, key)
        if self.files is None:
            self.dataset, self.fingerprint = _open_hub(settings, key)
            self.num_files = min(self.dataset.num_shards, _MAX_HUB_FILES)
            self._check_hub_column()
            return
        self.kind = _format(self.files, settings, key)
        if self.kind is FileFormat.parquet:
            self.files = self._with_rows(self.files)
        self.fingerprint = [_file_fingerprint(path) for path in self.files]
        self.num_files = len(self.files)
        self._check_first_rows()

    @property
    def reads_lines(self) -> bool:
        """True if rows are lines or paragraphs of text files."""
        text = self.files is not None and self.kind is FileFormat.txt
        return text and self.settings.unit is not DocumentUnit.document

    def rows(self, file: int, offset: int, stride: int, start: int) -> Iterator[Row]:
        """Read the rows of one share of a file.

        The value of a row that cannot be read is an error, for `refuse`.

        Args:
            file: Number of the file, below `num_files`.
            offset: Number of the share, below `stride`.
            stride: Number of shares of the file.
            start: Number of rows of the share to skip.

        Raises:
            InputError: The file is damaged, and `skip_damaged` is false.
        """
        wanted = rows_of(offset, stride, start)
        if self.files is None:
            rows, name = self._hub_rows(file, wanted), f"file {file} of {self.settings.path}"
        else:
            settings, path = self.settings, self.files[file]
            rows, name = read_rows(path, self.kind, settings.column, settings.unit, wanted), path
        last = ""
        while True:
            try:
                row = next(rows, None)
            except UNREADABLE as error:
                if self.files is None and isinstance(error, OSError):
                    raise  # most likely an error of the network
                self._damaged(str(name), error, last)
                return
            if row is None:
                return
            last = f" after row {row.number}"
            yield row

    def refuse(self, row: Row, error: InputError) -> None:
        """Leave out a row that cannot be used; the first one of each file is logged.

        Raises:
            InputError: `skip_damaged` is false; the message names file and row.
        """
        named = f"{self.key}.column={self.settings.column}: {row.place}"
        if not self.skip_damaged:
            raise InputError(
                f"{named}: {error}; mend it, or set data.skip_damaged=true to leave such rows out"
            ) from error
        if not self._skipped[row.file]:
            log.warning("%s: %s; it is skipped, like others of its kind", named, error)
        self._skipped[row.file].add(row.number)

    @contextmanager
    def first_epoch(self) -> Iterator[None]:
        """Context of the first epoch of a logical shard that this process reads.

        The rows that were skipped are counted in the log once all have read theirs to the end.
        """
        self._readers += 1
        try:
            yield
        finally:
            self._readers -= 1
        if not self._readers:
            self._report()

    def _report(self) -> None:
        for file, rows in sorted(self._skipped.items()):
            if len(rows) != self._reported.get(file):
                self._reported[file] = len(rows)
                log.warning("%s: %s: rows that were skipped: %d", self.key, file, len(rows))

    def _hub_rows(self, file: int, wanted: Iterator[int]) -> Iterator[Row]:
        data = self.dataset.shard(self.num_files, file).with_format("arrow")
        # `iter`, because `__iter__` would divide the file among the workers of a DataLoader again.
        tables: Any = data.iter(batch_size=_ROWS)
        columns = (table.column(self.settings.column) for table in tables)
        for index, value in pick(columns, wanted):
            yield Row(f"file {file} of {self.settings.path}", index + 1, value)

    def _damaged(self, name: str, error: Exception, place: str = "") -> None:
        problem = _first_line(error) + place
        if not self.skip_damaged:
            raise InputError(
                f"{self.key}.path: {name} is damaged ({problem}); copy it again, or set "
                "data.skip_damaged=true to skip it"
            ) from error
        if name not in self._reported:
            self._reported[name] = 0
            log.warning("%s: %s is damaged and is skipped (%s)", self.key, name, problem)

    def _with_rows(self, files: list[Path]) -> list[Path]:
        """Select the parquet files that have rows, by their footers."""
        chosen = []
        for path in files:
            try:
                with pq.ParquetFile(path) as file:
                    rows, schema = file.metadata.num_rows, file.schema_arrow
            except UNREADABLE as error:
                self._damaged(str(path), error)
            else:
                if rows:
                    self._check_type(path, schema)
                    chosen.append(path)
        if not chosen:
            raise InputError(f"{self.key}.path={self.settings.path}: has 0 rows that can be read")
        return chosen

    def _check_type(self, path: Path, schema: pa.Schema) -> None:
        named, names = f"{self.key}.column={self.settings.column}", schema.names
        listed = short(", ".join(names))
        if self.settings.column not in names:
            raise InputError(f"{named}: expected one of {listed}, the columns of {path}")
        if names.count(self.settings.column) > 1:
            raise InputError(f"{named}: expected one column of this name in {path}, found several")
        found = schema.field(self.settings.column).type
        kind = found.value_type if pa.types.is_dictionary(found) else found
        types = pa.types
        binary = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
        if any(is_kind(kind) for is_kind in (*binary, types.is_binary_view)):
            raise InputError(f"{named}: expected text or messages in {path}, found {found}")

    def _check_hub_column(self) -> None:
        names = self.dataset.column_names
        if names is None:  # unknown before the first row is read
            try:
                first: Any = next(self.dataset.with_format("arrow").iter(batch_size=1), None)
            except (pa.ArrowException, ValueError) as error:
                raise InputError(
                    f"{self.key}.path={self.settings.path}: cannot be read ({_first_line(error)})"
                ) from error
            names = first.column_names if first is not None else []
        if self.settings.column not in names:
            raise InputError(
                f"{self.key}.column={self.settings.column}: expected one of "
                f"{short(', '.join(names))}, the columns of {self.settings.path}"
            )

    def _check_first_rows(self) -> None:
        """Find a row that can be read among the first ones.

        Raises:
            InputError: There is none, or a row before it cannot be read.
        """
        rows = (row for file in range(self.num_files) for row in self.rows(file, 0, 1, 0))
        first = list(islice(rows, 1))
        for row in chain(first, islice(rows, _ROWS - 1)):
            if not isinstance(row.value, InputError):
                return
            self.refuse(row, row.value)
        found = f"row {first[0].number}: {first[0].value}" if first else "0 rows"
        raise InputError(
            f"{self.key}.path={self.settings.path}: expected rows with {self.settings.column}, "
            f"found none among the first {_ROWS} ({found})"
        )


def open_sources(settings: DataSettings) -> list[TextSource]:
    """Open all sources of the mixture.

    Raises:
        InputError: A source cannot be used.
    """
    return [
        TextSource(source, f"data.sources[{i}]", skip_damaged=settings.skip_damaged)
        for i, source in enumerate(settings.sources)
    ]


def find_files(settings: TextSourceSettings, key: str) -> list[Path] | None:
    """List the files of a source in the order of their names; None for a data set of the hub.

    Raises:
        InputError: There is no such file, or none with something in it.
    """
    path = Path(settings.path)
    if path.is_dir():
        kinds = {s for s, kind in _SUFFIXES.items() if settings.format in {None, kind}}
        found = [file for file in path.rglob("*") if _suffix(file) in kinds]
        found = [file for file in found if not _aside(file.relative_to(path))]
        wanted = f"files that end in {', '.join(sorted(kinds))}"
    elif path.is_file():
        found, wanted = [path], "a file with something in it"
    elif any(character in settings.path for character in "*?["):
        found = [Path(name) for name in glob.glob(settings.path, recursive=True)]
        wanted = "files that match"
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", settings.path) and _suffix(path) not in _SUFFIXES:
        return None
    else:
        raise InputError(
            f"{key}.path={settings.path}: no such file; expected a file, a folder, a pattern or a "
            "data set on the hub"
        )
    files = sorted(file for file in found if file.is_file() and file.stat().st_size > 0)
    if not files:
        raise InputError(f"{key}.path={settings.path}: expected {wanted}, found none")
    return files


def _suffix(path: Path) -> str:
    name = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower()


def _aside(path: Path) -> bool:
    """True for hidden files, such as an editor's copies, and for descriptions of a data set.

    They are those that `datasets` leaves out of a folder.
    """
    hidden = any(part.startswith((".", "__")) for part in path.parts[:-1])
    return hidden or path.name.startswith(".") or path.name in _DESCRIPTIONS


def _format(files: list[Path], settings: TextSourceSettings, key: str) -> FileFormat:
    if settings.format is not None:
        return settings.format
    kinds = {_SUFFIXES.get(_suffix(path)) for path in files}
    kind = kinds.pop()
    if kinds or kind is None:
        raise InputError(
            f"{key}.path={settings.path}: expected files of one kind; set {key}.format to one of "
            f"{', '.join(known.value for known in FileFormat)}"
        )
    return kind


def _file_fingerprint(path: Path) -> str:
    size, edge = path.stat().st_size, 1 << 16
    with path.open("rb") as file:
        hasher = hashlib.sha256(file.read(edge))
        file.seek(max(0, size - edge))
        hasher.update(file.read(edge))
    return f"{path.name} {size} {hasher.hexdigest()[:16]}"


def _open_hub(settings: TextSourceSettings, key: str) -> tuple[IterableDataset, list[str]]:
    """Open a data set of the hub at one commit; also return its identity."""
    named = f"{key}.path={settings.path}"
    try:
        info = HfApi().dataset_info(settings.path, revision=settings.revision, timeout=30)
        dataset = load_dataset(
            settings.path,
            settings.name,
            split=settings.split,
            revision=info.sha,  # the same even if a newer commit appears meanwhile
            streaming=True,
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, FileNotFoundError) as error:
        raise InputError(
            f"{named}: expected files or a data set on the hub, found neither, or it needs "
            f"permission; check path and revision, or run `hf auth login` ({_first_line(error)})"
        ) from error
    except (HTTPError, OSError) as error:
        raise InputError(
            f"{named}: the hub cannot be reached to read this data set ({_first_line(error)}); run "
            "where there is a network, or name files"
        ) from error
    except (ValueError, RuntimeError) as error:  # unknown configuration or split, or a script
        raise InputError(
            f"{named}: cannot be read with {key}.name={settings.name} and "
            f"{key}.split={settings.split} ({_first_line(error)})"
        ) from error
    return dataset, [settings.path, str(settings.name), settings.split, str(info.sha)]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
