"""Byte-level BPE tokenizers in Hugging Face's tokenizer.json format."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from flash.errors import InputError

END_OF_TEXT = "<|endoftext|>"
"""Token that ends each document."""

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


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Raises:
        InputError: The file is missing, damaged or has no end-of-text token.
    """
    if not path.is_file():
        raise InputError(f"data.tokenizer={path}: no such file; expected a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for damaged files
        raise InputError(f"data.tokenizer={path}: damaged ({error}); copy it again") from error
    end_of_text_id(tokenizer, path)
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer, path: Path | str = "tokenizer") -> int:
    """Id of the token that separates documents.

    Args:
        tokenizer: Tokenizer to search for a common end-of-text token.
        path: Its origin, for the error message.

    Raises:
        InputError: The tokenizer has no such token.
    """
    for token in (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>"):
        found = tokenizer.token_to_id(token)
        if found is not None:
            return found
    raise InputError(f"data.tokenizer={path}: expected an end-of-text token such as {END_OF_TEXT}")


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Number of UTF-8 bytes that each token id stands for, `(vocab,)`; 0 for special tokens.

    The vocabulary must be a byte-level one, in which each character of an entry is one byte.
    """
    special = {
        token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special
    }
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, token_id in tokenizer.get_vocab().items():
        lengths[token_id] = 0 if token_id in special else len(token)
    return lengths
