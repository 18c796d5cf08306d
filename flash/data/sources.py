"""Sources of a mixture: opening, checking, and reading row by row."""

import glob
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset, load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from flash.compat.huggingface_hub import HTTPError
from flash.data.settings import DataSettings, FileFormat, TextSourceSettings
from flash.errors import InputError

log = logging.getLogger(__name__)

# The library logs each error before it raises it; our message says the same and adds a remedy.
logging.getLogger("datasets").setLevel(logging.CRITICAL)

_SUFFIXES = {
    ".parquet": FileFormat.parquet,
    ".jsonl": FileFormat.jsonl,
    ".json": FileFormat.jsonl,
    ".txt": FileFormat.txt,
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_MAX_FILES = 1 << 14
"""Most files that are read one by one, as each costs some memory in every process. More than these
are read in groups."""
_ROWS = 1000
"""Rows that are read at a time."""


class TextSource:
    """One source of a mixture, opened and checked.

    Args:
        settings: Location and format of the source.
        key: Key of the setting that names the source, for errors, such as `data.sources[0]`.
        skip_damaged: Skip damaged files, with a warning.

    Attributes:
        fingerprint: Identity of the data: the commit on the hub, or for each file its name, its
            size and a hash of its first and last 64 KiB.
        num_files: Number of files, or of groups of files where these are very many.

    Raises:
        InputError: The source is missing or cannot be read, or lacks the column.
    """

    def __init__(self, settings: TextSourceSettings, key: str, *, skip_damaged: bool) -> None:
        self.settings, self.key, self.skip_damaged = settings, key, skip_damaged
        self.files = _find(settings, key)
        if self.files is None:
            self.dataset, self.fingerprint = _open_hub(settings, key)
        else:
            kind = _format(self.files, settings, key)
            if kind is FileFormat.parquet:
                self.files = self._readable(self.files)
            self.fingerprint = [_file_fingerprint(path) for path in self.files]
            self.dataset = self._open_files(self.files, kind)
        self._check_column()
        self.num_files = min(self.dataset.num_shards, _MAX_FILES)

    def values(self, file: int, offset: int, stride: int, start: int) -> Iterator[Any]:
        """Read the values of the column in every `stride`-th row of a file.

        Args:
            file: Number of the file, below `num_files`.
            offset: First of the rows.
            stride: Distance between rows.
            start: Number of these rows to skip.

        Raises:
            InputError: The file is damaged, and `skip_damaged` is false.
        """
        row, seen = offset + start * stride, 0
        data = self.dataset.shard(self.num_files, file).with_format("arrow")
        # `iter`, because `__iter__` would divide the file among the workers of a DataLoader again.
        tables = data.iter(batch_size=_ROWS)
        while True:
            try:
                table: Any = next(tables, None)
            except (pa.ArrowException, ValueError, OSError) as error:
                self._damaged(file, error)
                return
            if table is None:
                return
            chosen = range(row - seen, len(table), stride)
            yield from (
                table.column(self.settings.column).take(pa.array(chosen, pa.int64())).to_pylist()
            )
            row += len(chosen) * stride
            seen += len(table)

    def _damaged(self, file: int, error: Exception) -> None:
        if self.files is None and isinstance(error, OSError):
            raise error  # most likely an error of the network
        if self.files is not None and len(self.files) == self.num_files:
            name = str(self.files[file])
        else:
            name = f"file {file} of {self.settings.path}"
        self._skip_or_raise(name, error)

    def _skip_or_raise(self, name: str, error: Exception) -> None:
        problem = _first_line(error)
        if not self.skip_damaged:
            raise InputError(
                f"{self.key}.path: {name} is damaged ({problem}); copy it again, or set "
                "data.skip_damaged=true to skip it"
            ) from error
        log.warning("%s: %s is damaged and is skipped (%s)", self.key, name, problem)

    def _readable(self, files: list[Path]) -> list[Path]:
        """Select the parquet files whose footer can be read."""
        readable = []
        for path in files:
            try:
                pq.read_metadata(path)
            except (pa.ArrowException, OSError) as error:
                self._skip_or_raise(str(path), error)
            else:
                readable.append(path)
        if not readable:
            raise InputError(f"{self.key}.path={self.settings.path}: has no file that can be read")
        return readable

    def _open_files(self, files: list[Path], kind: FileFormat) -> IterableDataset:
        options: dict[str, Any] = {}
        builder = {FileFormat.parquet: "parquet", FileFormat.jsonl: "json", FileFormat.txt: "text"}[
            kind
        ]
        if kind is FileFormat.txt:
            options = {"sample_by": self.settings.unit.value, "encoding_errors": "replace"}
        if kind is FileFormat.parquet and self.settings.column in pq.read_schema(files[0]).names:
            options = {"columns": [self.settings.column]}
        names = [str(path.resolve()) for path in files]
        try:
            return load_dataset(builder, data_files=names, split="train", streaming=True, **options)
        except (pa.ArrowException, ValueError, OSError) as error:
            problem = f"expected {kind.value} files ({_first_line(error)})"
            raise InputError(f"{self.key}.path={self.settings.path}: {problem}") from error

    def _check_column(self) -> None:
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
                f"{self.key}.column={self.settings.column}: expected one of {', '.join(names)}, "
                f"the columns of {self.settings.path}"
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


def _find(settings: TextSourceSettings, key: str) -> list[Path] | None:
    """List the files in the order of their names; None for a data set of the hub."""
    path = Path(settings.path)
    if path.is_dir():
        kinds = {s for s, kind in _SUFFIXES.items() if settings.format in {None, kind}}
        found = [file for file in path.rglob("*") if _suffix(file) in kinds]
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
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


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
