"""Endless sequences from streamed parts: the same whatever the number of ranks and workers.

The corpus is dealt to a fixed number of lanes. Each has files of its own (or, where files are few,
every n-th row of shared ones), mixes the parts, tokenises and packs, and repeats its documents in a
new order when all have been read. Sequence number g of the run is the next one of lane g % lanes,
so ranks and workers only decide who computes it.

Each sequence carries the place in its lane where it ends. The places of those that were learnt from
are all that a checkpoint needs: a lane that goes on from one reads the file that it was in from its
beginning, and tokenises one document again at most.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flash.data.batch import Batch, collate, document_numbers
from flash.data.encoders import Encoded, Encoder, is_held_out
from flash.data.sampler import Share
from flash.errors import InputError

if TYPE_CHECKING:
    from flash.data.sources import TextSource

_BLOCK = 128
"""Documents of a lane that are shuffled among themselves, and read at a time."""
_EVEN = 16
"""Pieces a lane has at least, so that lanes differ by less than 1/16."""
_APART_TOKENS = 8192
"""Lanes do not all begin with the same part."""


class Side(Enum):
    """Which documents are read."""

    train = "train"
    heldout = "heldout"
    all = "all"


@dataclass(frozen=True)
class Corpus:
    """What all lanes have in common.

    Attributes:
        parts: The mixture.
        encoder: Row to tokens.
        seq_len: Tokens a sequence.
        end_of_text: Fills sequences up; ends documents where they are cut.
        lanes: How many.
        seed: Decides every order.
        side: Which documents are read.
        heldout_percent: Share that is held out, if `side` is not all of them [%].
        document_masks: Whether sequences say which document an input is of.
        once: Whether every document is read just once, and weights decide nothing but the order.
    """

    parts: "list[TextSource]"
    encoder: Encoder
    seq_len: int
    end_of_text: int
    lanes: int = 1
    seed: int = 0
    side: Side = Side.all
    heldout_percent: int = 0
    document_masks: bool = False
    once: bool = False

    def first_places(self) -> Tensor:
        """Where the lanes begin `(lanes, place)`."""
        places = torch.zeros(self.lanes, 2 + 4 * len(self.parts), dtype=torch.long)
        places[:, 0] = torch.arange(self.lanes)
        return places

    def first(self, count: int) -> Iterator[Batch]:
        """The first sequences of the run.

        Raises:
            InputError: A part has nothing for a lane.
        """
        for sequence in islice(Stream(self, Share(1), 0, self.first_places()), count):
            if isinstance(sequence, InputError):
                raise sequence
            yield sequence

    def reads(self, value: Any) -> bool:
        """Whether a document is on the side that is read."""
        if self.side is Side.all:
            return True
        return is_held_out(value, self.heldout_percent) == (self.side is Side.heldout)


@dataclass(frozen=True)
class Piece:
    """Rows `offset`, `offset + stride`, ... of a file."""

    file: int
    offset: int
    stride: int


def pieces_of(num_files: int, lane: int, lanes: int) -> list[Piece]:
    """What a lane reads: whole files, or where these are few, every n-th row of shared ones."""
    stride = min(lanes // math.gcd(num_files, lanes), math.ceil(_EVEN * lanes / num_files))
    numbers = range(lane, num_files * stride, lanes)
    return [Piece(number % num_files, number // num_files, stride) for number in numbers]


Position = tuple[int, int, int]
"""Epoch, piece in the epoch's order, and rows of that piece."""


