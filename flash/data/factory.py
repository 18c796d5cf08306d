"""Opening of the data of any kind: from settings to training and validation sequences."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from flash.data.batch import Batch, collate
from flash.data.encoders import Encoder, TextEncoder
from flash.data.packed import PackedSequences, tokenize
from flash.data.settings import DataKind, DataSettings
from flash.data.shards import open_shards, tokenizer_digest
from flash.data.stream import LogicalShard, Split, StreamedSequences
from flash.data.tokenizer import end_of_text_id
from flash.errors import InputError
from flash.records import atomic_write, digest


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


def open_splits(
    settings: DataSettings, tokenizer: Tokenizer, *, seed: int, cache: Path, folder: Path | None
) -> DataSplits:
    """Open and check the data, and return the sequences of both splits.

    Args:
        settings: Data to open, of any kind.
        tokenizer: Encoder of the text.
        seed: Seed of the order of streamed data.
        cache: Folder for token streams and validation sequences.
        folder: Folder of the tokenizer, for its chat template.

    Raises:
        InputError: The data cannot be used.
    """
    if settings.streamed:
        return _open_streamed(settings, tokenizer, seed, cache, folder)
    if settings.kind is DataKind.shards:
        path = Path(str(settings.path))
        opened = open_shards(path, tokenizer, cache, skip_damaged=settings.skip_damaged)
    else:
        opened = tokenize(settings, tokenizer, cache)
    end = end_of_text_id(tokenizer) if settings.document_masks else None
    return DataSplits(
        PackedSequences(opened.train, settings.seq_len, end_of_text=end),
        PackedSequences(opened.validation, settings.seq_len, end_of_text=end),
        opened.digest,
    )


def _open_streamed(
    settings: DataSettings, tokenizer: Tokenizer, seed: int, cache: Path, folder: Path | None
) -> DataSplits:
    from flash.data.sources import TextSource, open_sources  # takes a second to import

    encoder, template = _encoder(settings, tokenizer, folder)
    separate = settings.validation
    train = StreamedSequences(
        sources=open_sources(settings),
        encoder=encoder,
        seq_len=settings.seq_len,
        end_of_text=end_of_text_id(tokenizer),
        logical_shards=settings.logical_shards,
        seed=seed,
        split=Split.train if separate is None else Split.all,
        validation_percent=settings.validation_percent,
        document_masks=settings.document_masks,
    )
    validation = dataclasses.replace(
        train, logical_shards=1, seed=0, split=Split.validation, single_pass=True
    )
    if separate is not None:
        source = TextSource(separate, "data.validation", skip_damaged=settings.skip_damaged)
        validation = dataclasses.replace(validation, sources=[source], split=Split.all)
    key = _digest(train, validation, settings, [tokenizer_digest(tokenizer), template])
    next(train.first(1))  # finds missing text or a wrong column now, not in a worker later
    path = cache / f"validation_{digest([key, settings.decisive()])}.safetensors"
    if not path.is_file():
        _save_validation(validation, settings, path)
    return DataSplits(train, InMemorySequences(Batch(**load_file(path))), key)


def _encoder(
    settings: DataSettings, tokenizer: Tokenizer, folder: Path | None
) -> tuple[Encoder, str | None]:
    """Encoder of the data, and the chat template that it uses."""
    if settings.kind is not DataKind.chat:
        return TextEncoder(tokenizer), None
    from flash.data.chat import ChatEncoder, read_template  # transformers takes seconds to import

    template, special = read_template(folder, settings.chat_template)
    encoder = ChatEncoder(
        tokenizer,
        template,
        special,
        max_tokens=settings.seq_len + 1,
        skip_damaged=settings.skip_damaged,
    )
    return encoder, template


def _digest(
    train: StreamedSequences,
    validation: StreamedSequences,
    settings: DataSettings,
    encoding: list[str | None],
) -> str:
    """Hash of the documents of both splits, of their tokens and of their order.

    Args:
        train: The training split.
        validation: The validation split.
        settings: Settings of both.
        encoding: Hash of the tokenizer, and the chat template.
    """
    return digest({
        "tokenizer": encoding[0],
        "template": encoding[1],
        "train": [source.fingerprint for source in train.sources],
        "validation": [source.fingerprint for source in validation.sources],
        "settings": settings.decisive_for_tokens(),
        "logical_shards": settings.logical_shards,
    })


def _save_validation(validation: StreamedSequences, settings: DataSettings, path: Path) -> None:
    """Write the validation sequences to disk, so that they are read from their sources once."""
    count = settings.validation_sequences
    sequences = []
    for sequence in LogicalShard(validation, 0, validation.initial_states()[0]):
        sequences.append(sequence._replace(stream_state=None))
        if len(sequences) == count:
            break
    if not sequences:
        key = "data.validation"
        if settings.validation is None:
            key = f"data.validation_percent={settings.validation_percent}"
        raise InputError(
            f"{key}: gives less than a sequence of data.seq_len={settings.seq_len} tokens with "
            f"{validation.encoder.needed}; expected more text, or a larger share"
        )
    tensors = {
        name: field
        for name, field in collate(sequences)._asdict().items()
        if isinstance(field, torch.Tensor)
    }
    with atomic_write(path) as file:
        file.write(save(tensors))
