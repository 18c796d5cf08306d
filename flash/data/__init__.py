"""Corpora, tokenizers, packed sequences, and the data module."""

from flash.data.batch import Batch, collate
from flash.data.corpus import Document, find_documents, read_text
from flash.data.module import PackedData, find_tokenizer
from flash.data.order import ResumableBatches, Share
from flash.data.packed import PackedSequences, TokenStreams, tokenize
from flash.data.settings import DataSettings, Format, PartSettings, Source, Unit
from flash.data.taught import TaughtSequences
from flash.data.tokenizer import (
    END_OF_TEXT,
    end_of_text_id,
    load_tokenizer,
    token_bytes,
    train_tokenizer,
)

__all__ = [
    "END_OF_TEXT",
    "Batch",
    "DataSettings",
    "Document",
    "Format",
    "PackedData",
    "PackedSequences",
    "PartSettings",
    "ResumableBatches",
    "Share",
    "Source",
    "TaughtSequences",
    "TokenStreams",
    "Unit",
    "collate",
    "end_of_text_id",
    "find_documents",
    "find_tokenizer",
    "load_tokenizer",
    "read_text",
    "token_bytes",
    "tokenize",
    "train_tokenizer",
]