class Mixture:
    """The documents of one lane, from all parts in the shares that their weights say.

    Attributes:
        state: A row a part: its tokens so far, and the three numbers of its position.
    """

    def __init__(self, corpus: Corpus, lane: int, state: np.ndarray | None = None) -> None:
        self.corpus, self.lane = corpus, lane
        num_parts = len(corpus.parts)
        self.state = np.zeros((num_parts, 4), np.int64) if state is None else state.copy()
        self._weights = np.array([part.settings.weight for part in corpus.parts])
        random = np.random.default_rng((corpus.seed, lane))
        self._head_start = random.random(num_parts) * _APART_TOKENS
        self._reading: dict[int, Iterator[tuple[Position, Any]]] = {}

    @property
    def read_once(self) -> bool:
        """Whether each part has been read to its end."""
        return bool((self.state[:, 1] > 0).all())

    def take(self, count: int = 1) -> list[Encoded]:
        """Up to `count` documents of the part that is furthest behind, but at least one.

        None at all if the corpus is read once and this is its end.

        Raises:
            InputError: A part has nothing for this lane.
        """
        ends = 0
        while not (self.corpus.once and self.read_once):
            behind = self.state[:, 0] / self._weights + self._head_start
            if self.corpus.once:
                behind[self.state[:, 1] > 0] = np.inf
            part = int(np.argmin(behind))
            values = self._read(part, count)
            taken = self._encode(part, values)
            if taken:
                self.state[part, 0] += sum(map(len, taken))
                return taken
            ends += len(values) < count
            if ends == 2 and not self.corpus.once:
                raise self._nothing(part)
        return []

    def _read(self, part: int, count: int) -> list[Any]:
        """The next documents, fewer than `count` only at the end of an epoch."""
        if part not in self._reading:
            epoch, piece, row = self.state[part, 1:].tolist()
            self._reading[part] = self._documents(part, (epoch, piece, row))
        values: list[Any] = []
        for position, value in self._reading[part]:
            self.state[part, 1:] = position
            if value is None:
                break
            values.append(value)
            if len(values) == count:
                break
        return values

    def _encode(self, part: int, values: list[Any]) -> list[Encoded]:
        try:
            encoded = self.corpus.encoder.encode(values)
        except InputError as error:
            settings = self.corpus.parts[part].settings
            key = f"{self.corpus.parts[part].key}.column={settings.column}"
            raise InputError(f"{key}: {error}") from error
        return [document for document in encoded if document is not None]

    def _nothing(self, part: int) -> InputError:
        settings = self.corpus.parts[part].settings
        return InputError(
            f"{self.corpus.parts[part].key}.path={settings.path}: 0 documents with "
            f"{self.corpus.encoder.wanted} are left for lane {self.lane} of {self.corpus.lanes} "
            "without empty and held-out ones; expected one or more: lower data.lanes, or give more"
        )

    def _documents(self, part: int, start: Position) -> Iterator[tuple[Position, Any]]:
        """Documents from a position on, each with the position after it; None ends an epoch."""
        source = self.corpus.parts[part]
        pieces = pieces_of(source.num_files, self.lane, self.corpus.lanes)
        epoch, first_piece, first_row = start
        while True:
            seed = (self.corpus.seed, part, self.lane, epoch)
            order = np.random.default_rng(seed).permutation(len(pieces))
            for piece in range(first_piece, len(pieces)):
                chosen = pieces[order[piece]]
                for row, value in self._shuffled(source, chosen, (*seed, piece), first_row):
                    if value is not None and self.corpus.reads(value):
                        yield (epoch, piece, row), value
                first_row = 0
            epoch, first_piece = epoch + 1, 0
            yield (epoch, 0, 0), None

    @staticmethod
    def _shuffled(
        source: "TextSource", piece: Piece, seed: tuple[int, ...], start: int
    ) -> Iterator[tuple[int, Any]]:
        """Rows of a piece, shuffled block by block, without the first `start`; each with its end.

        Which row comes when is a function of its block alone, so that nothing of the order has to
        be kept in a checkpoint.
        """
        number = start // _BLOCK
        rows = source.values(piece.file, piece.offset, piece.stride, number * _BLOCK)
        skip = start - number * _BLOCK
        while block := list(islice(rows, _BLOCK)):
            order = np.random.default_rng((*seed, number)).permutation(len(block))
            for i in range(skip, len(block)):
                yield number * _BLOCK + i + 1, block[order[i]]
            number, skip = number + 1, 0


