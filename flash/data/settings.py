"""Config group `data`: the origin of text, and the sequences that it becomes.

Errors that are raised here name a key relative to its class; `flash.config` adds the path.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from flash.errors import InputError, check_name, require, shown
from flash.model.settings import BackboneSettings
from flash.records import plain


class DataKind(Enum):
    """Origin of the text."""

    stdlib = "stdlib"
    """The sources of Python's standard library, which every machine has."""
    folder = "folder"
    """Text files below `data.path`."""
    datasets = "datasets"
    """The mixture `data.sources`, tokenised and packed while training."""
    shards = "shards"
    """Tokens that `flash prepare` wrote to `data.path`."""
    chat = "chat"
    """Conversations in `data.sources`, for instruction tuning."""


class FileFormat(Enum):
    """Format of a source's files."""

    parquet = "parquet"
    """Columns and rows; a row is a document."""
    jsonl = "jsonl"
    """One JSON object per line, or a list of objects; an object is a document."""
    txt = "txt"
    """Plain text; `unit` decides the extent of a document."""


class DocumentUnit(Enum):
    """Extent of a document in a text file."""

    document = "document"
    """The whole file."""
    paragraph = "paragraph"
    """Text between blank lines."""
    line = "line"
    """One line."""


# Every field of the settings below is part of the identity of the data, and so of the keys of
# results, but for those that are named here.
SOURCE_UNCOUNTED = frozenset({"path", "name", "revision", "split"})
"""Fields of `TextSourceSettings` that the identity of a source's content stands for."""
UNCOUNTED = frozenset({
    "name",  # for people
    # The hash of the texts and of the tokenizer stands for these.
    *("path", "pattern", "tokenizer", "bpe_vocab_size", "chat_template"),
    "workers",  # changes no sequence
    "skip_damaged",  # what is left out is not in the hash of the texts, or ends the run if false
})
"""Fields of `DataSettings` that do not decide, by themselves, what is trained on or measured."""
OF_SEQUENCES = frozenset({"seq_len", "document_masks", "validation_sequences", "logical_shards"})
"""Fields of `DataSettings` that do not decide the tokens of documents, but their sequences."""


@dataclass(kw_only=True)
class TextSourceSettings:
    """One source of a mixture: files, or a data set of the Hugging Face hub."""

    path: str
    """File, folder, pattern with `*`, or name of a data set on the hub."""
    name: str | None = None
    """Configuration of a hub data set that has several. Null is its default one. It has no effect
    on files."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set. Null is the newest commit: name one for long runs.
    It has no effect on files."""
    split: str = "train"
    """Split of a hub data set. It has no effect on files."""
    format: FileFormat | None = None
    """Format of the files. Null derives it from their suffix."""
    column: str = "text"
    """Column that holds the text or, for `data.kind=chat`, the list of messages."""
    unit: DocumentUnit = DocumentUnit.document
    """Extent of a document in text files. It has no effect on other formats."""
    weight: float = 1.0
    """Share of the tokens relative to the other sources; positive."""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.weight) and self.weight > 0
        require(valid, "weight", self.weight, "a positive number")

    def decisive(self) -> dict[str, Any]:
        """Plain values of all fields that decide the documents, but `SOURCE_UNCOUNTED`."""
        return {k: v for k, v in plain(self).items() if k not in SOURCE_UNCOUNTED}


