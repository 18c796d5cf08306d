"""The parts of a mixture: opened and checked, read row by row."""

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

# The library writes a line of its own before it raises; ours says the same and what to do.
logging.getLogger("datasets").setLevel(logging.CRITICAL)

_SUFFIXES = {
    ".parquet": FileFormat.parquet,
    ".jsonl": FileFormat.jsonl,
    ".json": FileFormat.jsonl,
    ".txt": FileFormat.txt,
}
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_MANY = 1 << 14
"""More files than this are read in groups: each costs some memory in every process."""
_ROWS = 1000
"""Rows read at a time."""


class TextSource:
    """One part of a mixture.

    Args:
        settings: Where it is.
        key: Setting that named it, for errors: `data.parts[0]`.
        skip_damaged: Leave damaged files out, with a warning.

    Attributes:
        fingerprint: Changes when the data do: the commit on the hub, or each file's name, size and
            a hash of its first and last 64 KiB.
        num_files: Files, or groups of files if there are very many.

    Raises:
        InputError: Nothing there, unreadable, or no such column.
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
        self.num_files = min(self.dataset.num_shards, _MANY)

    def values(self, file: int, offset: int, stride: int, start: int) -> Iterator[Any]:
        """Rows `offset`, `offset + stride`, ... of a file, without the first `start` of them.

        Raises:
            InputError: The file is damaged and damage is not to be skipped.
        """
        row, seen = offset + start * stride, 0
        data = self.dataset.shard(self.num_files, file).with_format("arrow")
        # `iter`, as `__iter__` would deal the file out to the workers of a DataLoader once more.
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
            raise error  # of the network, most likely
        if self.files is not None and len(self.files) == self.num_files:
            name = str(self.files[file])
        else:
            name = f"file {file} of {self.settings.path}"
        self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        problem = _line(error)
        if not self.skip_damaged:
            raise InputError(
                f"{self.key}.path: {name} is damaged ({problem}); copy it again, or set "
                "data.skip_damaged=true to leave it out"
            ) from error
        log.warning("%s: %s is damaged and left out (%s)", self.key, name, problem)

    def _readable(self, files: list[Path]) -> list[Path]:
        """Those parquet files whose footer can be read."""
        readable = []
        for path in files:
            try:
                pq.read_metadata(path)
            except (pa.ArrowException, OSError) as error:
                self._leave_out(str(path), error)
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
            problem = f"expected {kind.value} files ({_line(error)})"
            raise InputError(f"{self.key}.path={self.settings.path}: {problem}") from error

    def _check_column(self) -> None:
        names = self.dataset.column_names
        if names is None:  # said nowhere: the first row shows it
            try:
                first: Any = next(self.dataset.with_format("arrow").iter(batch_size=1), None)
            except (pa.ArrowException, ValueError) as error:
                raise InputError(
                    f"{self.key}.path={self.settings.path}: cannot be read ({_line(error)})"
                ) from error
            names = first.column_names if first is not None else []
        if self.settings.column not in names:
            raise InputError(
                f"{self.key}.column={self.settings.column}: expected one of {', '.join(names)}, "
                f"the columns of {self.settings.path}"
            )


def open_parts(settings: DataSettings) -> list[TextSource]:
    """The mixture.

    Raises:
        InputError: A part cannot be used.
    """
    return [
        TextSource(part, f"data.parts[{i}]", skip_damaged=settings.skip_damaged)
        for i, part in enumerate(settings.parts)
    ]


def _find(settings: TextSourceSettings, key: str) -> list[Path] | None:
    """The files, in the order of their names; None for a data set of the hub."""
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
    return Path(path.stem).suffix if path.suffix in _PACKED else path.suffix


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
    """The data set at one commit, and what that is."""
    named = f"{key}.path={settings.path}"
    try:
        info = HfApi().dataset_info(settings.path, revision=settings.revision, timeout=30)
        dataset = load_dataset(
            settings.path,
            settings.name,
            split=settings.split,
            revision=info.sha,  # also if the hub moves on meanwhile
            streaming=True,
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, FileNotFoundError) as error:
        raise InputError(
            f"{named}: expected files or a data set on the hub, found neither, or it needs "
            f"permission; check path and revision, or run `hf auth login` ({_line(error)})"
        ) from error
    except (HTTPError, OSError) as error:
        raise InputError(
            f"{named}: the hub cannot be reached to read this data set ({_line(error)}); run where "
            "there is a network, or name files"
        ) from error
    except (ValueError, RuntimeError) as error:  # no such configuration or split; a script
        raise InputError(
            f"{named}: cannot be read with {key}.name={settings.name} and "
            f"{key}.split={settings.split} ({_line(error)})"
        ) from error
    return dataset, [settings.path, str(settings.name), settings.split, str(info.sha)]


def _line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__
