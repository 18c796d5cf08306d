"""Documents of one logical shard, drawn from all sources of a mixture in a repeatable order.

Each logical shard has files of its own (or, where files are few, an equal share of the rows of
each), and reads them again in a new order once all have been read.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flash.data.encoders import EncodedDocument, Encoder, in_validation_split
from flash.errors import InputError

if TYPE_CHECKING:
    from flash.data.readers import Row
    from flash.data.sources import TextSource

_SHUFFLE_BLOCK = 128
"""Documents of a logical shard that are read at a time and shuffled among themselves."""
_MIN_SLICES = 16
"""Least number of file slices per logical shard, so that shards differ by less than 1/16."""
MIN_DOCUMENTS = 4
"""Least number of documents of a source in each of several logical shards, as those of a shard that
has few are read more often than others."""
_HEAD_START_TOKENS = 8192
"""Largest random head start of a source, so that shards begin with different sources [tokens]."""


class Split(Enum):
    """Part of the documents that is read."""

    train = "train"
    """Documents outside the validation split."""
    validation = "validation"
    """Documents in the validation split."""
    all = "all"
    """All documents."""


@dataclass(frozen=True)
class StreamedSequences:
    """Endless sequences of a mixture; the settings that all logical shards share.

    Attributes:
        sources: Sources of the mixture.
        encoder: Converter of rows to tokens.
        seq_len: Targets per sequence, which has one token more.
        end_of_text: Id of the token that ends documents and fills sequences up.
        logical_shards: Number of logical shards.
        seed: Seed of every order.
        split: Documents that are read.
        validation_percent: Share of the validation split, unless `split` is `all` [%].
        document_masks: True if sequences carry `Batch.document_ids`.
        single_pass: True if every document is read once only, and weights decide nothing but the
            order.
    """

    sources: "list[TextSource]"
    encoder: Encoder
    seq_len: int
    end_of_text: int
    logical_shards: int = 1
    seed: int = 0
    split: Split = Split.all
    validation_percent: int = 0
    document_masks: bool = False
    single_pass: bool = False

    def initial_states(self) -> Tensor:
        """States of all logical shards at the beginning of a run `(logical_shards, state)`."""
        states = torch.zeros(self.logical_shards, 2 + 4 * len(self.sources), dtype=torch.long)
        states[:, 0] = torch.arange(self.logical_shards)
        return states

    def reads(self, row: "Row", source: "TextSource") -> bool:
        """True if a row has a value, which can be read and belongs to the split that is read.

        Raises:
            InputError: The row cannot be read, and such rows are not to be skipped.
        """
        try:
            if isinstance(row.value, InputError):
                raise row.value
            if row.value is None:
                return False  # an empty document
            self.encoder.check(row.value)
        except InputError as error:
            source.refuse(row, error)
            return False
        if self.split is Split.all:
            return True
        return in_validation_split(row.value, self.validation_percent) == (
            self.split is Split.validation
        )


class FileSlice(NamedTuple):
    """One share of the rows of a file (`flash.data.sources.rows_of`).

    Attributes:
        file: Number of the file in its source.
        offset: Number of the share.
        stride: Number of shares of the file.
    """

    file: int
    offset: int
    stride: int


class FileSlices:
    """File slices of a logical shard: whole files or, where these are few, shares of all files.

    Args:
        num_files: Number of files of the source.
        shard: Number of the logical shard.
        logical_shards: Number of logical shards.
    """

    def __init__(self, num_files: int, shard: int, logical_shards: int) -> None:
        self._num_files, self._stride = num_files, slices_per_file(num_files, logical_shards)
        self._numbers = range(shard, num_files * self._stride, logical_shards)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> FileSlice:
        offset, file = divmod(self._numbers[index], self._num_files)
        return FileSlice(file, offset, self._stride)


def slices_per_file(num_files: int, logical_shards: int) -> int:
    """Number of slices that each file of a source is cut into."""
    return min(
        logical_shards // math.gcd(num_files, logical_shards),
        math.ceil(_MIN_SLICES * logical_shards / num_files),
    )


Position = tuple[int, int, int]
"""Position in a source: epoch, number of the file slice in the epoch's order, and rows read of that
slice."""


class Mixture:
    """Documents of one logical shard, drawn from all sources in proportion to their weights.

    Args:
        sequences: Settings of the stream.
        shard: Number of the logical shard.
        state: State to resume from. None begins the first epoch.

    Attributes:
        state: One row per source: its tokens so far and the three numbers of its position.
    """

    def __init__(
        self, sequences: StreamedSequences, shard: int, state: np.ndarray | None = None
    ) -> None:
        self.sequences, self.shard = sequences, shard
        num_sources = len(sequences.sources)
        self.state = np.zeros((num_sources, 4), np.int64) if state is None else state.copy()
        self._weights = np.array([source.settings.weight for source in sequences.sources])
        random = np.random.default_rng((sequences.seed, shard))
        self._head_start = random.random(num_sources) * _HEAD_START_TOKENS
        self._readers: dict[int, Iterator[tuple[Position, Row | None]]] = {}

    @property
    def exhausted(self) -> bool:
        """True once every source has been read to its end."""
        return bool((self.state[:, 1] > 0).all())

    def take(self, count: int = 1) -> list[EncodedDocument]:
        """Read up to `count` documents of the source that is furthest behind its share.

        Returns:
            At least one document, or none at the end of a single pass.

        Raises:
            InputError: A source has no documents for this logical shard.
        """
        ends, single_pass = 0, self.sequences.single_pass
        while not (single_pass and self.exhausted):
            progress = self.state[:, 0] / self._weights + self._head_start
            if single_pass:
                progress[self.state[:, 1] > 0] = np.inf
            source = int(np.argmin(progress))
            rows = self._read(source, count)
            taken = self._encode(source, rows)
            if taken:
                self.state[source, 0] += sum(map(len, taken))
                return taken
            ends += len(rows) < count
            if ends == 2 and not single_pass:
                raise self._no_documents(source)
        return []

    def _read(self, source: int, count: int) -> "list[Row]":
        """Read the next documents; fewer than `count` only at the end of an epoch."""
        if source not in self._readers:
            epoch, file_slice, row = self.state[source, 1:].tolist()
            start = (epoch, file_slice, row)
            self._readers[source] = _documents(self.sequences, self.shard, source, start)
        rows: list[Row] = []
        for position, row in self._readers[source]:
            self.state[source, 1:] = position
            if row is None:
                break
            rows.append(row)
            if len(rows) == count:
                break
        return rows

    def _encode(self, source: int, rows: "list[Row]") -> list[EncodedDocument]:
        documents = []
        encoded = self.sequences.encoder.encode([row.value for row in rows])
        for row, document in zip(rows, encoded, strict=True):
            if isinstance(document, InputError):
                self.sequences.sources[source].refuse(row, document)
            elif document is not None:
                documents.append(document)
        return documents

    def _no_documents(self, source: int) -> InputError:
        settings = self.sequences.sources[source].settings
        return InputError(
            f"{self.sequences.sources[source].key}.path={settings.path}: logical shard "
            f"{self.shard} of {self.sequences.logical_shards} has 0 documents with "
            f"{self.sequences.encoder.needed}, without those of the validation split; expected one "
            "or more: lower data.logical_shards, or give more documents"
        )


def _documents(
    sequences: StreamedSequences, shard: int, source: int, start: Position
) -> "Iterator[tuple[Position, Row | None]]":
    """Read documents of a logical shard from a position on, each with the position after it.

    None in place of a document marks the end of an epoch. These readers do not refer to the mixture
    that holds them: one that is dropped ends at once, and not when circles are collected.
    """
    epoch, first_slice, first_row = start
    with sequences.sources[source].first_epoch():
        yield from _epoch(sequences, shard, source, epoch, first_slice, first_row)
    while True:
        epoch += 1
        yield (epoch, 0, 0), None
        yield from _epoch(sequences, shard, source, epoch, 0, 0)


def _epoch(
    sequences: StreamedSequences,
    shard: int,
    source: int,
    epoch: int,
    first_slice: int,
    first_row: int,
) -> "Iterator[tuple[Position, Row]]":
    """Read the documents of an epoch from a position on, each with the position after it."""
    opened = sequences.sources[source]
    slices = FileSlices(opened.num_files, shard, sequences.logical_shards)
    seed = (sequences.seed, source, shard, epoch)
    order = np.random.default_rng(seed).permutation(len(slices))
    for number in range(first_slice, len(slices)):
        chosen = slices[int(order[number])]
        for end, row in _shuffled(opened, chosen, (*seed, number), first_row):
            if sequences.reads(row, opened):
                yield (epoch, number, end), row
        first_row = 0


def _shuffled(
    source: "TextSource", file_slice: FileSlice, seed: tuple[int, ...], start: int
) -> "Iterator[tuple[int, Row]]":
    """Read the rows of a slice from `start` on, shuffled block by block.

    Each comes with the number of rows read after it. The order of rows is a function of their
    block alone, so that a checkpoint need not contain any of it.
    """
    number = start // _SHUFFLE_BLOCK
    rows = source.rows(*file_slice, number * _SHUFFLE_BLOCK)
    skip = start - number * _SHUFFLE_BLOCK
    while block := list(islice(rows, _SHUFFLE_BLOCK)):
        order = np.random.default_rng((*seed, number)).permutation(len(block))
        for i in range(skip, len(block)):
            yield number * _SHUFFLE_BLOCK + i + 1, block[order[i]]
        number, skip = number + 1, 0
