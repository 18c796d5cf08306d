"""Prepared tokens: memory-mapped shards and the manifest that describes them."""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flash.data.arrays import map_array, write_array
from flash.errors import InputError, require
from flash.model.tokenizer import ModelTokenizer
from flash.progress import progress
from flash.records import convert, file_digest, find_json, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_VERSION = 2


@dataclass(frozen=True)
class Shard:
    """One file of whole documents, each followed by end-of-text.

    Attributes:
        file: Name within the folder.
        tokens: Number of tokens.
        documents: Number of documents.
        sha256: Hash of the file.
    """

    file: str
    tokens: int
    documents: int
    sha256: str


@dataclass
class Manifest:
    """Description of a folder of shards.

    It is written after each shard, so that an interrupted preparation can resume.

    Attributes:
        key: Hash of everything that decides the tokens.
        tokenizer: Hash of the tokenizer.
        shards: Shards of the training split, in order.
        validation: Shard of the validation split; None before it is written.
        state: State of the mixture after the last shard (`flash.data.mixture.Mixture.state`).
        complete: True once all shards are written.
        data: Settings that the shards were made with, for people to read.
    """

    key: str
    tokenizer: str
    shards: list[Shard] = field(default_factory=list)
    validation: Shard | None = None
    state: list[list[int]] | None = None
    complete: bool = False
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of training tokens."""
        return sum(shard.tokens for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write the manifest into `folder`, in place of the one before."""
        write_json(folder / MANIFEST, {"version": _VERSION, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """Read the manifest in `folder`; None if there is no such file.

        Raises:
            InputError: The file is damaged, or was written by another version.
        """
        return find_json(folder / MANIFEST, cls._from_json, "run `flash prepare` again")

    @classmethod
    def _from_json(cls, values: Any) -> "Manifest":
        found = convert(dict[str, Any], values)
        version = found.get("version")
        if version == 1:  # had the same content under a former name
            found["validation"] = found.get("heldout")
        else:
            require(version == _VERSION, "version", version, str(_VERSION))
        manifest = convert(cls, found)
        for shard in [*manifest.shards, *filter(None, [manifest.validation])]:
            require(Path(shard.file).name == shard.file, "file", shard.file, "a file beside it")
        return manifest


def write_shard(folder: Path, name: str, documents: Sequence[np.ndarray]) -> Shard:
    """Write documents as one shard; the file is written as a whole or not at all."""
    tokens = np.concatenate(documents)
    write_array(folder / name, tokens)
    return Shard(name, len(tokens), len(documents), file_digest(folder / name))


class ShardedTokens:
    """Concatenation of shards as one stream, read from disk on demand.

    Args:
        paths: Files of the shards, in order.

    Raises:
        InputError: A file is no array of tokens.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._arrays = [map_array(path) for path in paths]
        self._ends = np.cumsum([len(array) for array in self._arrays])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, window: slice) -> np.ndarray:
        """Tokens from `start` to `stop - 1`, `(stop - start,)`."""
        start, stop, _ = window.indices(len(self))
        first, last = np.searchsorted(self._ends, (start, max(start, stop - 1)), side="right")
        begin = int(self._ends[first - 1]) if first else 0
        arrays = self._arrays[first : last + 1]
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return joined[start - begin : stop - begin]


@dataclass(frozen=True)
class ShardSplits:
    """Token streams of shards whose hashes were checked.

    Attributes:
        train: Tokens of the training split.
        validation: Tokens of the validation split.
        digest: Hash of both splits and of the tokenizer.
    """

    train: ShardedTokens
    validation: ShardedTokens
    digest: str


def open_shards(
    folder: Path, tokenizer: ModelTokenizer, cache: Path, *, skip_damaged: bool = False
) -> ShardSplits:
    """Check the shards in `folder` and map them into memory.

    Args:
        folder: Folder that `flash prepare` wrote.
        tokenizer: Tokenizer that the shards were made with.
        cache: Folder for notes of the files whose hash was right, so that each is hashed once.
        skip_damaged: Skip damaged training shards, with a warning.

    Raises:
        InputError: Shards are missing, unfinished, damaged, or made with another tokenizer.
    """
    manifest, validation = finished(folder, tokenizer)
    whole = []
    problems = problems_of(folder, [*manifest.shards, validation], cache)
    for shard in (*manifest.shards, validation):
        problem = problems.get(shard.file)
        if problem is None:
            whole.append(shard)
        elif skip_damaged and shard is not validation:
            log.warning("%s: %s and is skipped", folder / shard.file, problem)
        else:
            more = (
                f"delete {folder} to prepare all of them again"
                if shard is validation
                else "set data.skip_damaged=true to skip damaged training shards"
            )
            raise InputError(
                f"{folder / shard.file}: {problem} ({len(problems)} such files); copy it again, "
                f"or {more}"
            )
    train = whole[:-1]
    if not train:
        raise InputError(
            f"data.path={folder}: expected a whole shard of {len(manifest.shards)}, found none"
        )
    hashes = " ".join([manifest.tokenizer, *(shard.sha256 for shard in whole)])
    return ShardSplits(
        ShardedTokens([folder / shard.file for shard in train]),
        ShardedTokens([folder / validation.file]),
        hashlib.sha256(hashes.encode()).hexdigest()[:16],
    )


def finished(folder: Path, tokenizer: ModelTokenizer | None) -> tuple[Manifest, Shard]:
    """Return the manifest of finished shards of this tokenizer, and their validation shard.

    Args:
        folder: Folder that `flash prepare` wrote.
        tokenizer: Tokenizer to compare; None if it is not known yet.

    Raises:
        InputError: Shards are missing, unfinished, or made with another tokenizer.
    """
    named = f"data.path={folder}"
    manifest = Manifest.read(folder)
    if manifest is None:
        raise InputError(
            f"{named}: expected a folder with {MANIFEST}; make it with `flash prepare`"
        )
    if not manifest.complete or manifest.validation is None:
        raise InputError(f"{named}: is not finished; run `flash prepare` again")
    if tokenizer is not None and manifest.tokenizer != tokenizer.digest:
        raise InputError(
            f"{named}: was made with another tokenizer than this backbone's, or with another begin "
            "or end of documents; prepare it again with this backbone, or set data.tokenizer, "
            "data.begin_of_text and data.end_of_text as there"
        )
    return manifest, manifest.validation


def problems_of(folder: Path, shards: Sequence[Shard], cache: Path) -> dict[str, str]:
    """Find missing and damaged files.

    Args:
        folder: Folder of the files.
        shards: The files as they were written.
        cache: Folder for notes of the files whose hash was right, so that each is hashed once.

    Returns:
        The problem of each such file, by its name.
    """
    notes = cache / f"whole_{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"
    try:
        known = find_json(notes, dict[str, list[Any]], "check the shards again") or {}
    except InputError:  # only spares hashing
        known = {}
    problems: dict[str, str] = {}
    found: dict[str, list[Any]] = {}
    for shard in shards:
        path = folder / shard.file
        if path.is_file():
            stat = path.stat()
            found[shard.file] = [stat.st_size, stat.st_mtime_ns, shard.sha256]
        else:
            problems[shard.file] = "is missing"
    unknown = [s for s in shards if s.file in found and known.get(s.file) != found[s.file]]
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(lambda shard: file_digest(folder / shard.file), unknown)
        for shard, actual in progress(
            zip(unknown, hashes, strict=True), "checking shards", len(unknown)
        ):
            if actual != shard.sha256:
                problems[shard.file] = "is damaged"
    if unknown:
        whole = {file: facts for file, facts in found.items() if file not in problems}
        write_json(notes, whole)
    return problems