@dataclass(kw_only=True)
class DataSettings:
    """Config group `data`."""

    name: str
    """Name of the data in the names of files: trained tokenizers and folders of shards."""
    kind: DataKind = DataKind.stdlib
    """Origin of the text."""
    path: str | None = None
    """Folder of the text files for `kind=folder`, or of the shards for `kind=shards`; null for
    every other kind."""
    pattern: str = "*.py"
    """Pattern of the file names to read, at any depth, for `kind=stdlib` and `kind=folder`."""
    sources: list[TextSourceSettings] = field(default_factory=list)
    """The mixture for `kind=datasets` and `kind=chat`; empty for every other kind."""
    validation: TextSourceSettings | None = None
    """Text of the validation split. Null takes a share of the training text
    (`validation_percent`). It can be set only with `sources`."""
    validation_percent: int = 5
    """Share that is kept out of training and calibration [%], from 1 to 99: of the files, by a hash
    of their path, or of streamed documents, by a hash of their text. It has no effect where
    `validation` is set, nor with `kind=shards`."""
    seq_len: int = 512
    """Tokens per sequence that the model reads and predicts; at least 2."""
    document_masks: bool = False
    """Forbid documents in the same sequence to attend to each other."""
    tokenizer: str | None = None
    """Path of a tokenizer.json. Null is the tokenizer of the backbone."""
    end_of_text: str | None = None
    """Token that follows each document, such as `<|endoftext|>`. Null is the one that the tokenizer
    adds to a text, else its `eos_token`, else the first end token of the folder's configs."""
    begin_of_text: bool | None = None
    """Put the begin-of-text token in front of each document. Null is as the tokenizer does, and so
    as the model was trained. It has no effect with `kind=chat`, where the template decides."""
    bpe_vocab_size: int = 2048
    """Entries of the tokenizer that is trained on the text, at least 300. It has an effect only
    with a backbone that has no tokenizer, `tokenizer=null`, and `kind=stdlib` or `kind=folder`."""
    chat_template: str | None = None
    """Path of a Jinja file for `kind=chat`. Null is the template beside the tokenizer."""
    validation_sequences: int = 48
    """Sequences for the validation loss. 0 takes all, which streamed data allow only where
    `validation` is set."""
    logical_shards: int = 64
    """Shares into which streamed data are divided: a multiple of ranks x `workers`. Data that are
    too small for so many are divided into the largest divisor of this number that gives each share
    4 documents or more. Ranks and workers do not change the order of the sequences; the number of
    shares does. It has an effect only with `sources`."""
    workers: int = 0
    """Processes per rank that read (and tokenise) ahead; fewer where small data have too few shares
    for so many. 0 reads between the steps."""
    skip_damaged: bool = False
    """Skip damaged shards for training and damaged files, and rows that are no text or no
    conversation for the chat template, with a warning and a count. False makes them an error that
    names file and row."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        require(
            0 < self.validation_percent < 100,
            "validation_percent",
            self.validation_percent,
            "a whole number from 1 to 99",
        )
        relative = self.pattern != "" and not self.pattern.startswith("/")
        require(relative, "pattern", self.pattern, "a pattern of files below data.path, as *.py")
        require(self.seq_len >= 2, "seq_len", self.seq_len, "2 or more tokens")
        require(self.bpe_vocab_size >= 300, "bpe_vocab_size", self.bpe_vocab_size, "300 or more")
        require(
            self.validation_sequences >= 0,
            "validation_sequences",
            self.validation_sequences,
            "0 (all) or more",
        )
        require(self.workers >= 0, "workers", self.workers, "0 or more")
        require(
            self.logical_shards > 0 and self.logical_shards % max(self.workers, 1) == 0,
            "logical_shards",
            self.logical_shards,
            f"a positive multiple of workers={self.workers}",
        )
        self._check_path()
        self._check_sources()

    @property
    def streamed(self) -> bool:
        """True where the text is read from `sources` while training."""
        return self.kind in {DataKind.datasets, DataKind.chat}

    def decisive(self) -> dict[str, Any]:
        """Plain values of all fields that decide the data of a run, but `UNCOUNTED`.

        A result of other values is another result; see `PackedData.identity`.
        """
        values = {k: v for k, v in plain(self).items() if k not in UNCOUNTED}
        validation = self.validation.decisive() if self.validation is not None else None
        sources = [source.decisive() for source in self.sources]
        return {**values, "sources": sources, "validation": validation}

    def decisive_for_tokens(self) -> dict[str, Any]:
        """Values of `decisive` that tokenised documents depend on: all but `OF_SEQUENCES`."""
        return {k: v for k, v in self.decisive().items() if k not in OF_SEQUENCES}

    def _check_path(self) -> None:
        kind = f"kind={self.kind.value}"
        if self.kind in {DataKind.folder, DataKind.shards}:
            if self.path is None:
                raise InputError(f"path=null: expected a folder for {kind}; set it")
        elif self.path is not None:
            raise InputError(f"path={self.path}: expected null, it has no effect with {kind}")

    def _check_sources(self) -> None:
        kind = f"kind={self.kind.value}"
        if self.streamed and not self.sources:
            raise InputError(f"sources=[]: expected one or more for {kind}; set it")
        if not self.streamed and (self.sources or self.validation is not None):
            key = "sources" if self.sources else "validation"
            raise InputError(f"{key}: has no effect with {kind}; use kind=datasets")
        if self.chat_template is not None and self.kind is not DataKind.chat:
            raise InputError(
                f"chat_template={self.chat_template}: expected null, it has no effect with {kind}"
            )
        if self.begin_of_text is not None and self.kind is DataKind.chat:
            raise InputError(
                f"begin_of_text={shown(self.begin_of_text)}: expected null, it has no effect with "
                f"{kind}"
            )
        if self.streamed and self.validation is None and self.validation_sequences == 0:
            raise InputError(
                "validation_sequences=0: expected 1 or more, as all of a share of streamed "
                "documents would mean reading every document; set it, or name validation"
            )


@dataclass(kw_only=True)
class PrepareSettings:
    """Settings of `flash prepare`."""

    backbone: BackboneSettings = MISSING
    """Model whose tokenizer encodes the text, unless `data.tokenizer` names another one."""
    data: DataSettings = MISSING
    """Text to prepare, of `data.kind=datasets`."""
    out: str | None = None
    """Folder for the shards. Null is `RUNS/shards/NAME`, of `runs` and `data.name`."""
    tokens: int | None = None
    """Training tokens to prepare; sources are repeated where their weight asks for more than they
    have. Null takes every document once, and weights decide nothing but the order."""
    shard_tokens: int = 1 << 27
    """Least tokens per shard but the last; shards end with a whole document."""
    seed: int = 0
    """Seed of the order of the documents; 0 or more."""
    runs: str = "runs"
    """Folder for everything that runs produce."""

    def __post_init__(self) -> None:
        require(self.shard_tokens > 0, "shard_tokens", self.shard_tokens, "a positive integer")
        require(
            self.tokens is None or self.tokens > 0,
            "tokens",
            self.tokens,
            "a positive integer or null",
        )
        require(self.seed >= 0, "seed", self.seed, "0 or more")
