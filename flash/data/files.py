"""Text files to train on, and their split into training and validation."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from flash.data.settings import DataKind, DataSettings
from flash.errors import InputError


@dataclass(frozen=True)
class Document:
    """One text file.

    Attributes:
        name: Path relative to the folder that was searched, with forward slashes.
        path: Path to read the file from.
    """

    name: str
    path: Path

    @property
    def digest(self) -> str:
        """Hash of the name, which is the same on every machine, wherever the folder is."""
        return hashlib.sha256(self.name.encode()).hexdigest()

    def in_validation_split(self, percent: int) -> bool:
        """Assign the file to the validation split, of `percent` of the files, by its digest."""
        return int(self.digest[:8], 16) % 100 < percent


def find_documents(settings: DataSettings) -> list[Document]:
    """Find all text files of `data.kind` stdlib or folder.

    They are in the order of their hash, so that neighbors are unrelated.

    Raises:
        InputError: The folder does not exist, or no file in it matches.
    """
    if settings.kind is DataKind.stdlib:
        root, key = Path(sysconfig.get_path("stdlib")), "data.kind=stdlib"
    else:
        root, key = Path(str(settings.path)), f"data.path={settings.path}"
    if not root.is_dir():
        raise InputError(f"{key}: expected a folder, {root} is not one")
    documents = []
    for path in root.rglob(settings.pattern):
        name = path.relative_to(root).as_posix()
        installed = "site-packages/" in name or "dist-packages/" in name
        if path.is_file() and not (settings.kind is DataKind.stdlib and installed):
            documents.append(Document(name, path))
    if not documents:
        raise InputError(f"{key}: expected files that match {settings.pattern}, found none")
    return sorted(documents, key=lambda document: document.digest)


def read_text(document: Document) -> str:
    """Read a file; bytes that are not UTF-8 become replacement characters.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        return document.path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"{document.path}: cannot be read ({error.strerror})") from error
