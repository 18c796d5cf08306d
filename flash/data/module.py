"""Lightning data module: resumable training batches, and the validation sequences."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from flash.data.batch import Batch, collate
from flash.data.factory import InMemorySequences, open_splits
from flash.data.files import find_documents, read_text
from flash.data.packed import PackedSequences
from flash.data.sampler import ResumableBatchSampler, Share
from flash.data.settings import DataKind, DataSettings
from flash.data.stream import SequenceStream, StreamedSequences, StreamLoader
from flash.data.teacher_cache import TeacherCache
from flash.data.tokenizer import load_tokenizer, token_bytes, train_tokenizer
from flash.errors import InputError
from flash.records import write_text

_AT_ONCE = 16
"""Most validation or calibration sequences per batch."""


def find_tokenizer(settings: DataSettings, default: Path | None, cache: Path) -> Path:
    """Find the tokenizer.json to use: the setting's, else `default`, else one that is trained.

    Args:
        settings: Data settings; a tokenizer can be trained on text files only.
        default: The backbone's own tokenizer, if there is one.
        cache: Folder for trained tokenizers.

    Raises:
        InputError: The named file cannot be used, or there is none and no text files to train on.
    """
    path = Path(settings.tokenizer) if settings.tokenizer else default
    if path is not None:
        load_tokenizer(path)
        return path
    if settings.kind not in {DataKind.stdlib, DataKind.folder}:
        raise InputError(
            f"data.tokenizer=null: expected a tokenizer.json for data.kind="
            f"{settings.kind.value}, as the backbone has none"
        )
    training = [
        document
        for document in find_documents(settings)
        if not document.in_validation_split(settings.validation_percent)
    ]
    trained = cache / f"bpe_{settings.name}_{settings.bpe_vocab_size}.json"
    if not trained.is_file():
        tokenizer = train_tokenizer(map(read_text, training), settings.bpe_vocab_size)
        write_text(trained, tokenizer.to_str())
    return trained


class PackedData(L.LightningDataModule):
    """Training batches in a reproducible, resumable order, and the validation sequences.

    The order is the same for any number of ranks, micro-batches and workers. A run resumes from a
    checkpoint with any other number of them. The trainer must not add a sampler of its own
    (`use_distributed_sampler=False`).

    Args:
        settings: Text and sequence length.
        tokenizer: Encoder of the text.
        batch_size: Sequences per optimizer step, over all ranks.
        seed: Seed of the order of the training sequences.
        cache: Folder for token streams.
        folder: Folder of the tokenizer, with its chat template; only for `data.kind=chat`.

    Attributes:
        train_set: Training sequences, read by index or streamed.
        digest: Hash of all texts, of their order if they are streamed, and of the tokenizer.
        bytes_per_token: UTF-8 bytes of each token id, `(vocab,)`.
        validation_set: Validation sequences, each a `Batch` without the first axis.
        teacher_cache: Training sequences with a teacher's most likely tokens, to be set before
            training. None: no cache.

    Raises:
        InputError: The data cannot be used.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        cache: Path,
        folder: Path | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.batch_size, self.seed = settings, batch_size, seed
        splits = open_splits(settings, tokenizer, seed=seed, cache=cache, folder=folder)
        self.train_set: PackedSequences | StreamedSequences = splits.train
        self.digest, self.bytes_per_token = splits.digest, token_bytes(tokenizer)
        self.validation_set: Subset[Batch] = _evenly_spaced(
            splits.validation, settings.validation_sequences
        )
        self.teacher_cache: TeacherCache | None = None
        self._steps: int | None = None
        self._states: Tensor | None = None
        self._trained: list[Tensor | None] = []

    def setup(self, stage: str) -> None:
        # A run begins. If it resumes from a checkpoint, Lightning calls `load_state_dict` next.
        if stage == "fit":
            self._steps, self._states, self._trained = None, None, []

    @property
    def share(self) -> Share:
        """Share of this rank in each batch."""
        trainer = self.trainer
        if trainer is None:
            return Share(self.batch_size)
        return Share(
            self.batch_size,
            trainer.world_size,
            trainer.global_rank,
            trainer.accumulate_grad_batches,
        )

    def train_dataloader(self) -> "DataLoader[Batch] | StreamLoader":
        if self._steps is None:
            # No batch has been counted yet: a new run, or a checkpoint that holds the step only.
            self._steps = self.trainer.global_step if self.trainer is not None else 0
        share, workers = self.share, self.settings.workers
        if isinstance(self.train_set, StreamedSequences):
            if self._states is None:
                self._states = self.train_set.initial_states()
                self._steps = 0
            stream = SequenceStream(self.train_set, share, self._steps, self._states.clone())
            return StreamLoader(stream, workers)
        batches = ResumableBatchSampler(len(self.train_set), share, self.seed, self._steps)
        return DataLoader(
            self.teacher_cache if self.teacher_cache is not None else self.train_set,
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]
            collate_fn=collate,
            num_workers=workers,
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Count the batches that are trained on; workers and Lightning have read further ahead."""
        if self.trainer is not None and self.trainer.training:
            self._trained.append(batch.stream_state)
            if len(self._trained) == self.share.accumulation:
                self._count_step()
        return batch

    def _count_step(self) -> None:
        assert self._steps is not None
        self._steps += 1
        for states in self._trained:
            if states is not None:
                assert self._states is not None
                for state in states:  # in order, so that the last state of a logical shard counts
                    self._states[int(state[0])] = state
        self._trained = []

    def state_dict(self) -> dict[str, Any]:
        """Steps trained on and the state of each logical shard; the same on all ranks."""
        states = self._states.clone() if self._states is not None else None
        if states is not None and self.trainer is not None and self.trainer.world_size > 1:
            strategy = self.trainer.strategy
            gathered = strategy.all_gather(states.to(strategy.root_device))
            shards = torch.arange(len(states))
            states = gathered.cpu()[shards % self.trainer.world_size, shards]
        return {"steps": self._steps, "stream_states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume after the steps of a checkpoint.

        Raises:
            InputError: The checkpoint belongs to streamed data of other sources or shards.
        """
        states = state_dict.get("stream_states")
        if isinstance(self.train_set, StreamedSequences):
            initial = self.train_set.initial_states()
            if states is None or states.shape != initial.shape:
                raise InputError(
                    "data: the checkpoint is of other data.sources or data.logical_shards; start "
                    "over with another name, or set them back"
                )
            self._states = states.clone()
        self._steps = state_dict["steps"]

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of this rank's validation sequences; every rank has the same number of them.

        Raises:
            InputError: The validation split has fewer sequences than there are ranks.
        """
        share = self.share
        total = len(self.validation_set)
        if total < share.world_size:
            raise InputError(
                f"data.validation_sequences={total}: expected at least one for each of "
                f"{share.world_size} ranks"
            )
        mine = np.arange(share.rank, total, share.world_size)
        # Batches of two or more, so that ranks with one sequence less do not have a batch less.
        size = max(2, min(share.micro_batch, _AT_ONCE))
        batches = np.array_split(mine, -(-total // share.world_size) // size or 1)
        return DataLoader(
            self.validation_set,
            batch_sampler=[batch.tolist() for batch in batches],
            collate_fn=collate,
        )

    def calibration_batches(self, tokens: int) -> Iterator[Tensor]:
        """Yield training sequences `(b, seq_len)` for importance scores, about `tokens` in all."""
        count = max(1, tokens // self.settings.seq_len)
        sequences = self._first_sequences(count)
        while chosen := list(islice(sequences, min(self.batch_size, _AT_ONCE))):
            yield torch.stack([sequence.tokens[:-1] for sequence in chosen])

    def _first_sequences(self, count: int) -> Iterator[Batch]:
        if isinstance(self.train_set, StreamedSequences):
            yield from self.train_set.first(count)
            return
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.train_set), generator=generator)
        for i in order[:count].tolist():
            yield self.train_set[i]


def _evenly_spaced(sequences: PackedSequences | InMemorySequences, count: int) -> Subset[Batch]:
    """Select `count` sequences, or all for 0.

    They are evenly spaced, so that even a few come from many documents.
    """
    count = min(count or len(sequences), len(sequences))
    chosen = torch.linspace(0, len(sequences) - 1, count).long().unique().tolist()
    return Subset(sequences, chosen)
