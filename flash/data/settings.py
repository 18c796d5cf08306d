"""Config group `data`: where text comes from and how it becomes sequences."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from flash.errors import InputError, require
from flash.model.settings import BackboneSettings


class DataKind(Enum):
    """Where a corpus comes from."""

    stdlib = "stdlib"
    """The sources of Python's standard library, which every machine has."""
    folder = "folder"
    """Text files below `data.path`."""
    datasets = "datasets"
    """`data.parts`, tokenised and packed while training."""
    shards = "shards"
    """What `python -m flash.data prepare` made of a corpus, in `data.path`."""
    chat = "chat"
    """Conversations in `data.parts`, for instruction tuning."""


class FileFormat(Enum):
    """Kind of the files of a part."""

    parquet = "parquet"
    jsonl = "jsonl"
    txt = "txt"


class DocumentUnit(Enum):
    """What a document is in a text file."""

    document = "document"
    """The whole file."""
    paragraph = "paragraph"
    """What blank lines separate."""
    line = "line"


@dataclass(kw_only=True)
class TextSourceSettings:
    """One part of a mixture: files, or a data set of the Hugging Face hub."""

    path: str
    """A file, a folder, a pattern with `*`, or a data set's name on the hub."""
    name: str | None = None
    """Configuration of a data set that has several; only for the hub."""
    revision: str | None = None
    """Branch, tag or commit; only for the hub. Null is the newest: name one for long runs."""
    split: str = "train"
    """Only for the hub."""
    format: FileFormat | None = None
    """Kind of the files; null goes by their suffix."""
    column: str = "text"
    """Holds the text or, for `source: chat`, the list of messages."""
    unit: DocumentUnit = DocumentUnit.document
    """What a document is; only for text files."""
    weight: float = 1.0
    """Share of the tokens, relative to the other parts."""


@dataclass(kw_only=True)
class DataSettings:
    """Config group `data`."""

    name: str
    source: DataKind = DataKind.stdlib
    path: str | None = None
    """Folder of the corpus, for `source: folder`, or of the shards, for `source: shards`."""
    pattern: str = "*.py"
    """Files that belong to the corpus, matched below the folder at any depth."""
    parts: list[TextSourceSettings] = field(default_factory=list)
    """The mixture, for `source: datasets` and `source: chat`."""
    heldout: TextSourceSettings | None = None
    """Held-out text; null holds out a share of the training text. Only where there are parts."""
    heldout_percent: int = 5
    """Share kept out of training and calibration [%]: of the files, by a hash of their path, or of
    the documents, by a hash of their text."""
    seq_len: int = 512
    """Tokens a sequence."""
    document_masks: bool = False
    """Whether documents in one sequence cannot attend to each other."""
    tokenizer: str | None = None
    """A tokenizer.json; by default the backbone's own."""
    bpe_vocab_size: int = 2048
    """Entries of the tokenizer that is trained on the corpus when the backbone has none."""
    chat_template: str | None = None
    """A Jinja file; by default the template beside the tokenizer. Only for `source: chat`."""
    heldout_sequences: int = 48
    """Sequences that the held-out loss is computed on; 0 takes all of them."""
    lanes: int = 64
    """Pieces that a streamed corpus is dealt to: ranks x workers must divide it. It decides the
    order, ranks and workers do not."""
    workers: int = 0
    """Processes a rank that read (and tokenise) ahead; 0 does it between the steps."""
    skip_damaged: bool = False
    """Leave damaged shards and files out, with a warning, where they would be an error."""

    def __post_init__(self) -> None:
        require(
            0 < self.heldout_percent < 100,
            "data.heldout_percent",
            self.heldout_percent,
            "a whole number from 1 to 99",
        )
        require(self.seq_len >= 2, "data.seq_len", self.seq_len, "2 or more tokens")
        require(
            self.bpe_vocab_size >= 300, "data.bpe_vocab_size", self.bpe_vocab_size, "300 or more"
        )
        require(
            self.heldout_sequences >= 0,
            "data.heldout_sequences",
            self.heldout_sequences,
            "0 (all) or more",
        )
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(
            self.lanes > 0 and self.lanes % max(self.workers, 1) == 0,
            "data.lanes",
            self.lanes,
            f"a positive multiple of data.workers={self.workers}",
        )
        self._check_source()

    @property
    def streamed(self) -> bool:
        """Whether the corpus is `parts`."""
        return self.source in {DataKind.datasets, DataKind.chat}

    def _check_source(self) -> None:
        source = f"data.source={self.source.value}"
        if self.source in {DataKind.folder, DataKind.shards}:
            if self.path is None:
                raise InputError(f"data.path=null: expected a folder for {source}; set it")
        elif self.path is not None:
            raise InputError(f"data.path={self.path}: has no effect with {source}")
        if self.streamed and not self.parts:
            raise InputError(f"data.parts=[]: expected one or more for {source}; set it")
        if not self.streamed and (self.parts or self.heldout is not None):
            key = "parts" if self.parts else "heldout"
            raise InputError(f"data.{key}: has no effect with {source}; use data.source=datasets")
        if self.chat_template is not None and self.source is not DataKind.chat:
            raise InputError(
                f"data.chat_template={self.chat_template}: has no effect with {source}"
            )
        for i, part in enumerate(self.parts):
            require(part.weight > 0, f"data.parts[{i}].weight", part.weight, "a positive number")
        if self.streamed and self.heldout is None and self.heldout_sequences == 0:
            raise InputError(
                "data.heldout_sequences=0: expected how many, as all of a share of streamed "
                "documents means reading them all; set it, or name data.heldout"
            )


@dataclass(kw_only=True)
class PrepareSettings:
    """Root of `python -m flash.data prepare`."""

    backbone: BackboneSettings = MISSING
    """Its tokenizer is used."""
    data: DataSettings = MISSING
    out: str | None = None
    """Folder for the shards; null is `shards/NAME` in `runs`."""
    tokens: int | None = None
    """Training tokens to prepare; parts are repeated where their weight asks for more than they
    have. Null takes every document once, and weights decide nothing but the order."""
    shard_tokens: int = 1 << 27
    """Tokens a shard, give or take some documents."""
    seed: int = 0
    """Decides the order."""
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
