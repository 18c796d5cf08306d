"""Conversion of values of a data set to tokens."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from flash.errors import InputError
from flash.model.tokenizer import ModelTokenizer

_BEGINNING = 1000
"""Characters of a text that show whether it has tokens."""


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

    def check(self, value: Any) -> None:
        """Check the type of a value.

        Raises:
            InputError: `encode` does not take it.
        """
        ...

    def encode(self, values: list[Any]) -> list[EncodedDocument | InputError | None]:
        """Tokens of each value that was checked; None for a value without anything to learn.

        A value that cannot be encoded gives the error in its place.
        """
        ...

    def usable(self, value: Any) -> bool | InputError:
        """True if a value that was checked has something to learn, without encoding it all."""
        ...


class TextEncoder:
    """Encoder of plain text, as documents with begin-of-text where it belongs and end-of-text.

    Special tokens that a text mentions are encoded as the characters that they consist of. No
    document is therefore cut, and end-of-text stands only at the end of documents.

    Args:
        tokenizer: Tokenizer of the model.
    """

    needed = "text"
    splits_documents = True

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self.prefix, self.end_of_text = tokenizer.prefix, tokenizer.end_of_text
        self.tokenizer = _without_special_tokens(tokenizer.backend, self.end_of_text)

    def check(self, value: Any) -> None:
        if not isinstance(value, str):
            raise InputError(f"expected text, found {json_type(value)}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError("expected text, found half of a surrogate pair in it") from None

    def encode(self, values: list[Any]) -> list[EncodedDocument | InputError | None]:
        encodings = self.tokenizer.encode_batch_fast(values, add_special_tokens=False)
        return [self._document(encoding.ids) for encoding in encodings]

    def usable(self, value: Any) -> bool | InputError:
        beginning = value[:_BEGINNING].strip() or value
        return bool(self.tokenizer.encode(beginning, add_special_tokens=False).ids)

    def _document(self, ids: list[int]) -> EncodedDocument | InputError | None:
        if not ids:
            return None
        if self.end_of_text in ids:
            token = self.tokenizer.id_to_token(self.end_of_text)
            return InputError(f"mentions {token}, which this tokenizer cannot encode as text")
        return EncodedDocument(np.array([*self.prefix, *ids, self.end_of_text], np.int64))


def _without_special_tokens(tokenizer: Tokenizer, end_of_text: int) -> Tokenizer:
    """Copy of a tokenizer that encodes special tokens in a text, end-of-text among them, as text.

    A tokenizer finds an added token that is not marked as special in any text, so that end-of-text
    is marked.
    """
    description = json.loads(tokenizer.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["special"] or token["id"] == end_of_text
    copy = Tokenizer.from_str(json.dumps(description))
    copy.encode_special_tokens = True
    return copy


def json_type(value: Any) -> str:
    """Name of a value's type, as it is called in JSON and parquet files."""
    names = {type(None): "null", bool: "true or false", dict: "an object", list: "a list"}
    names |= {str: "text", int: "an integer", float: "a number", bytes: "binary data"}
    return names.get(type(value), type(value).__name__)


def in_validation_split(value: Any, percent: int) -> bool:
    """Assign a document to the validation split by a hash of its content.

    Copies of a document are all in the same split.

    Args:
        value: Text, or a value that JSON can represent.
        percent: Share of the validation split [%].
    """
    return validation_percent_of(value) <= percent


def validation_percent_of(value: Any) -> int:
    """Smallest share of the validation split that holds a document, from 1 to 100 [%]."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:4], "big") % 100 + 1
