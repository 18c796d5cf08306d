"""Text files to train on, and their split into training and validation."""

import hashlib
import logging
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flash.data.settings import DataKind, DataSettings
from flash.errors import InputError

log = logging.getLogger(__name__)


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

    @property
    def validation_percent(self) -> int:
        """Smallest share of the validation split that holds the file out, from 1 to 100 [%]."""
        return int(self.digest[:8], 16) % 100 + 1

    def in_validation_split(self, percent: int) -> bool:
        """Assign the file to the validation split, of `percent` of the files, by its digest."""
        return self.validation_percent <= percent


def find_documents(settings: DataSettings) -> list[Document]:
    """Find all text files of `data.kind` stdlib or folder.

    They are in the order of their hash, so that neighbors are unrelated. Hidden files and those in
    hidden folders, such as an editor's copies, are left out.

    Raises:
        InputError: The folder does not exist, or no file in it matches.
    """
    return sorted(_documents(settings), key=lambda document: document.digest)


def check_documents(settings: DataSettings) -> None:
    """Check that there is a text file of `data.kind` stdlib or folder.

    Raises:
        InputError: The folder does not exist, or no file in it matches.
    """
    next(_documents(settings))


def _documents(settings: DataSettings) -> Iterator[Document]:
    if settings.kind is DataKind.stdlib:
        root, key = Path(sysconfig.get_path("stdlib")), "data.kind=stdlib"
    else:
        root, key = Path(str(settings.path)), f"data.path={settings.path}"
    if not root.is_dir():
        raise InputError(f"{key}: expected a folder, {root} is not one")
    empty = True
    for path in root.rglob(settings.pattern):
        name = path.relative_to(root).as_posix()
        installed = "site-packages/" in name or "dist-packages/" in name
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if path.is_file() and not hidden and not (settings.kind is DataKind.stdlib and installed):
            empty = False
            yield Document(name, path)
    if empty:
        raise InputError(f"{key}: expected files that match {settings.pattern}, found none")


def read_documents(settings: DataSettings) -> Iterator[tuple[Document, str]]:
    """Read all text files of `data.kind` stdlib or folder.

    Raises:
        InputError: A file cannot be read, or is not UTF-8 and `data.skip_damaged` is false.
    """
    # Some files of the standard library are in other encodings, to test Python's reader.
    stdlib = settings.kind is DataKind.stdlib
    encoding, errors = ("utf-8", "replace") if stdlib else ("utf-8-sig", "strict")
    for document in find_documents(settings):
        try:
            yield document, document.path.read_text(encoding, errors)
        except OSError as error:
            raise InputError(f"{document.path}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
            if not settings.skip_damaged:
                raise InputError(
                    f"{document.path}: is not UTF-8 ({byte}); convert it, or set "
                    "data.skip_damaged=true to leave it out"
                ) from error
            log.warning("%s is not UTF-8 (%s) and is skipped", document.path, byte)
