"""Text files to train on, and which of them are held out."""

import hashlib
import sysconfig
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from flash.errors import InputError, require


class Source(Enum):
    """Where a corpus comes from."""

    stdlib = "stdlib"
    """The sources of Python's standard library, which every machine has."""
    folder = "folder"
    """Text files below `data.path`."""


@dataclass(kw_only=True)
class DataSettings:
    """Config group `data`."""

    name: str
    source: Source = Source.stdlib
    path: str | None = None
    """Folder of the corpus; only for `source: folder`."""
    pattern: str = "*.py"
    """Files that belong to the corpus, matched below the folder at any depth."""
    heldout_percent: int = 5
    """Share of the files kept out of training and calibration, by a hash of their path [%]."""
    seq_len: int = 512
    """Tokens a sequence."""
    tokenizer: str | None = None
    """A tokenizer.json; by default the backbone's own."""
    bpe_vocab_size: int = 2048
    """Entries of the tokenizer that is trained on the corpus when the backbone has none."""
    heldout_sequences: int = 48
    """Sequences that the held-out loss is computed on; 0 takes all of them."""

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
        if self.source is Source.folder and self.path is None:
            raise InputError("data.path=null: expected a folder for data.source=folder; set it")
        if self.source is Source.stdlib and self.path is not None:
            raise InputError(f"data.path={self.path}: has no effect with data.source=stdlib")


@dataclass(frozen=True)
class Document:
    """One file of a corpus."""

    name: str
    """Path relative to the corpus folder, with forward slashes."""
    path: Path

    @property
    def digest(self) -> str:
        """Hash of the name: the same on every machine, whatever the folder."""
        return hashlib.sha256(self.name.encode()).hexdigest()

    def is_held_out(self, percent: int) -> bool:
        return int(self.digest[:8], 16) % 100 < percent


def find_documents(settings: DataSettings) -> list[Document]:
    """All files of the corpus, in the order of their hash, so that neighbours are unrelated.

    Raises:
        InputError: The folder does not exist, or no file in it matches.
    """
    if settings.source is Source.stdlib:
        root, key = Path(sysconfig.get_path("stdlib")), "data.source=stdlib"
    else:
        root, key = Path(str(settings.path)), f"data.path={settings.path}"
    if not root.is_dir():
        raise InputError(f"{key}: expected a folder, {root} is none")
    documents = []
    for path in root.rglob(settings.pattern):
        name = path.relative_to(root).as_posix()
        installed = "site-packages/" in name or "dist-packages/" in name
        if path.is_file() and not (settings.source is Source.stdlib and installed):
            documents.append(Document(name, path))
    if not documents:
        raise InputError(f"{key}: expected files that match {settings.pattern}, found none")
    return sorted(documents, key=lambda document: document.digest)


def read_text(document: Document) -> str:
    """The file's text; bytes that are not UTF-8 become replacement characters.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        return document.path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{document.path}: cannot be read ({error.strerror})") from error
