"""Conversion of values of a data set to tokens."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from flash.errors import InputError
from flash.model.tokenizer import ModelTokenizer


@dataclass(frozen=True)
class EncodedDocument:
    """A document as tokens.

    Attributes:
        tokens: Token ids `(n,)`, at least one.
        loss_mask: True for the tokens that the model learns to predict `(n,)`. None: all.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def tail(self, count: int) -> "EncodedDocument":
        """The last `count` tokens of the document."""
        start = len(self) - count
        mask = None if self.loss_mask is None else self.loss_mask[start:]
        return EncodedDocument(self.tokens[start:], mask)


class Encoder(Protocol):
    """Converter of the values in a source's column to tokens.

    Attributes:
        needed: Content that a value must have to be of use, for error messages.
        splits_documents: True if a document may be cut at the end of a sequence; False if
            documents stay whole.
    """

    needed: str
    splits_documents: bool

    def encode(self, values: list[Any]) -> list[EncodedDocument | None]:
        """Tokens of each value; None for a value without anything to learn.

        Raises:
            InputError: A value has the wrong type.
        """
        ...


class TextEncoder:
    """Encoder of plain text, as documents with begin-of-text where it belongs and end-of-text.

    Args:
        tokenizer: Tokenizer of the model.
    """

    needed = "text"
    splits_documents = True

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, values: list[Any]) -> list[EncodedDocument | None]:
        for value in values:
            if not isinstance(value, str):
                raise InputError(f"expected text, found {type(value).__name__}")
        prefix, end = self.tokenizer.prefix, self.tokenizer.end_of_text
        encodings = self.tokenizer.backend.encode_batch_fast(values, add_special_tokens=False)
        return [
            EncodedDocument(np.array([*prefix, *encoding.ids, end], np.int64))
            if encoding.ids
            else None
            for encoding in encodings
        ]


def in_validation_split(value: Any, percent: int) -> bool:
    """Assign a document to the validation split by a hash of its content.

    Copies of a document are all in the same split.

    Args:
        value: Text, or a value that JSON can represent.
        percent: Share of the validation split [%].
    """
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:4], "big") % 100 < percent
