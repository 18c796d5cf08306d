"""Token streams on disk, and fixed-length sequences cut from them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from flash.data.batch import Batch, document_numbers
from flash.data.files import Document, find_documents, read_text
from flash.data.settings import DataSettings
from flash.data.tokenizer import end_of_text_id
from flash.errors import InputError
from flash.progress import progress
from flash.records import atomic_write, write_json


@dataclass(frozen=True)
class TokenStreams:
    """A tokenised corpus: one stream a split, each document followed by end-of-text.

    Attributes:
        train: Memory-mapped token ids `(n,)` for training and calibration.
        heldout: The same for the files that are held out.
        digest: Hash of all texts and of the tokenizer.
    """

    train: np.ndarray
    heldout: np.ndarray
    digest: str


class TokenArray(Protocol):
    """A stream of token ids that windows can be cut out of."""

    def __len__(self) -> int: ...

    def __getitem__(self, window: slice, /) -> np.ndarray: ...


def tokenize(settings: DataSettings, tokenizer: Tokenizer, cache: Path) -> TokenStreams:
    """Token streams of the corpus, from `cache` when texts and tokenizer are unchanged.

    Raises:
        InputError: The corpus is empty or unreadable, or a split has no file.
    """
    texts = [(document, read_text(document)) for document in find_documents(settings)]
    hasher = hashlib.sha256(tokenizer.to_str().encode())
    hasher.update(str(settings.heldout_percent).encode())
    for document, text in texts:
        hasher.update(document.digest.encode())
        hasher.update(hashlib.sha256(text.encode("utf-8", "replace")).digest())
    digest = hasher.hexdigest()[:16]
    folder = cache / digest
    splits: dict[str, list[tuple[Document, str]]] = {"train": [], "heldout": []}
    for document, text in texts:
        held_out = document.is_held_out(settings.heldout_percent)
        splits["heldout" if held_out else "train"].append((document, text))
    for split, members in splits.items():
        if not members:
            raise InputError(
                f"data.heldout_percent={settings.heldout_percent}: leaves the {split} split of "
                f"{len(texts)} files empty; expected a share that gives both splits a file"
            )
    # The summary is written last: a folder that has it is complete.
    if not (folder / "summary.json").is_file():
        dtype = token_type(tokenizer)
        for split, members in splits.items():
            tokens = _encode([text for _, text in members], tokenizer, dtype, split)
            with atomic_write(folder / f"{split}.npy") as file:
                np.save(file, tokens)
        summary = {split: len(members) for split, members in splits.items()}
        write_json(folder / "summary.json", summary)
    return TokenStreams(
        train=np.load(folder / "train.npy", mmap_mode="r"),
        heldout=np.load(folder / "heldout.npy", mmap_mode="r"),
        digest=digest,
    )


def token_type(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    """Smallest type that holds every token id."""
    return np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: type, split: str) -> np.ndarray:
    end = end_of_text_id(tokenizer)
    chunks = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    parts: list[np.ndarray] = []
    for chunk in progress(chunks, f"tokenising {split}"):
        for encoding in tokenizer.encode_batch(chunk, add_special_tokens=False):
            parts.append(np.array([*encoding.ids, end], dtype=dtype))
    return np.concatenate(parts)


class PackedSequences(Dataset[Batch]):
    """Consecutive windows of `seq_len + 1` tokens; each predicts its last `seq_len` tokens.

    Windows overlap by the one token that is input to one and target to the one before, so every
    token but the first is a target exactly once.

    Args:
        tokens: The stream `(n,)`.
        seq_len: Tokens a window predicts.
        end_of_text: Id that ends documents, to number them by; None leaves them out.
    """

    def __init__(self, tokens: TokenArray, seq_len: int, *, end_of_text: int | None = None) -> None:
        self.tokens, self.seq_len, self.end_of_text = tokens, seq_len, end_of_text
        if len(self) == 0:
            raise InputError(
                f"data.seq_len={seq_len}: expected at most {len(tokens) - 1}, the split's size"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> Batch:
        start = index * self.seq_len
        window = self.tokens[start : start + self.seq_len + 1]
        tokens = torch.from_numpy(window.astype(np.int64))
        if self.end_of_text is None:
            return Batch(tokens)
        return Batch(tokens, documents=document_numbers(tokens, self.end_of_text))
