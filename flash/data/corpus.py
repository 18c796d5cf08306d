"""Packed text of a command: training sequences, validation sequences and their digest."""

import hashlib
import logging
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Subset

from flash.data.batch import Batch
from flash.data.factory import InMemorySequences, open_splits
from flash.data.files import read_documents
from flash.data.mixture import StreamedSequences
from flash.data.packed import PackedSequences
from flash.data.settings import DataKind, DataSettings
from flash.data.stream import first_sequences
from flash.data.teacher_cache import TeacherCache
from flash.data.tokenizer import ByteCounter, load_tokenizer, train_tokenizer
from flash.errors import InputError
from flash.model.tokenizer import ModelTokenizer
from flash.records import write_text

log = logging.getLogger(__name__)

_MOST_COUNTED, _MOST_STREAMED, _AT_ONCE = 2**30, 2**24, 2**20
"""Most tokens that are counted of stored and of streamed text, and tokens read at a time."""
MAX_BATCH = 16
"""Most validation or calibration sequences per batch."""


def known_tokenizer(settings: DataSettings, default: Path | None) -> Path | None:
    """Return the tokenizer.json to use: the setting's, else `default`; None if one is trained.

    Args:
        settings: Data settings; a tokenizer can be trained on text files only.
        default: The backbone's own tokenizer, if there is one.

    Raises:
        InputError: There is none, and no text files to train on.
    """
    path = Path(settings.tokenizer) if settings.tokenizer else default
    if path is None and settings.kind not in {DataKind.stdlib, DataKind.folder}:
        raise InputError(
            f"data.tokenizer=null: expected a tokenizer.json for data.kind="
            f"{settings.kind.value}, as the backbone has none"
        )
    return path


def find_tokenizer(settings: DataSettings, default: Path | None, cache: Path) -> Path:
    """Find the tokenizer.json to use: the known one, else one that is trained.

    Args:
        settings: Data settings, as for `known_tokenizer`.
        default: The backbone's own tokenizer, if there is one.
        cache: Folder for trained tokenizers.

    Raises:
        InputError: The named file cannot be used, or there is none and no text files to train on.
    """
    path = known_tokenizer(settings, default)
    if path is not None:
        load_tokenizer(path, settings)
        return path
    percent = settings.validation_percent
    documents = read_documents(settings)
    training = [text for doc, text in documents if not doc.in_validation_split(percent)]
    hasher = hashlib.sha256()
    for text in training:
        hasher.update(hashlib.sha256(text.encode("utf-8", "replace")).digest())
    name = f"bpe_{settings.name}_{settings.bpe_vocab_size}_{hasher.hexdigest()[:16]}.json"
    trained = cache / name
    if not _is_tokenizer(trained):
        tokenizer = train_tokenizer(training, settings.bpe_vocab_size)
        write_text(trained, tokenizer.to_str())
    return trained


def _is_tokenizer(path: Path) -> bool:
    """True for a tokenizer that an earlier run has trained; False if it is missing or damaged."""
    if not path.exists():
        return False
    try:
        load_tokenizer(path)
    except InputError as error:
        log.warning("%s; it is trained again", error)
        return False
    return True


class PackedData:
    """Training and validation sequences of a corpus; `PackedDataModule` batches them for Lightning.

    Args:
        settings: Text and sequence length.
        tokenizer: Encoder of the text.
        batch_size: Sequences per optimizer step, over all ranks.
        seed: Seed of the order of the training sequences.
        cache: Folder for token streams.

    Attributes:
        train_set: Training sequences, read by index or streamed.
        digest: Hash of all texts, of their order if they are streamed, and of the tokenizer. Keys
            of results take `identity` or `train_identity`, which hold it.
        bytes: Counter of the UTF-8 bytes of tokens.
        validation_set: Validation sequences, each a `Batch` without the first axis.
        teacher_cache: Training sequences with a teacher's most likely tokens, to be set before
            training. None: no cache.

    Raises:
        InputError: The data cannot be used.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: ModelTokenizer,
        *,
        batch_size: int,
        seed: int,
        cache: Path,
    ) -> None:
        self.settings, self.batch_size, self.seed = settings, batch_size, seed
        splits = open_splits(settings, tokenizer, seed=seed, cache=cache)
        self.train_set: PackedSequences | StreamedSequences = splits.train
        self.digest, self.bytes = splits.digest, ByteCounter(tokenizer)
        self.validation_set: Subset[Batch] = _evenly_spaced(
            splits.validation, settings.validation_sequences
        )
        self.teacher_cache: TeacherCache | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values of all that decides the sequences of both splits, but for their order."""
        return {"texts": self.digest, **self.settings.decisive()}

    @property
    def train_identity(self) -> dict[str, Any]:
        """Plain values of all that decides the training sequences and their order."""
        values = {**self.identity, "seed": self.seed}
        del values["validation_sequences"]
        return values

    @cached_property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes of the held-out tokens that count in a loss."""
        num_bytes = tokens = 0
        for i in range(len(self.validation_set)):
            sequence = self.validation_set[i]
            before, targets = sequence.tokens[:-1], sequence.tokens[1:]
            if sequence.loss_mask is not None:
                before, targets = before[sequence.loss_mask], targets[sequence.loss_mask]
            num_bytes += self.bytes.count(before.numpy(), targets.numpy())
            tokens += len(targets)
        return num_bytes / max(tokens, 1)

    def token_counts(self) -> Int[np.ndarray, " vocab"]:
        """Count how often each token stands in the training text, of which much is read at most."""
        counts = np.zeros(len(self.bytes), dtype=np.int64)
        for tokens in self._counted():
            counts += np.bincount(tokens, minlength=len(counts))
        return counts

    def _counted(self) -> Iterator[np.ndarray]:
        if isinstance(self.train_set, PackedSequences):
            stream = self.train_set.tokens
            end = min(len(stream), _MOST_COUNTED)
            yield from (stream[i : min(i + _AT_ONCE, end)] for i in range(0, end, _AT_ONCE))
        else:
            count = _MOST_STREAMED // self.settings.seq_len
            yield from (batch.tokens.numpy() for batch in first_sequences(self.train_set, count))

    def calibration_batches(self, tokens: int) -> Iterator[Tensor]:
        """Yield training sequences `(b, seq_len)` for importance scores, about `tokens` in all."""
        count = max(1, tokens // self.settings.seq_len)
        sequences = self._first_sequences(count)
        while chosen := list(islice(sequences, min(self.batch_size, MAX_BATCH))):
            yield torch.stack([sequence.tokens[:-1] for sequence in chosen])

    def _first_sequences(self, count: int) -> Iterator[Batch]:
        if isinstance(self.train_set, StreamedSequences):
            yield from first_sequences(self.train_set, count)
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