class Lane:
    """Sequences of one lane.

    Every sequence's `place` is: the lane, the tokens of the last document taken that belong to the
    sequences after it, and the mixture's state from before that document was taken.

    Args:
        corpus: What is read.
        number: Of this lane.
        place: Where to go on: the `place` of the last sequence before, or the first one.
    """

    def __init__(self, corpus: Corpus, number: int, place: Tensor) -> None:
        self.corpus, self.number = corpus, number
        self._left = int(place[1])
        self._mixture = Mixture(corpus, number, place[2:].numpy().reshape(-1, 4))
        self._before = self._mixture.state.copy()

    def __iter__(self) -> Iterator[Batch]:
        return self._cut() if self.corpus.encoder.cuts else self._whole()

    def _take(self) -> Encoded | None:
        self._before = self._mixture.state.copy()
        taken = self._mixture.take()
        return taken[0] if taken else None

    def _resume(self) -> Encoded | None:
        """What was left of the last document taken."""
        document = self._take() if self._left else None
        return document.last(self._left) if document is not None else None

    def _place(self, left: int) -> Tensor:
        return torch.tensor([self.number, left, *self._before.flatten().tolist()])

    def _cut(self) -> Iterator[Batch]:
        """Documents one after the other, cut wherever a sequence ends.

        Sequences overlap by one token, which is a target in the first and an input in the second.
        """
        seq_len, end_of_text = self.corpus.seq_len, self.corpus.end_of_text
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
            numbers = document_numbers(tokens, end_of_text) if self.corpus.document_masks else None
            yield Batch(tokens, None, numbers, self._place(len(buffer)))

    def _whole(self) -> Iterator[Batch]:
        """As many whole documents as fit into a sequence, and end-of-text up to its end."""
        size = self.corpus.seq_len + 1
        pending = self._resume() or self._take()
        while pending is not None:
            members, room = [pending], size - len(pending)
            pending = self._take()
            while pending is not None and len(pending) <= room:
                members.append(pending)
                room -= len(pending)
                pending = self._take()
            yield self._packed(members, room, 0 if pending is None else len(pending))

    def _packed(self, members: list[Encoded], room: int, left: int) -> Batch:
        fill = Encoded(np.full(room, self.corpus.end_of_text, np.int64))
        learnt = []
        for member in members:
            learn = np.ones(len(member), bool) if member.learn is None else member.learn.copy()
            learn[0] = False  # nothing of its own document comes before it
            learnt.append(learn)
        tokens = np.concatenate([member.tokens for member in (*members, fill)])
        learn = np.concatenate([*learnt, np.zeros(room, bool)])[1:]
        lengths = [len(member) for member in (*members, fill)]
        numbers = np.repeat(np.arange(len(lengths)), lengths)[:-1]
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(learn),
            torch.from_numpy(numbers) if self.corpus.document_masks else None,
            self._place(left),
        )


class Stream(IterableDataset[Batch | InputError]):
    """The sequences of one rank, in their order, from a step on.

    A DataLoader asks its workers in turn for a sequence each: the worker with number w computes
    every `workers`-th, which are all of the same lanes. An error is passed on as a value, as
    the loader would wrap it.

    Args:
        corpus: What is read.
        share: Of this rank.
        steps: Optimiser steps done.
        places: Place where each lane goes on `(lanes, place)`.
    """

    def __init__(self, corpus: Corpus, share: Share, steps: int, places: Tensor) -> None:
        self.corpus, self.share, self.places = corpus, share, places
        self._first = share.first(steps)

    def __iter__(self) -> Iterator[Batch | InputError]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        lanes: dict[int, Iterator[Batch]] = {}
        local = self._first + number
        try:
            while True:
                lane = (self.share.rank + local * self.share.world_size) % self.corpus.lanes
                if lane not in lanes:
                    lanes[lane] = iter(Lane(self.corpus, lane, self.places[lane]))
                yield next(lanes[lane])
                local += workers
        except InputError as error:
            yield error


class Batches:
    """Micro-batches of a stream, from workers that read ahead.

    Args:
        stream: Of this rank.
        workers: Processes; 0 reads between the steps.

    Raises:
        InputError: Ranks x workers do not divide the lanes.
    """

    def __init__(self, stream: Stream, workers: int) -> None:
        lanes, ranks = stream.corpus.lanes, stream.share.world_size
        if lanes % (ranks * max(workers, 1)):
            fitting = [n for n in range(1, lanes // ranks + 1) if lanes % (ranks * n) == 0]
            remedy = (
                f"set data.workers to one of {', '.join(map(str, fitting))}"
                if fitting
                else "use another number of ranks (trainer.devices), or start over with other lanes"
            )
            raise InputError(
                f"data.lanes={lanes}: expected a multiple of {ranks} ranks x "
                f"data.workers={workers}; {remedy}"
            )
        self.stream, self.workers = stream, workers

    def __iter__(self) -> Iterator[Batch]:
        if self.workers:
            # Workers are forked, and encode one document at a time: its threads would be in the
            # way, and the library says so on stderr unless told.
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
