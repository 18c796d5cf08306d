"""Tokenizers for text: loading under the settings of the data, training, and sizes of tokens."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from flash.data.settings import DataSettings
from flash.model.tokenizer import END_OF_TEXT, ModelTokenizer
from flash.model.tokenizer_json import vocabulary_bytes

# A newline keeps the indentation after it, so that indentation costs one token per line. No
# look-ahead is used, because the regex engine of on-device runtimes does not support it.
_SPLIT = r"\n[ \t]*| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[ \t]+|\s+"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of `vocab_size` entries on `texts`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path, settings: DataSettings | None = None) -> ModelTokenizer:
    """Read a tokenizer.json and the files beside it.

    Args:
        path: The tokenizer.json.
        settings: Data settings about the begin and the end of documents. None: as the files say.

    Raises:
        InputError: The file is missing, damaged or names no end-of-text token.
    """
    end = settings.end_of_text if settings is not None else None
    begin = settings.begin_of_text if settings is not None else None
    return ModelTokenizer.open(path, end_of_text=end, begin_of_text=begin, key="data.tokenizer=")


class ByteCounter:
    """Counter of the UTF-8 bytes of text that tokens stand for.

    Args:
        tokenizer: Tokenizer of the model.
    """

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._lengths, self._end = token_bytes(tokenizer.backend), tokenizer.end_of_text
        self._opening = tokenizer.prefix[-1] if tokenizer.prefix else self._end
        probe = tokenizer.backend.encode("x", add_special_tokens=False).ids
        self._adds_blank = int(self._lengths[probe].sum()) > 1

    def __len__(self) -> int:
        """Number of token ids."""
        return len(self._lengths)

    def count(self, before: np.ndarray, tokens: np.ndarray) -> int:
        """Count the bytes of `tokens`, each of which follows the token `before`.

        The blank that some tokenizers put in front of a document is none of its bytes.
        """
        total = int(self._lengths[tokens].sum())
        if self._adds_blank:
            total -= int(((before == self._opening) & (tokens != self._end)).sum())
        return total


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Number of UTF-8 bytes of text that each token id stands for, up to the largest id.

    Special tokens, and ids without a token, stand for none.
    """
    counts = dict(vocabulary_bytes(tokenizer))
    lengths = np.zeros(max(counts) + 1, dtype=np.int64)
    lengths[list(counts)] = list(counts.values())
    return lengths
