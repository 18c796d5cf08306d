"""Entry point of `flash prepare`: tokenize a mixture of text into shards, ahead of training."""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flash.data.corpus import find_tokenizer, known_tokenizer
from flash.data.encoders import TextEncoder
from flash.data.factory import check_present
from flash.data.mixture import Mixture, Split, StreamedSequences
from flash.data.packed import token_type
from flash.data.settings import DataKind, DataSettings, PrepareSettings
from flash.data.shards import Manifest, Shard, problems_of, write_shard
from flash.data.tokenizer import load_tokenizer
from flash.errors import InputError, require
from flash.model.backbone import Backbone
from flash.model.tokenizer import ModelTokenizer
from flash.paths import Runs
from flash.progress import progress_bar
from flash.records import digest, locked, plain, remove_leftovers

if TYPE_CHECKING:
    from flash.data.sources import TextSource

log = logging.getLogger(__name__)

_DOCUMENTS_AT_ONCE = 256
"""Number of documents that are tokenized in parallel, by one thread per processor."""
_VALIDATION_TOKENS = 1 << 20
"""Number of tokens after which a validation split by percent ends; fewer if the text ends."""


def check(settings: PrepareSettings) -> None:
    """Check what the shards are made of, without reading text.

    Raises:
        InputError: Settings, tokenizer or data cannot be used.
    """
    data = settings.data
    require(data.kind is DataKind.datasets, "data.kind", data.kind.value, "datasets")
    path = known_tokenizer(data, Backbone.open(settings.backbone).tokenizer)
    assert path is not None  # one is trained for other kinds only
    check_present(data, load_tokenizer(path, data))


def prepare(settings: PrepareSettings) -> Path:
    """Write the missing shards and return their folder.

    Raises:
        InputError: Settings, tokenizer or data cannot be used, or the folder holds other shards or
            damaged ones.
    """
    check(settings)
    data = settings.data
    runs = Runs(Path(settings.runs))
    backbone = Backbone.open(settings.backbone)
    tokenizer = load_tokenizer(find_tokenizer(data, backbone.tokenizer, runs.tokens), data)
    from flash.data.sources import open_sources  # takes a second to import

    sources = open_sources(data)
    folder = Path(settings.out) if settings.out else runs.root / "shards" / data.name
    with locked(folder / ".lock", lambda: log.info("%s: waits for another command", folder)):
        remove_leftovers(folder)
        _write_missing(settings, sources, tokenizer, folder, runs.tokens)
    return folder


def _write_missing(
    settings: PrepareSettings,
    sources: "list[TextSource]",
    tokenizer: ModelTokenizer,
    folder: Path,
    cache: Path,
) -> None:
    data = settings.data
    manifest = _manifest(settings, sources, tokenizer, folder)
    _check_written(folder, manifest, cache)
    if manifest.complete:
        log.info("%s is finished: %s tokens", folder, f"{manifest.tokens:,}")
        return
    train = _training_split(settings, sources, tokenizer)
    dtype = token_type(tokenizer)
    if manifest.validation is None:
        manifest.validation = _write_validation(folder, train, data, dtype)
        manifest.write(folder)
    _write_shards(folder, train, manifest, settings, dtype)
    log.info(
        "%s: %s tokens in %d shards; train with data=shards data.path=%s",
        folder,
        f"{manifest.tokens:,}",
        len(manifest.shards),
        folder,
    )


def _check_written(folder: Path, manifest: Manifest, cache: Path) -> None:
    """Check the shards that are there already.

    Raises:
        InputError: One is missing or damaged.
    """
    written = [*manifest.shards, *filter(None, [manifest.validation])]
    for file, problem in problems_of(folder, written, cache).items():
        raise InputError(
            f"{folder / file}: {problem}; copy it again, or delete {folder} to prepare it again"
        )


def _training_split(
    settings: PrepareSettings, sources: "list[TextSource]", tokenizer: ModelTokenizer
) -> StreamedSequences:
    """Open the training split of the mixture, as one logical shard."""
    data, encoder = settings.data, TextEncoder(tokenizer)
    return StreamedSequences(
        sources=sources,
        encoder=encoder,
        seq_len=data.seq_len,
        end_of_text=tokenizer.end_of_text,
        seed=settings.seed,
        split=Split.all if data.validation is not None else Split.train,
        validation_percent=data.validation_percent,
        single_pass=settings.tokens is None,
    )


