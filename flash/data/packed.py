"""Token streams on disk, and fixed-length sequences cut from them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from flash.data.corpus import DataSettings, Document, find_documents, read_text
from flash.data.tokenizer import end_of_text_id, token_bytes
from flash.errors import InputError
from flash.files import atomic_write, write_text
from flash.progress import progress


@dataclass(frozen=True)
class TokenStreams:
    """A tokenised corpus: one stream a split, each document followed by end-of-text.

    Attributes:
        train: Memory-mapped token ids `(n,)` for training and calibration.
        heldout: The same for the files that are held out.
        bytes_per_token: UTF-8 bytes of each token id, `(vocab,)`.
        digest: Hash of all texts and of the tokenizer.
    """

    train: np.ndarray
    heldout: np.ndarray
    bytes_per_token: np.ndarray
    digest: str


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
        dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
        for split, members in splits.items():
            tokens = _encode([text for _, text in members], tokenizer, dtype, split)
            with atomic_write(folder / f"{split}.npy") as file:
                np.save(file, tokens)
        summary = {split: len(members) for split, members in splits.items()}
        write_text(folder / "summary.json", json.dumps(summary))
    return TokenStreams(
        train=np.load(folder / "train.npy", mmap_mode="r"),
        heldout=np.load(folder / "heldout.npy", mmap_mode="r"),
        bytes_per_token=token_bytes(tokenizer),
        digest=digest,
    )


def _encode(texts: list[str], tokenizer: Tokenizer, dtype: type, split: str) -> np.ndarray:
    end = end_of_text_id(tokenizer)
    chunks = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    parts: list[np.ndarray] = []
    for chunk in progress(chunks, f"tokenising {split}"):
        for encoding in tokenizer.encode_batch(chunk, add_special_tokens=False):
            parts.append(np.array([*encoding.ids, end], dtype=dtype))
    return np.concatenate(parts)


class PackedSequences(Dataset[Tensor]):
    """Consecutive windows of `seq_len + 1` tokens; each predicts its last `seq_len` tokens.

    Windows overlap by the one token that is input to one and target to the one before, so every
    token but the first is a target exactly once.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, key: str = "data.seq_len") -> None:
        self.tokens, self.seq_len = tokens, seq_len
        if len(self) == 0:
            raise InputError(
                f"{key}={seq_len}: expected at most {len(tokens) - 1}, the split's size"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.seq_len
        window = self.tokens[start : start + self.seq_len + 1]
        return torch.from_numpy(window.astype(np.int64))


class ResumableBatches:
    """Endless batches of dataset indices; the n-th batch depends on the seed and n alone.

    Each epoch is a permutation of its own and its last, incomplete batch is dropped. A run that is
    resumed after n batches passes `start=n` and goes on where it stopped, also within an epoch.

    Args:
        num_sequences: Size of the dataset; at least `batch_size`.
        batch_size: Sequences a batch.
        seed: Decides every permutation.
        start: Batches to skip.
    """

    def __init__(self, num_sequences: int, batch_size: int, seed: int, start: int = 0) -> None:
        if num_sequences < batch_size:
            raise InputError(
                f"recipe.batch_size={batch_size}: expected at most {num_sequences}, "
                "the number of sequences in the corpus"
            )
        self.num_sequences, self.batch_size = num_sequences, batch_size
        self.seed, self.start = seed, start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.num_sequences // self.batch_size
        epoch, first = divmod(self.start, per_epoch)
        while True:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_sequences)
            for i in range(first, per_epoch):
                yield order[i * self.batch_size : (i + 1) * self.batch_size].tolist()
            epoch, first = epoch + 1, 0
