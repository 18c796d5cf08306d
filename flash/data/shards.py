"""Tokens prepared ahead: memory-mapped shards and the manifest that says what they hold."""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from flash.errors import InputError
from flash.progress import progress
from flash.records import atomic_write, file_digest, find_json, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One file of whole documents, each followed by end-of-text.

    Attributes:
        file: Name within the folder.
        tokens: How many.
        documents: How many.
        sha256: Of the file.
    """

    file: str
    tokens: int
    documents: int
    sha256: str


@dataclass
class Manifest:
    """What a folder of shards holds; written after each shard, so that preparing can go on.

    Attributes:
        key: Hash of all that decides the tokens.
        tokenizer: Hash of the tokenizer.
        shards: Training tokens, in order.
        heldout: Held-out tokens.
        state: Where the mixture goes on (`flash.data.stream.Mixture.state`).
        complete: Whether that is nowhere.
        data: Settings that the tokens were made with, for people.
    """

    key: str
    tokenizer: str
    shards: list[Shard] = field(default_factory=list)
    heldout: Shard | None = None
    state: list[list[int]] | None = None
    complete: bool = False
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return sum(shard.tokens for shard in self.shards)

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, {"version": _VERSION, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest in `folder`, or None where there is none.

        Raises:
            InputError: It is damaged, or of another version.
        """
        return find_json(folder / MANIFEST, cls._from_json, "prepare the shards again")

    @classmethod
    def _from_json(cls, values: dict[str, Any]) -> "Manifest":
        version = values.pop("version")
        if version != _VERSION:
            raise InputError(f"version {version}: expected {_VERSION}")
        shards = [Shard(**shard) for shard in values.pop("shards")]
        heldout = values.pop("heldout")
        return cls(**values, shards=shards, heldout=Shard(**heldout) if heldout else None)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Hash of a tokenizer."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()[:16]


def write_shard(folder: Path, name: str, documents: Sequence[np.ndarray]) -> Shard:
    """Write documents as one shard; the file is there whole or not at all."""
    tokens = np.concatenate(documents)
    with atomic_write(folder / name) as file:
        np.save(file, tokens)
    return Shard(name, len(tokens), len(documents), file_digest(folder / name))


class ShardedTokens:
    """Shards one after the other as one stream, read from disk as it is needed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._arrays = [np.load(path, mmap_mode="r") for path in paths]
        self._ends = np.cumsum([len(array) for array in self._arrays])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, window: slice) -> np.ndarray:
        """Tokens `[start, stop)` `(stop - start,)`."""
        start, stop, _ = window.indices(len(self))
        first, last = np.searchsorted(self._ends, (start, max(start, stop - 1)), side="right")
        begin = int(self._ends[first - 1]) if first else 0
        arrays = self._arrays[first : last + 1]
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return joined[start - begin : stop - begin]


@dataclass(frozen=True)
class OpenShards:
    """Shards that were found whole.

    Attributes:
        train: Training tokens.
        heldout: Held-out tokens.
        digest: Hash of both and of the tokenizer.
    """

    train: ShardedTokens
    heldout: ShardedTokens
    digest: str


def open_shards(
    folder: Path, tokenizer: Tokenizer, cache: Path, *, skip_damaged: bool = False
) -> OpenShards:
    """Check the shards in `folder` and map them.

    Args:
        folder: Written by `python -m flash.data prepare`.
        tokenizer: Must be the one that they were made with.
        cache: Where it is noted that a file was found whole, so that it is hashed just once.
        skip_damaged: Leave damaged training shards out, with a warning.

    Raises:
        InputError: No shards, unfinished ones, ones of another tokenizer, or damaged ones.
    """
    manifest, heldout = _finished(folder, tokenizer)
    whole = []
    problems = _problems(folder, [*manifest.shards, heldout], cache)
    for shard in (*manifest.shards, heldout):
        problem = problems.get(shard.file)
        if problem is None:
            whole.append(shard)
        elif skip_damaged and shard is not heldout:
            log.warning("%s: %s and is left out", folder / shard.file, problem)
        else:
            raise InputError(
                f"{folder / shard.file}: {problem} ({len(problems)} such files); copy it again, "
                "or set data.skip_damaged=true to leave damaged training shards out"
            )
    train = whole[:-1]
    if not train:
        raise InputError(
            f"data.path={folder}: expected a whole shard of {len(manifest.shards)}, found none"
        )
    hashes = " ".join([manifest.tokenizer, *(shard.sha256 for shard in whole)])
    return OpenShards(
        ShardedTokens([folder / shard.file for shard in train]),
        ShardedTokens([folder / heldout.file]),
        hashlib.sha256(hashes.encode()).hexdigest()[:16],
    )


def _finished(folder: Path, tokenizer: Tokenizer) -> tuple[Manifest, Shard]:
    """The manifest of finished shards of this tokenizer, and the held-out one of them."""
    named = f"data.path={folder}"
    manifest = Manifest.read(folder)
    if manifest is None:
        raise InputError(
            f"{named}: expected a folder with {MANIFEST}; make it with "
            "`python -m flash.data prepare`"
        )
    if not manifest.complete or manifest.heldout is None:
        raise InputError(f"{named}: is not finished; run `python -m flash.data prepare` again")
    if manifest.tokenizer != tokenizer_digest(tokenizer):
        raise InputError(
            f"{named}: was made with another tokenizer than this backbone's; prepare it again "
            "with this backbone, or set data.tokenizer"
        )
    return manifest, manifest.heldout


def _problems(folder: Path, shards: Sequence[Shard], cache: Path) -> dict[str, str]:
    """What is wrong with the files that are not what the manifest says, by name."""
    notes = cache / f"whole_{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"
    known: dict[str, Any] = find_json(notes, dict, "check the shards again") or {}
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