def _manifest(
    settings: PrepareSettings, sources: "list[TextSource]", tokenizer: ModelTokenizer, folder: Path
) -> Manifest:
    """Read the manifest of the shards; a new one if the folder has none.

    Raises:
        InputError: The folder holds other shards.
    """
    data: dict[str, Any] = plain(settings.data)
    keys = ("sources", "validation", "validation_percent", "skip_damaged")
    chosen = {key: data[key] for key in keys}
    separate = _separate(settings.data)
    decisive = {
        "data": settings.data.decisive_for_tokens(),
        "skip_damaged": data["skip_damaged"],
        "files": [source.fingerprint for source in sources],
        "validation": separate.fingerprint if separate is not None else None,
        "tokenizer": tokenizer.digest,
        "tokens": settings.tokens,
        "shard_tokens": settings.shard_tokens,
        "seed": settings.seed,
    }
    if any(source.reads_lines for source in sources):
        decisive["rows"] = 2  # blank lines have not always been left out
    key = digest(decisive)
    manifest = Manifest.read(folder)
    if manifest is None:
        return Manifest(key, tokenizer.digest, data=chosen)
    if manifest.key != key:
        raise InputError(
            f"out={folder}: holds shards of other data, tokenizer or settings; choose another "
            "folder, or delete it"
        )
    return manifest


def _separate(data: DataSettings) -> "TextSource | None":
    """Open the text of the validation split, where it is separate from the training text."""
    from flash.data.sources import TextSource

    if data.validation is None:
        return None
    return TextSource(data.validation, "data.validation", skip_damaged=data.skip_damaged)


def _write_validation(
    folder: Path, train: StreamedSequences, data: DataSettings, dtype: type
) -> Shard:
    source = _separate(data)
    if source is not None:
        split = dataclasses.replace(train, sources=[source], split=Split.all, single_pass=True)
    else:
        split = dataclasses.replace(train, split=Split.validation, single_pass=True)
    mixture = Mixture(split, shard=0)
    documents: list[np.ndarray] = []
    count = 0
    while taken := mixture.take(_DOCUMENTS_AT_ONCE if source is not None else 1):
        documents += [document.tokens.astype(dtype) for document in taken]
        count += sum(map(len, taken))
        if source is None and count >= _VALIDATION_TOKENS:
            break
    if not documents and data.validation is not None:
        raise InputError(f"data.validation.path={data.validation.path}: has 0 documents with text")
    if not documents:
        raise InputError(
            f"data.validation_percent={data.validation_percent}: leaves the validation split "
            "without a document; expected a larger share, or data.validation"
        )
    return write_shard(folder, "validation.npy", documents)


def _write_shards(
    folder: Path,
    train: StreamedSequences,
    manifest: Manifest,
    settings: PrepareSettings,
    dtype: type,
) -> None:
    """Write the training shards that the manifest lacks, and the manifest after each.

    Raises:
        InputError: The training split has no text.
    """
    state = np.array(manifest.state, np.int64) if manifest.state is not None else None
    mixture = Mixture(train, shard=0, state=state)
    wanted = settings.tokens
    with progress_bar("tokenizing", wanted, " tokens") as bar:
        bar.update(manifest.tokens)
        while not manifest.complete:
            documents: list[np.ndarray] = []
            count, ended = 0, False
            limit = settings.shard_tokens
            if wanted is not None:
                limit = min(limit, wanted - manifest.tokens)
            while count < limit and not ended:
                taken = mixture.take(_DOCUMENTS_AT_ONCE)
                documents += [document.tokens.astype(dtype) for document in taken]
                count += sum(map(len, taken))
                ended = not taken
                bar.update(sum(map(len, taken)))
            if documents:
                name = f"train_{len(manifest.shards):05d}.npy"
                manifest.shards.append(write_shard(folder, name, documents))
            manifest.state = mixture.state.tolist()
            manifest.complete = ended or (wanted is not None and manifest.tokens >= wanted)
            if manifest.complete and not manifest.shards:
                raise InputError(
                    "data.sources: 0 tokens are left without the documents of the validation "
                    "split; expected more text, or a smaller data.validation_percent"
                )
            manifest.write(folder)
