"""Endless sequences from a streamed mixture, the same for any number of ranks and workers.

The data are divided into a fixed number of logical shards. Each shard has files of its own (or,
where files are few, an equal share of the rows of each). It mixes the sources, tokenises and packs
documents, and repeats them in a new order once all have been read. Sequence number g of the run is
the next sequence of shard g % logical_shards. Ranks and workers therefore decide only where a
sequence is computed.

Each sequence carries the state of its shard after it. A checkpoint needs nothing but the states
after the sequences that were trained on. A shard that resumes from a state reads the current file
again from its beginning, and tokenises at most one document again.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flash.data.batch import Batch, collate, document_ids_of
from flash.data.encoders import EncodedDocument, Encoder, in_validation_split
from flash.data.sampler import Share
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

    def first(self, count: int) -> Iterator[Batch]:
        """Compute the first `count` sequences of the run.

        Raises:
            InputError: A source has no documents for a logical shard.
        """
        for sequence in islice(SequenceStream(self, Share(1), 0, self.initial_states()), count):
            if isinstance(sequence, InputError):
                raise sequence
            yield sequence

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


class LogicalShard:
    """Sequences of one logical shard.

    The `stream_state` of a sequence consists of the number of the shard, the number of tokens of
    the last document taken that belong to later sequences, and the state of the mixture before that
    document was taken.

    Args:
        sequences: Settings of the stream.
        number: Number of this shard.
        state: `stream_state` of the sequence before the first one, or an initial state.
    """

    def __init__(self, sequences: StreamedSequences, number: int, state: Tensor) -> None:
        self.sequences, self.number = sequences, number
        self._left = int(state[1])
        self._mixture = Mixture(sequences, number, state[2:].numpy().reshape(-1, 4))
        self._before = self._mixture.state.copy()

    def __iter__(self) -> Iterator[Batch]:
        if self.sequences.encoder.splits_documents:
            return self._split_documents()
        return self._whole_documents()

    def _take(self) -> EncodedDocument | None:
        self._before = self._mixture.state.copy()
        taken = self._mixture.take()
        return taken[0] if taken else None

    def _resume(self) -> EncodedDocument | None:
        """Take the remaining tokens of the last document again."""
        document = self._take() if self._left else None
        return document.tail(self._left) if document is not None else None

    def _state(self, left: int) -> Tensor:
        return torch.tensor([self.number, left, *self._before.flatten().tolist()])

    def _split_documents(self) -> Iterator[Batch]:
        """Join documents and cut them wherever a sequence ends.

        Sequences overlap by one token, which is a target in the first and an input in the second.
        """
        seq_len, end_of_text = self.sequences.seq_len, self.sequences.end_of_text
        resumed = self._resume()
        buffer = resumed.tokens if resumed is not None else np.empty(0, np.int64)
        while True:
            while len(buffer) <= seq_len:
                document = self._take()
                if document is None:
                    return
                buffer = np.concatenate([buffer, document.tokens])
            tokens = torch.from_numpy(buffer[: seq_len + 1].copy())
            buffer = buffer[seq_len:]
            masks = self.sequences.document_masks
            document_ids = document_ids_of(tokens, end_of_text) if masks else None
            yield Batch(tokens, None, document_ids, self._state(len(buffer)))

    def _whole_documents(self) -> Iterator[Batch]:
        """Pack as many whole documents as fit into a sequence; fill it up with end-of-text."""
        size = self.sequences.seq_len + 1
        pending = self._resume() or self._take()
        while pending is not None:
            members, room = [pending], size - len(pending)
            pending = self._take()
            while pending is not None and len(pending) <= room:
                members.append(pending)
                room -= len(pending)
                pending = self._take()
            yield self._packed(members, room, 0 if pending is None else len(pending))

    def _packed(self, members: list[EncodedDocument], room: int, left: int) -> Batch:
        fill = EncodedDocument(np.full(room, self.sequences.end_of_text, np.int64))
        masks = []
        for member in members:
            known = member.loss_mask
            mask = np.ones(len(member), bool) if known is None else known.copy()
            mask[0] = False  # no token of the same document comes before it
            masks.append(mask)
        tokens = np.concatenate([member.tokens for member in (*members, fill)])
        loss_mask = np.concatenate([*masks, np.zeros(room, bool)])[1:]
        lengths = [len(member) for member in (*members, fill)]
        document_ids = np.repeat(np.arange(len(lengths)), lengths)[:-1]
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(loss_mask),
            torch.from_numpy(document_ids) if self.sequences.document_masks else None,
            self._state(left),
        )


class SequenceStream(IterableDataset[Batch | InputError]):
    """Sequences of one rank, in their order, from an optimizer step on.

    A DataLoader asks its workers in turn for one sequence each. The worker with number w computes
    every `workers`-th sequence, and all of these come from the same logical shards. An error is
    passed on as a value, because the loader would wrap an exception.

    Args:
        sequences: Settings of the stream.
        share: Share of this rank.
        steps: Optimizer steps done.
        states: State of each logical shard `(logical_shards, state)`.
    """

    def __init__(
        self, sequences: StreamedSequences, share: Share, steps: int, states: Tensor
    ) -> None:
        self.sequences, self.share, self.states = sequences, share, states
        self._first = share.sequences_after(steps)

    def __iter__(self) -> Iterator[Batch | InputError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        shards: dict[int, Iterator[Batch]] = {}
        local = self._first + number
        try:
            while True:
                sequence = self.share.rank + local * self.share.world_size
                shard = sequence % self.sequences.logical_shards
                if shard not in shards:
                    shards[shard] = iter(LogicalShard(self.sequences, shard, self.states[shard]))
                yield next(shards[shard])
                local += workers
        except InputError as error:
            yield error


class StreamLoader:
    """Loader of micro-batches from a stream, with workers that read ahead.

    Args:
        stream: Sequences of this rank.
        workers: Most processes; each has logical shards of its own, as many as the others. 0 reads
            between the steps.

    Raises:
        InputError: The number of logical shards is not a multiple of the ranks.
    """

    def __init__(self, stream: SequenceStream, workers: int) -> None:
        shards, ranks = stream.sequences.logical_shards, stream.share.world_size
        if shards % ranks:
            raise InputError(
                f"data.logical_shards: {shards} have {MIN_DOCUMENTS} or more documents each; "
                f"expected a multiple of {ranks} ranks: use another number of ranks "
                "(trainer.devices) or of logical shards, or give more documents"
            )
        fitting = [
            number for number in range(workers + 1) if shards % (ranks * max(number, 1)) == 0
        ]
        self.stream, self.workers = stream, fitting[-1]

    def __iter__(self) -> Iterator[Batch]:
        if self.workers:
            # Workers are forked and encode one document at a time. Threads of the tokenizer would
            # be in the way, and the library warns about them on stderr unless they are turned off.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        loader = DataLoader(self.stream, batch_size=None, num_workers=self.workers)
        sequences: list[Batch] = []
        for sequence in loader:
            if isinstance(sequence, InputError):
                raise sequence
            sequences.append(sequence)
            if len(sequences) == self.stream.share.micro_batch:
                yield collate(sequences)
                sequences = []
