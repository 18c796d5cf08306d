"""Opening of the data of any kind: from settings to training and validation sequences."""

import dataclasses
import logging
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from flash.data.batch import Batch, collate
from flash.data.encoders import EncodedDocument, Encoder, TextEncoder, validation_percent_of
from flash.data.files import check_documents
from flash.data.mixture import Split, StreamedSequences
from flash.data.packed import PackedSequences, tokenize
from flash.data.settings import DataKind, DataSettings
from flash.data.shards import finished, open_shards
from flash.data.stream import LogicalShard, first_sequences
from flash.errors import InputError, under
from flash.model.tokenizer import ModelTokenizer
from flash.records import digest
from flash.sealed import read_tensors, write_tensors

log = logging.getLogger(__name__)

_ORDER = 2
"""Version of the rows and their order: streams of another version have another digest."""


class InMemorySequences(Dataset[Batch]):
    """Sequences that are held in memory.

    Args:
        batch: All of the sequences.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch.tokens)

    def __getitem__(self, index: int) -> Batch:
        rest = (None if field is None else field[index] for field in self.batch[1:])
        return Batch(self.batch.tokens[index], *rest)


@dataclass(frozen=True)
class DataSplits:
    """Sequences of both splits.

    Attributes:
        train: Training sequences, read by index or streamed.
        validation: Validation sequences.
        digest: Hash of the texts of both, of the tokenizer and, if they are streamed, of their
            order.
    """

    train: PackedSequences | StreamedSequences
    validation: PackedSequences | InMemorySequences
    digest: str


def check_present(settings: DataSettings, tokenizer: ModelTokenizer | None) -> None:
    """Check that the text of any kind is there, without reading it.

    Args:
        settings: Data to check. Data sets of the hub are not looked up.
        tokenizer: Encoder of the text; None if there is none yet.

    Raises:
        InputError: A file or a folder is missing, or shards are of another tokenizer.
    """
    if settings.kind is DataKind.shards:
        finished(Path(str(settings.path)), tokenizer)
    elif not settings.streamed:
        check_documents(settings)
    else:
        from flash.data.sources import find_files  # takes a second to import

        for i, source in enumerate(settings.sources):
            find_files(source, f"data.sources[{i}]")
        if settings.validation is not None:
            find_files(settings.validation, "data.validation")


def open_splits(
    settings: DataSettings, tokenizer: ModelTokenizer, *, seed: int, cache: Path
) -> DataSplits:
    """Open and check the data, and return the sequences of both splits.

    Args:
        settings: Data to open, of any kind.
        tokenizer: Encoder of the text.
        seed: Seed of the order of streamed data.
        cache: Folder for token streams and validation sequences.

    Raises:
        InputError: The data cannot be used.
    """
    if settings.streamed:
        return _open_streamed(settings, tokenizer, seed, cache)
    if settings.kind is DataKind.shards:
        path = Path(str(settings.path))
        opened = open_shards(path, tokenizer, cache, skip_damaged=settings.skip_damaged)
    else:
        opened = tokenize(settings, tokenizer, cache)
    end = tokenizer.end_of_text if settings.document_masks else None
    train, validation = (
        PackedSequences(tokens, settings.seq_len, split, end_of_text=end)
        for split, tokens in (("train", opened.train), ("validation", opened.validation))
    )
    return DataSplits(train, validation, opened.digest)


def _open_streamed(
    settings: DataSettings, tokenizer: ModelTokenizer, seed: int, cache: Path
) -> DataSplits:
    from flash.data.logical_shards import fit_logical_shards  # these take a second to import
    from flash.data.sources import TextSource, open_sources

    encoder, template = _encoder(settings, tokenizer)
    separate = settings.validation
    most = StreamedSequences(
        sources=open_sources(settings),
        encoder=encoder,
        seq_len=settings.seq_len,
        end_of_text=tokenizer.end_of_text,
        logical_shards=settings.logical_shards,
        seed=seed,
        split=Split.train if separate is None else Split.all,
        validation_percent=settings.validation_percent,
        document_masks=settings.document_masks,
    )
    train = fit_logical_shards(most)
    validation = dataclasses.replace(
        train, logical_shards=1, seed=0, split=Split.validation, single_pass=True
    )
    if separate is not None:
        source = TextSource(separate, "data.validation", skip_damaged=settings.skip_damaged)
        validation = dataclasses.replace(validation, sources=[source], split=Split.all)
    key = _digest(train, validation, settings, [tokenizer.digest, template])
    # Missing text or a wrong column is found now, and not later in a worker.
    next(first_sequences(train, 1))
    path = cache / f"validation_{digest([key, settings.decisive()])}.safetensors"
    found = _stored_validation(path, settings.seq_len) if path.exists() else None
    if found is None:
        found = _collect_validation(validation, settings)
        write_tensors(path, _fields(found))
    return DataSplits(train, InMemorySequences(found), key)


def _fields(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: f for name, f in batch._asdict().items() if isinstance(f, torch.Tensor)}


def _stored_validation(path: Path, seq_len: int) -> Batch | None:
    """Validation sequences of an earlier run; None if the file is damaged."""
    layout = {
        "tokens": (torch.int64, seq_len + 1),
        "loss_mask": (torch.bool, seq_len),
        "document_ids": (torch.int64, seq_len),
    }
    try:
        tensors, _ = read_tensors(path)
        count = len(tensors["tokens"]) if "tokens" in tensors else 0
        for name, tensor in tensors.items():
            kind, width = layout.get(name, (None, 0))
            if tensor.dtype is not kind or tensor.shape != (count, width):
                raise InputError(f"{path}: damaged (odd tensor {name})")
        if count == 0:
            raise InputError(f"{path}: damaged (no tokens)")
    except InputError as error:
        log.warning("%s; the sequences are read from their sources again", error)
        return None
    return Batch(**tensors)


def _encoder(settings: DataSettings, tokenizer: ModelTokenizer) -> tuple[Encoder, Any]:
    """Encoder of the data, and the chat template that it uses, with the special tokens in it."""
    if settings.kind is not DataKind.chat:
        return TextEncoder(tokenizer), None
    from flash.data.chat import ChatEncoder, read_template  # transformers takes seconds to import

    template = read_template(tokenizer, settings.chat_template)
    with under("data.chat_template", ": "):
        encoder = ChatEncoder(
            tokenizer.backend,
            template,
            tokenizer.special,
            max_tokens=settings.seq_len + 1,
        )
    if encoder.renderer.end_of_turn is None:
        log.warning(
            "data.chat_template: puts no special token after an answer, so the model learns no end "
            "of its turn"
        )
    # Files beside tokenizer.json name these, so that the hash of the tokenizer lacks them.
    used = {name: token for name, token in tokenizer.special.items() if name in template}
    return encoder, [template, used] if used else template


def _digest(
    train: StreamedSequences,
    validation: StreamedSequences,
    settings: DataSettings,
    encoding: list[Any],
) -> str:
    """Hash of the documents of both splits, of their tokens and of their order.

    Args:
        train: The training split.
        validation: The validation split.
        settings: Settings of both.
        encoding: Hash of the tokenizer, and the chat template as `_encoder` gives it.
    """
    return digest({
        "tokenizer": encoding[0],
        "template": encoding[1],
        "train": [source.fingerprint for source in train.sources],
        "validation": [source.fingerprint for source in validation.sources],
        "settings": settings.decisive_for_tokens(),
        "logical_shards": train.logical_shards,
        "order": _ORDER,
    })


def _collect_validation(validation: StreamedSequences, settings: DataSettings) -> Batch:
    """Read the validation sequences from their sources.

    Raises:
        InputError: There is too little text for one.
    """
    count = settings.validation_sequences
    sequences = []
    for sequence in LogicalShard(validation, 0, validation.initial_states()[0]):
        sequences.append(sequence._replace(stream_state=None))
        if len(sequences) == count:
            break
    if not sequences:
        raise _too_little(validation, settings)
    return collate(sequences)


def _too_little(validation: StreamedSequences, settings: DataSettings) -> InputError:
    """Error of a validation split without a sequence: its size, and a share that is enough."""
    whole = not validation.encoder.splits_documents
    needed = 1 if whole else settings.seq_len + 1
    sizes = np.zeros(101, np.int64)  # by the smallest share that holds a document out
    everything = dataclasses.replace(validation, split=Split.all)
    for source in everything.sources:
        for row in chain.from_iterable(source.rows(i, 0, 1, 0) for i in range(source.num_files)):
            if everything.reads(row, source):
                [document] = everything.encoder.encode([row.value])
                if isinstance(document, EncodedDocument):
                    sizes[validation_percent_of(row.value)] += 1 if whole else len(document)
    share = settings.validation_percent if settings.validation is None else 100
    unit = "documents" if whole else "tokens of documents"
    enough = np.flatnonzero(sizes.cumsum() >= needed)
    if settings.validation is not None:
        key, remedy = "data.validation", "give more text"
    else:
        key = f"data.validation_percent={share}"
        remedy = "give more text, or name data.validation"
        if len(enough) and enough[0] < 100 and sizes[enough[0] + 1 :].any():
            remedy = f"set it to {enough[0]} or more, or {remedy}"
    return InputError(
        f"{key}: holds out {sizes[: share + 1].sum()} of {sizes.sum()} {unit} with "
        f"{validation.encoder.needed}; expected {needed} or more for a sequence: {remedy}"
    )
