"""Corpora, tokenizers, packed sequences, and the data module."""

from flash.data.corpus import DataSettings, Document, Source, find_documents, read_text
from flash.data.module import PackedData, find_tokenizer
from flash.data.packed import PackedSequences, ResumableBatches, TokenStreams, tokenize
from flash.data.tokenizer import (
    END_OF_TEXT,
    end_of_text_id,
    load_tokenizer,
    token_bytes,
    train_tokenizer,
)

__all__ = [
    "END_OF_TEXT",
    "DataSettings",
    "Document",
    "PackedData",
    "PackedSequences",
    "ResumableBatches",
    "Source",
    "TokenStreams",
    "end_of_text_id",
    "find_documents",
    "find_tokenizer",
    "load_tokenizer",
    "read_text",
    "token_bytes",
    "tokenize",
    "train_tokenizer",
]
