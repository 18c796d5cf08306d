"""Token streams on disk, and sequences of fixed length that are cut from them."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from flash.data.arrays import map_array
from flash.data.batch import Batch, document_ids_of
from flash.data.encoders import TextEncoder
from flash.data.files import Document, read_documents
from flash.data.settings import DataSettings
from flash.data.shards import Shard, problems_of, write_shard
from flash.errors import InputError, require
from flash.model.tokenizer import ModelTokenizer
from flash.progress import progress
from flash.records import digest, parse_json, write_json

log = logging.getLogger(__name__)

_SUMMARY = "summary.json"
_FILES = {"train": "train.npy", "validation": "validation.npy"}


@dataclass(frozen=True)
class TokenStreams:
    """Tokenised text: one stream for each split, with begin- and end-of-text around documents.

    Attributes:
        train: Memory-mapped token ids `(n,)` for training and calibration.
        validation: Memory-mapped token ids `(n,)` of the validation split.
        digest: Hash of all texts, of the tokenizer and of the settings that decide the tokens.
    """

    train: np.ndarray
    validation: np.ndarray
    digest: str


class TokenArray(Protocol):
    """Stream of token ids that returns the tokens of any window as an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, window: slice, /) -> np.ndarray: ...


def tokenize(settings: DataSettings, tokenizer: ModelTokenizer, cache: Path) -> TokenStreams:
    """Tokenise all text files of `data.kind` stdlib or folder.

    The streams are read from `cache` when texts, tokenizer and split are unchanged.

    Args:
        settings: Files to read and share of the validation split.
        tokenizer: Encoder of the text.
        cache: Folder for the token streams.

    Raises:
        InputError: No file is found, a file cannot be read, or a split has no file.
    """
    texts = list(read_documents(settings))
    hasher = hashlib.sha256(tokenizer.identity)
    hasher.update(digest(settings.decisive_for_tokens()).encode())
    for document, text in texts:
        hasher.update(document.digest.encode())
        hasher.update(hashlib.sha256(text.encode("utf-8", "replace")).digest())
    key = hasher.hexdigest()[:16]
    folder = cache / f"streams_{key}"
    splits: dict[str, list[tuple[Document, str]]] = {"train": [], "validation": []}
    for document, text in texts:
        validation = document.in_validation_split(settings.validation_percent)
        splits["validation" if validation else "train"].append((document, text))
    for split, members in splits.items():
        if not members:
            raise InputError(
                f"data.validation_percent={settings.validation_percent}: leaves the {split} split "
                f"of {len(texts)} files empty; {_share_for_both([d for d, _ in texts])}"
            )
    if not _is_whole(folder, cache):
        dtype = token_type(tokenizer)
        written = {
            split: write_shard(folder, file, list(_encode(splits[split], tokenizer, dtype, split)))
            for split, file in _FILES.items()
        }
        write_json(folder / _SUMMARY, written)  # the last file: a folder without it is unfinished
    return TokenStreams(
        map_array(folder / _FILES["train"]), map_array(folder / _FILES["validation"]), key
    )


def _is_whole(folder: Path, cache: Path) -> bool:
    """True if the streams in `folder` are there as they were written."""
    path = folder / _SUMMARY
    if not path.exists():
        return False
    try:
        written = parse_json(dict[str, Shard], path.read_bytes())
        names = {split: shard.file for split, shard in written.items()}
        require(names == _FILES, "file", names, str(_FILES))
    except (OSError, InputError) as error:
        log.warning("%s: damaged, or of a former version (%s); made again", path, error)
        return False
    problems = problems_of(folder, list(written.values()), cache)
    for file, problem in problems.items():
        log.warning("%s: %s; made again", folder / file, problem)
    return not problems


def token_type(tokenizer: ModelTokenizer) -> type[np.unsignedinteger]:
    """Smallest unsigned integer type that holds every token id."""
    return np.uint16 if tokenizer.size <= 1 << 16 else np.uint32


def _share_for_both(documents: list[Document]) -> str:
    """Remedy for a split without a file."""
    shares = sorted({document.validation_percent for document in documents})
    if len(shares) == 1:
        return "expected more files, as a file is not divided"
    return f"expected {shares[0]} to {shares[-1] - 1}, which give both splits a file"


def _encode(
    members: list[tuple[Document, str]], tokenizer: ModelTokenizer, dtype: type, split: str
) -> Iterator[np.ndarray]:
    encoder = TextEncoder(tokenizer)
    chunks = [members[i : i + 64] for i in range(0, len(members), 64)]
    for chunk in progress(chunks, f"tokenizing {split}"):
        encoded = encoder.encode([text for _, text in chunk])
        for (document, _), tokens in zip(chunk, encoded, strict=True):
            if isinstance(tokens, InputError):
                raise InputError(f"{document.path}: {tokens}") from tokens
            ids = tokens.tokens if tokens is not None else [*encoder.prefix, encoder.end_of_text]
            yield np.array(ids, dtype=dtype)


class PackedSequences(Dataset[Batch]):
    """Consecutive windows of `seq_len + 1` tokens; all but the first token are targets.

    Neighboring windows share one token, the last target of one and the first input of the next.
    Every token but the first of the stream is therefore a target exactly once.

    Args:
        tokens: Stream of `n` token ids.
        seq_len: Targets per window.
        split: Name of the split, for the error.
        end_of_text: Id of the token that ends documents, for `Batch.document_ids`. None omits
            these ids.

    Raises:
        InputError: The stream has fewer tokens than a window.
    """

    def __init__(
        self, tokens: TokenArray, seq_len: int, split: str, *, end_of_text: int | None = None
    ) -> None:
        self.tokens, self.seq_len, self.end_of_text = tokens, seq_len, end_of_text
        if len(self) == 0:
            raise InputError(
                f"data.seq_len={seq_len}: expected at most {len(tokens) - 1}, as the {split} split "
                f"has {len(tokens)} tokens; lower it, or give more text"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> Batch:
        start = index * self.seq_len
        window = self.tokens[start : start + self.seq_len + 1]
        tokens = torch.from_numpy(window.astype(np.int64))
        if self.end_of_text is None:
            return Batch(tokens)
        return Batch(tokens, document_ids=document_ids_of(tokens, self.end_of_text))
