"""From a row of a data set to tokens."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from flash.data.tokenizer import end_of_text_id
from flash.errors import InputError


@dataclass(frozen=True)
class Encoded:
    """A document as tokens.

    Attributes:
        tokens: Token ids `(n,)`, at least one.
        learn: Which of them a model is to predict `(n,)`; None: all.
    """

    tokens: np.ndarray
    learn: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def last(self, count: int) -> "Encoded":
        """Its last `count` tokens."""
        start = len(self) - count
        return Encoded(self.tokens[start:], None if self.learn is None else self.learn[start:])


class Encoder(Protocol):
    """Turns values of a part's column into tokens.

    Attributes:
        wanted: What a value must have to be of use, in words.
        cuts: Whether documents are cut at the ends of sequences; else they are kept whole.
    """

    wanted: str
    cuts: bool

    def encode(self, values: list[Any]) -> list[Encoded | None]:
        """Tokens of each value; None where there is nothing to learn.

        Raises:
            InputError: A value of the wrong kind.
        """
        ...


class TextEncoder:
    """Text followed by end-of-text."""

    wanted = "text"
    cuts = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.end_of_text = tokenizer, end_of_text_id(tokenizer)

    def encode(self, values: list[Any]) -> list[Encoded | None]:
        for value in values:
            if not isinstance(value, str):
                raise InputError(f"expected text, found {type(value).__name__}")
        encodings = self.tokenizer.encode_batch_fast(values, add_special_tokens=False)
        return [
            Encoded(np.array([*encoding.ids, self.end_of_text], np.int64)) if encoding.ids else None
            for encoding in encodings
        ]


def is_held_out(value: Any, percent: int) -> bool:
    """Whether a document is held out: the same wherever it occurs."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:4], "big") % 100 < percent
