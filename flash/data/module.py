"""Batches for Lightning."""

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
from flash.data.factory import InMemory, open_source
from flash.data.files import find_documents, read_text
from flash.data.packed import PackedSequences
from flash.data.sampler import ResumableBatches, Share
from flash.data.settings import DataKind, DataSettings
from flash.data.stream import Batches, Corpus, Stream
from flash.data.teacher_cache import TaughtSequences
from flash.data.tokenizer import load_tokenizer, token_bytes, train_tokenizer
from flash.errors import InputError
from flash.records import write_text

_AT_ONCE = 16
"""Most held-out or calibration sequences at a time."""


def find_tokenizer(settings: DataSettings, default: Path | None, cache: Path) -> Path:
    """The tokenizer.json to use: the setting's, else `default`, else one trained on the corpus.

    Raises:
        InputError: The named file cannot be used, or there is none and no corpus of text files.
    """
    path = Path(settings.tokenizer) if settings.tokenizer else default
    if path is not None:
        load_tokenizer(path)
        return path
    if settings.source not in {DataKind.stdlib, DataKind.folder}:
        raise InputError(
            f"data.tokenizer=null: expected a tokenizer.json for data.source="
            f"{settings.source.value}, as the backbone has none"
        )
    training = [
        document
        for document in find_documents(settings)
        if not document.is_held_out(settings.heldout_percent)
    ]
    trained = cache / f"bpe_{settings.name}_{settings.bpe_vocab_size}.json"
    if not trained.is_file():
        tokenizer = train_tokenizer(map(read_text, training), settings.bpe_vocab_size)
        write_text(trained, tokenizer.to_str())
    return trained


class PackedData(L.LightningDataModule):
    """Training batches in a reproducible, resumable order, and the held-out sequences.

    The order is the same whatever the number of ranks, micro-batches and workers, and goes on from
    a checkpoint with any other number of them. The trainer must not bring a sampler of its own
    (`use_distributed_sampler=False`).

    Args:
        settings: Corpus and sequence length.
        tokenizer: Encodes the corpus.
        batch_size: Sequences an optimiser step, over all ranks.
        seed: Order of the training sequences.
        cache: Folder for token streams.
        folder: Of the tokenizer, where its chat template is; only for `source: chat`.

    Attributes:
        digest: Hash of all texts, their order if they are streamed, and of the tokenizer.
        bytes_per_token: UTF-8 bytes of each token id, `(vocab,)`.
        heldout_set: Held-out sequences, each a `Batch` without the first axis.
        taught: The training sequences with what a teacher says; to be set where there is one.

    Raises:
        InputError: Data that cannot be used.
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
        opened = open_source(settings, tokenizer, seed=seed, cache=cache, folder=folder)
        self.train_set: PackedSequences | Corpus = opened.train
        self.digest, self.bytes_per_token = opened.digest, token_bytes(tokenizer)
        self.heldout_set: Subset[Batch] = _spread(opened.heldout, settings.heldout_sequences)
        self.taught: TaughtSequences | None = None
        self._steps: int | None = None
        self._places: Tensor | None = None
        self._seen: list[Tensor | None] = []

    def setup(self, stage: str) -> None:
        # A run begins; if it goes on from a checkpoint, `load_state_dict` comes next.
        if stage == "fit":
            self._steps, self._places, self._seen = None, None, []

    @property
    def share(self) -> Share:
        """What this rank takes of each batch."""
        trainer = self.trainer
        if trainer is None:
            return Share(self.batch_size)
        return Share(
            self.batch_size,
            trainer.world_size,
            trainer.global_rank,
            trainer.accumulate_grad_batches,
        )

    def train_dataloader(self) -> "DataLoader[Batch] | Batches":
        if self._steps is None:
            # No data have been counted yet: a new run, or a checkpoint that says only this.
            self._steps = self.trainer.global_step if self.trainer is not None else 0
        share, workers = self.share, self.settings.workers
        if isinstance(self.train_set, Corpus):
            if self._places is None:
                self._places = self.train_set.first_places()
                self._steps = 0
            return Batches(
                Stream(self.train_set, share, self._steps, self._places.clone()), workers
            )
        batches = ResumableBatches(len(self.train_set), share, self.seed, self._steps)
        return DataLoader(
            self.taught if self.taught is not None else self.train_set,
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]
            collate_fn=collate,
            num_workers=workers,
        )

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Count what is trained on: workers and Lightning itself have read further."""
        if self.trainer is not None and self.trainer.training:
            self._seen.append(batch.place)
            if len(self._seen) == self.share.accumulation:
                self._count_step()
        return batch

    def _count_step(self) -> None:
        assert self._steps is not None
        self._steps += 1
        for places in self._seen:
            if places is not None:
                assert self._places is not None
                for place in places:  # in order: the last one of a lane counts
                    self._places[int(place[0])] = place
        self._seen = []

    def state_dict(self) -> dict[str, Any]:
        """Steps that data were taken for, and the place of each lane; the same on all ranks."""
        places = self._places.clone() if self._places is not None else None
        if places is not None and self.trainer is not None and self.trainer.world_size > 1:
            strategy = self.trainer.strategy
            gathered = strategy.all_gather(places.to(strategy.root_device))
            lanes = torch.arange(len(places))
            places = gathered.cpu()[lanes % self.trainer.world_size, lanes]
        return {"steps": self._steps, "places": places}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        steps, places = state_dict["steps"], state_dict["places"]
        if isinstance(self.train_set, Corpus):
            fresh = self.train_set.first_places()
            if places is None or places.shape != fresh.shape:
                raise InputError(
                    "data: the checkpoint is of other data.parts or data.lanes; start over with "
                    "another name, or set them back"
                )
            self._places = places.clone()
        self._steps = steps

    def val_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the held-out sequences, in as many batches as every other rank's.

        Raises:
            InputError: Fewer sequences than ranks.
        """
        share = self.share
        total = len(self.heldout_set)
        if total < share.world_size:
            raise InputError(
                f"data.heldout_sequences={total}: expected at least one for each of "
                f"{share.world_size} ranks"
            )
        mine = np.arange(share.rank, total, share.world_size)
        # Two or more at a time, so that ranks with one sequence less have no batch less.
        size = max(2, min(share.micro_batch, _AT_ONCE))
        batches = np.array_split(mine, -(-total // share.world_size) // size or 1)
        return DataLoader(
            self.heldout_set,
            batch_sampler=[batch.tolist() for batch in batches],
            collate_fn=collate,
        )

    def calibration_batches(self, tokens: int) -> Iterator[Tensor]:
        """Training sequences `(b, seq_len)` for importance scores, about `tokens` in all."""
        count = max(1, tokens // self.settings.seq_len)
        sequences = self._first_sequences(count)
        while chosen := list(islice(sequences, min(self.batch_size, _AT_ONCE))):
            yield torch.stack([sequence.tokens[:-1] for sequence in chosen])

    def _first_sequences(self, count: int) -> Iterator[Batch]:
        if isinstance(self.train_set, Corpus):
            yield from self.train_set.first(count)
            return
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.train_set), generator=generator)
        for i in order[:count].tolist():
            yield self.train_set[i]


def _spread(sequences: "PackedSequences | InMemory", count: int) -> Subset[Batch]:
    """`count` of them, or all, evenly spread, so that a few still come from many documents."""
    count = min(count or len(sequences), len(sequences))
    chosen = torch.linspace(0, len(sequences) - 1, count).long().unique().tolist()
    return Subset(sequences, chosen)
