"""From settings to sequences: what each source needs, and every check before work starts."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from flash.data.batch import Batch, collate
from flash.data.encoders import Encoder, TextEncoder
from flash.data.packed import PackedSequences, tokenize
from flash.data.settings import DataKind, DataSettings
from flash.data.shards import open_shards, tokenizer_digest
from flash.data.stream import Corpus, Lane, Side
from flash.data.tokenizer import end_of_text_id
from flash.errors import InputError
from flash.records import atomic_write, digest

if TYPE_CHECKING:
    from flash.data.sources import TextSource


class InMemory(Dataset[Batch]):
    """Sequences that were read already."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch.tokens)

    def __getitem__(self, index: int) -> Batch:
        rest = (None if field is None else field[index] for field in self.batch[1:])
        return Batch(self.batch.tokens[index], *rest)


@dataclass(frozen=True)
class Opened:
    """A source, ready to be read.

    Attributes:
        train: Training sequences: by index, or streamed.
        heldout: Held-out sequences.
        digest: Hash of what decides both.
    """

    train: PackedSequences | Corpus
    heldout: PackedSequences | InMemory
    digest: str


def open_source(
    settings: DataSettings, tokenizer: Tokenizer, *, seed: int, cache: Path, folder: Path | None
) -> Opened:
    """Training and held-out sequences of whatever source.

    Args:
        settings: Which.
        tokenizer: Encodes text.
        seed: Order, where it is streamed.
        cache: Folder for token streams.
        folder: Of the tokenizer, for its chat template.

    Raises:
        InputError: Data that cannot be used.
    """
    if settings.streamed:
        return _open_streamed(settings, tokenizer, seed, cache, folder)
    if settings.source is DataKind.shards:
        path = Path(str(settings.path))
        opened = open_shards(path, tokenizer, cache, skip_damaged=settings.skip_damaged)
    else:
        opened = tokenize(settings, tokenizer, cache)
    end = end_of_text_id(tokenizer) if settings.document_masks else None
    return Opened(
        PackedSequences(opened.train, settings.seq_len, end_of_text=end),
        PackedSequences(opened.heldout, settings.seq_len, end_of_text=end),
        opened.digest,
    )


def _open_streamed(
    settings: DataSettings, tokenizer: Tokenizer, seed: int, cache: Path, folder: Path | None
) -> Opened:
    from flash.data.sources import TextSource, open_parts  # takes a second to import

    encoder, template = _encoder(settings, tokenizer, folder)
    parts = open_parts(settings)
    held = settings.heldout
    train = Corpus(
        parts=parts,
        encoder=encoder,
        seq_len=settings.seq_len,
        end_of_text=end_of_text_id(tokenizer),
        lanes=settings.lanes,
        seed=seed,
        side=Side.train if held is None else Side.all,
        heldout_percent=settings.heldout_percent,
        document_masks=settings.document_masks,
    )
    heldout = dataclasses.replace(train, lanes=1, seed=0, side=Side.heldout, once=True)
    if held is not None:
        part = TextSource(held, "data.heldout", skip_damaged=settings.skip_damaged)
        heldout = dataclasses.replace(heldout, parts=[part], side=Side.all)
    key = digest({
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template,
        "source": settings.source.value,
        "parts": [_described(part) for part in parts],
        "heldout": [settings.heldout_percent, [_described(part) for part in heldout.parts]],
        "masks": settings.document_masks,
        "lanes": settings.lanes,
    })
    next(train.first(1))  # finds missing text or a wrong column now, not in a worker later
    count = settings.heldout_sequences
    path = cache / f"heldout_{key}_{settings.seq_len}_{count}.safetensors"
    if not path.is_file():
        _save_heldout(heldout, settings, path)
    return Opened(train, InMemory(Batch(**load_file(path))), key)


def _encoder(
    settings: DataSettings, tokenizer: Tokenizer, folder: Path | None
) -> tuple[Encoder, str | None]:
    """What turns values into tokens, and the chat template in use."""
    if settings.source is not DataKind.chat:
        return TextEncoder(tokenizer), None
    from flash.data.chat import ChatEncoder, read_template  # transformers takes seconds to import

    template, special = read_template(folder, settings.chat_template)
    encoder = ChatEncoder(
        tokenizer,
        template,
        special,
        limit=settings.seq_len + 1,
        skip_damaged=settings.skip_damaged,
    )
    return encoder, template


def _described(part: "TextSource") -> Any:
    """What decides a part's documents and their share."""
    settings = part.settings
    return [part.fingerprint, settings.column, settings.unit.value, settings.weight]


def _save_heldout(corpus: Corpus, settings: DataSettings, path: Path) -> None:
    """Keep the held-out sequences, so that they stay the same and need reading just once."""
    count = settings.heldout_sequences
    sequences = []
    for sequence in Lane(corpus, 0, corpus.first_places()[0]):
        sequences.append(sequence._replace(place=None))
        if len(sequences) == count:
            break
    if not sequences:
        key = "data.heldout"
        if settings.heldout is None:
            key = f"data.heldout_percent={settings.heldout_percent}"
        raise InputError(
            f"{key}: gives less than a sequence of data.seq_len={settings.seq_len} held-out "
            f"tokens with {corpus.encoder.wanted}; expected more text, or a larger share"
        )
    tensors = {
        name: field
        for name, field in collate(sequences)._asdict().items()
        if isinstance(field, torch.Tensor)
    }
    with atomic_write(path) as file:
        file.write(save(tensors))
