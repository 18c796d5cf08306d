"""Text files to train on, and which of them are held out."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from flash.data.settings import DataKind, DataSettings
from flash.errors import InputError


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
    if settings.source is DataKind.stdlib:
        root, key = Path(sysconfig.get_path("stdlib")), "data.source=stdlib"
    else:
        root, key = Path(str(settings.path)), f"data.path={settings.path}"
    if not root.is_dir():
        raise InputError(f"{key}: expected a folder, {root} is none")
    documents = []
    for path in root.rglob(settings.pattern):
        name = path.relative_to(root).as_posix()
        installed = "site-packages/" in name or "dist-packages/" in name
        if path.is_file() and not (settings.source is DataKind.stdlib and installed):
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
