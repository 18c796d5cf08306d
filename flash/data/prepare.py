"""`python -m flash.data prepare`: a mixture tokenised ahead, into shards."""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from flash.data.encoders import TextEncoder
from flash.data.module import find_tokenizer
from flash.data.packed import token_type
from flash.data.settings import DataKind, DataSettings, PrepareSettings
from flash.data.shards import Manifest, Shard, tokenizer_digest, write_shard
from flash.data.stream import Corpus, Mixture, Side
from flash.data.tokenizer import load_tokenizer
from flash.errors import InputError, require
from flash.model.backbone import Backbone
from flash.paths import Runs
from flash.progress import progress_bar
from flash.records import digest, plain

if TYPE_CHECKING:
    from flash.data.sources import TextSource

log = logging.getLogger(__name__)

_TOGETHER = 256
"""Documents tokenised at a time, by as many threads as there are processors."""
_HELDOUT_TOKENS = 1 << 20
"""Held-out tokens kept, where they are a share of the documents."""


def prepare(settings: PrepareSettings) -> Path:
    """Write the shards, or those that are missing, and return their folder.

    Raises:
        InputError: Settings, tokenizer or data that cannot be used, or a folder of other shards.
    """
    data = settings.data
    require(data.source is DataKind.datasets, "data.source", data.source.value, "datasets")
    runs = Runs(Path(settings.runs))
    backbone = Backbone.open(settings.backbone)
    tokenizer = load_tokenizer(find_tokenizer(data, backbone.tokenizer, runs.tokens))
    from flash.data.sources import open_parts  # takes a second to import

    parts = open_parts(data)
    folder = Path(settings.out) if settings.out else runs.root / "shards" / data.name
    manifest = _manifest(settings, parts, tokenizer, folder)
    if manifest.complete:
        log.info("%s is finished: %s tokens", folder, f"{manifest.tokens:,}")
        return folder
    corpus = _corpus(settings, parts, tokenizer)
    dtype = token_type(tokenizer)
    if manifest.heldout is None:
        manifest.heldout = _write_heldout(folder, corpus, data, dtype)
        manifest.write(folder)
    _write_shards(folder, corpus, manifest, settings, dtype)
    log.info(
        "%s: %s tokens in %d shards; train with data=shards data.path=%s",
        folder,
        f"{manifest.tokens:,}",
        len(manifest.shards),
        folder,
    )
    return folder


def _corpus(settings: PrepareSettings, parts: "list[TextSource]", tokenizer: Tokenizer) -> Corpus:
    """What goes into the training shards: all in one lane."""
    data, encoder = settings.data, TextEncoder(tokenizer)
    return Corpus(
        parts=parts,
        encoder=encoder,
        seq_len=data.seq_len,
        end_of_text=encoder.end_of_text,
        seed=settings.seed,
        side=Side.all if data.heldout is not None else Side.train,
        heldout_percent=data.heldout_percent,
        once=settings.tokens is None,
    )


def _manifest(
    settings: PrepareSettings, parts: "list[TextSource]", tokenizer: Tokenizer, folder: Path
) -> Manifest:
    """What is there of these very shards, or an empty manifest.

    Raises:
        InputError: The folder holds other shards.
    """
    data: dict[str, Any] = plain(settings.data)
    chosen = {key: data[key] for key in ("parts", "heldout", "heldout_percent", "skip_damaged")}
    decisive = {
        **chosen,
        "files": [part.fingerprint for part in parts],
        "tokenizer": tokenizer_digest(tokenizer),
        "tokens": settings.tokens,
        "shard_tokens": settings.shard_tokens,
        "seed": settings.seed,
    }
    key = digest(decisive)
    manifest = Manifest.read(folder)
    if manifest is None:
        return Manifest(key, tokenizer_digest(tokenizer), data=chosen)
    if manifest.key != key:
        raise InputError(
            f"out={folder}: holds shards of other data, tokenizer or settings; choose another "
            "folder, or delete it"
        )
    return manifest


def _write_heldout(folder: Path, corpus: Corpus, data: DataSettings, dtype: type) -> Shard:
    if data.heldout is not None:
        from flash.data.sources import TextSource

        part = TextSource(data.heldout, "data.heldout", skip_damaged=data.skip_damaged)
        source = dataclasses.replace(corpus, parts=[part], side=Side.all, once=True)
    else:
        source = dataclasses.replace(corpus, side=Side.heldout, once=True)
    mixture = Mixture(source, lane=0)
    documents: list[np.ndarray] = []
    count = 0
    while taken := mixture.take(_TOGETHER if data.heldout is not None else 1):
        documents += [document.tokens.astype(dtype) for document in taken]
        count += sum(map(len, taken))
        if data.heldout is None and count >= _HELDOUT_TOKENS:
            break
    if not documents:
        raise InputError(
            f"data.heldout_percent={data.heldout_percent}: holds out no document; expected a "
            "larger share, or data.heldout"
        )
    return write_shard(folder, "heldout.npy", documents)


def _write_shards(
    folder: Path, corpus: Corpus, manifest: Manifest, settings: PrepareSettings, dtype: type
) -> None:
    """Training shards from where the manifest stands; it is written after each."""
    state = np.array(manifest.state, np.int64) if manifest.state is not None else None
    mixture = Mixture(corpus, lane=0, state=state)
    wanted = settings.tokens
    with progress_bar("tokenising", wanted, " tokens") as bar:
        bar.update(manifest.tokens)
        while not manifest.complete:
            documents: list[np.ndarray] = []
            count, ended = 0, False
            limit = settings.shard_tokens
            if wanted is not None:
                limit = min(limit, wanted - manifest.tokens)
            while count < limit and not ended:
                taken = mixture.take(_TOGETHER)
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
                raise InputError("data.parts: 0 tokens are left without held-out documents")
            manifest.write(folder)
