"""Endless sequences from a streamed mixture, the same for any number of ranks and workers.

The data are divided into a fixed number of logical shards. Each mixes the sources, tokenises and
packs documents (flash.data.mixture). Sequence number g of the run is the next sequence of shard
g % logical_shards. Ranks and workers therefore decide only where a sequence is computed.

Each sequence carries the state of its shard after it. A checkpoint needs nothing but the states
after the sequences that were trained on. A shard that resumes from a state reads the current file
again from its beginning, and tokenises at most one document again.
"""

import os
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flash.data.batch import Batch, collate, document_ids_of
from flash.data.encoders import EncodedDocument
from flash.data.mixture import MIN_DOCUMENTS, Mixture, StreamedSequences
from flash.data.sampler import Share
from flash.errors import InputError


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


def first_sequences(sequences: StreamedSequences, count: int) -> Iterator[Batch]:
    """Compute the first `count` sequences of a run.

    Raises:
        InputError: A source has no documents for a logical shard.
    """
    stream = SequenceStream(sequences, Share(1), 0, sequences.initial_states())
    for sequence in islice(stream, count):
        if isinstance(sequence, InputError):
            raise sequence
        yield sequence


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
