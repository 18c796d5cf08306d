"""Cut of a vocabulary: fewer tokens of a byte-level BPE, and the rows of a backbone that stay.

A token that no text needs still has a row in the embedding and in the output head, and every decode
step reads the whole head. Kept are special tokens, the bytes, and the merged tokens that a text
uses most. A token is used where it stands in the text and where a longer one was merged from it, so
that the parts of a kept token are used at least as often, and stay too. Tokens keep their order.

The backbone with the rows that stay is a backbone of its own. As a teacher its distribution is the
original's over the kept tokens.
"""

import copy
import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer

from flash.errors import InputError
from flash.model.checkpoint import expected_shapes, save
from flash.model.tokenizer import (
    CHAT_TEMPLATE,
    GENERATION_CONFIG,
    OTHER_TEMPLATES,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    ModelTokenizer,
    copy_beside,
    read_json,
)
from flash.model.tokenizer_json import pipeline_steps, processors
from flash.model.weights import Weights

Document = dict[str, Any]
"""Content of a tokenizer.json."""
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def kept_tokens(
    tokenizer: ModelTokenizer, size: int, counts: Int[np.ndarray, " tokens"]
) -> list[int]:
    """Choose the tokens of a smaller vocabulary.

    Args:
        tokenizer: The whole tokenizer.
        size: Number of tokens to keep.
        counts: Number of times that each token stands in a text, by id. Tokens that are used
            equally often stay in the order in which the tokenizer learned them.

    Returns:
        Their ids, ascending.

    Raises:
        InputError: The tokenizer is no byte-level BPE, or the size is beyond what can be kept.
    """
    forced, free = check_size(tokenizer, size)
    document = _byte_level(tokenizer)
    vocabulary: dict[str, int] = document["model"]["vocab"]
    ranks = {vocabulary[token]: rank for rank, token in enumerate(_parts(document))}
    used, last = _used(document, counts), len(ranks)
    free.sort(key=lambda i: (-used[i], ranks.get(i, last), i))
    return sorted([*forced, *free[: size - len(forced)]])


def check_size(tokenizer: ModelTokenizer, size: int) -> tuple[set[int], list[int]]:
    """Check that a vocabulary can be cut to this size.

    Returns:
        Ids of the tokens that stay in any case, and those of all others.

    Raises:
        InputError: The tokenizer is no byte-level BPE, or the size is beyond what can be kept.
    """
    document = _byte_level(tokenizer)
    vocabulary: dict[str, int] = document["model"]["vocab"]
    forced = {token["id"] for token in document["added_tokens"]}
    every = set(vocabulary.values()) | forced
    named = {tokenizer.end_of_text, *tokenizer.ends, *tokenizer.prefix, tokenizer.begin}
    named |= {tokenizer.pad, _unknown(document), *_added_by(document["post_processor"])}
    forced |= {i for i in named if i in every}
    forced |= {i for token, i in vocabulary.items() if len(token) == 1}
    if not len(forced) <= size <= len(every):
        raise InputError(
            f"vocab_size={size}: expected {len(forced)} (special tokens and bytes) to "
            f"{len(every)}, the number of tokens in {tokenizer.path}"
        )
    return forced, sorted(every - forced)


def same_tokens(tokenizer: ModelTokenizer, cut: ModelTokenizer, size: int) -> list[int]:
    """Find the tokens of a smaller vocabulary in the whole one.

    Args:
        tokenizer: The whole tokenizer.
        cut: One that was cut out of it.
        size: Tokens of the smaller vocabulary.

    Returns:
        Their ids there, ascending.

    Raises:
        InputError: The smaller one was not cut out of the whole one.
    """
    tokens = [cut.backend.id_to_token(i) for i in range(size)]
    ids = [tokenizer.backend.token_to_id(token) for token in tokens if token is not None]
    known = [i for i in ids if i is not None]
    if len(known) != size or known != sorted(set(known)):
        raise InputError(
            f"{cut.path}: expected {size} tokens that were cut out of {tokenizer.path}, in their "
            "order there"
        )
    return known


def _used(document: Document, counts: Int[np.ndarray, " tokens"]) -> Int[np.ndarray, " tokens"]:
    """Number of uses of each token: in the text, and as a part of longer tokens."""
    vocabulary: dict[str, int] = document["model"]["vocab"]
    used = np.zeros(1 + max([*vocabulary.values(), len(counts) - 1]), dtype=np.int64)
    used[: len(counts)] = counts
    for token, parts in reversed(_parts(document).items()):  # learned after their parts
        for part in parts:
            used[vocabulary[part]] += used[vocabulary[token]]
    return used


def cut_tokenizer(tokenizer: ModelTokenizer, kept: Sequence[int], folder: Path) -> ModelTokenizer:
    """Write a tokenizer with the kept tokens only, and the files beside it.

    Every text decodes to what it decoded to before. A text that would need a missing token is cut
    into shorter ones.

    Args:
        tokenizer: The whole tokenizer.
        kept: Ids of the tokens to keep, ascending, as from `kept_tokens`; their places are the new
            ids.
        folder: Folder to write to.

    Returns:
        The new tokenizer.
    """
    new = {old: i for i, old in enumerate(kept)}
    document = _with_ids(_byte_level(tokenizer), new)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    _write_beside(tokenizer.path.parent, folder, new)
    backend = Tokenizer.from_file(str(path))
    backend.no_truncation()
    backend.no_padding()

    def renamed(i: int | None) -> int | None:
        return None if i is None else new.get(i)  # files may name ids that are no tokens

    return dataclasses.replace(
        tokenizer,
        backend=backend,
        path=path,
        end_of_text=new[tokenizer.end_of_text],
        ends=tuple(new[i] for i in tokenizer.ends if i in new),
        prefix=tuple(new[i] for i in tokenizer.prefix),
        begin=renamed(tokenizer.begin),
        pad=renamed(tokenizer.pad),
    )


def cut_backbone(
    source: Path, tokenizer: ModelTokenizer, kept: Sequence[int], folder: Path
) -> None:
    """Write a backbone with the rows of the kept tokens only, and its tokenizer.

    Args:
        source: Folder of the whole backbone.
        tokenizer: Its tokenizer.
        kept: Ids of the tokens to keep, ascending.
        folder: Folder to write, whole or not at all.

    Raises:
        InputError: A file of the backbone is damaged, or lacks a row of a token.
    """
    weights = Weights(source)
    tokenizer.require_fits(weights.spec.vocab_size)
    spec, rows = weights.spec.replace(vocab_size=len(kept)), torch.tensor(kept)
    tensors = {
        name: weights.read(name, rows if name in _TABLES else None)
        for name in expected_shapes(spec)
    }
    with tempfile.TemporaryDirectory(prefix="flash-") as temporary:
        cut = cut_tokenizer(tokenizer, kept, Path(temporary))
        save(folder, spec, tensors, tokenizer=cut)


def _byte_level(tokenizer: ModelTokenizer) -> Document:
    """The content of a tokenizer.json, with the rules that the tokenizer in use has.

    Raises:
        InputError: It is no byte-level BPE.
    """
    document: Document = json.loads(tokenizer.backend.to_str())
    kinds = [
        document["model"]["type"],
        *(step["type"] for step in pipeline_steps(document["decoder"])),
    ]
    if kinds[0] != "BPE" or "ByteLevel" not in kinds:
        raise InputError(
            f"vocab_size: expected the whole vocabulary, as {tokenizer.path} is of the kind "
            f"{' with '.join(kinds)}, and only that of a byte-level BPE can be cut"
        )
    return document


def _merges(document: Document) -> list[tuple[str, str]]:
    """Merges in the order in which they were learned; former files have them as one text."""
    merges = document["model"]["merges"]
    pairs = (each.split(" ") if isinstance(each, str) else each for each in merges)
    return [(a, b) for a, b in pairs]


def _parts(document: Document) -> dict[str, tuple[str, str]]:
    """The parts of each merged token, in the order in which they were learned."""
    parts: dict[str, tuple[str, str]] = {}
    for a, b in _merges(document):
        parts.setdefault(a + b, (a, b))
    return parts


def _unknown(document: Document) -> int | None:
    token = document["model"].get("unk_token")
    return document["model"]["vocab"].get(token) if token is not None else None


def _with_ids(document: Document, new: Mapping[int, int]) -> Document:
    """A tokenizer.json with the tokens of `new` only, under their new ids."""
    model = document["model"]
    vocabulary = {token: new[i] for token, i in model["vocab"].items() if i in new}
    added = [{**token, "id": new[token["id"]]} for token in document["added_tokens"]]
    # The library gives added tokens the ids behind the vocabulary, unless they are a part of it.
    vocabulary |= {token["content"]: token["id"] for token in added}
    merges = [
        [a, b]
        for a, b in _merges(document)
        if a in vocabulary and b in vocabulary and a + b in vocabulary
    ]
    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    return {
        **document,
        "added_tokens": added,
        "model": {**model, "vocab": ordered, "merges": merges},
        "post_processor": _renumbered(document["post_processor"], new),
    }


def _added_by(processor: Any) -> set[int]:
    """Ids of the tokens that a post-processor names."""
    found: set[int] = set()
    for part in processors(processor):
        for token in (part.get("special_tokens") or {}).values():
            found.update(token["ids"])
        found.update(part[name][1] for name in ("sep", "cls") if name in part)
    return found


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with new ids of the tokens that it adds."""
    changed = copy.deepcopy(processor)
    for part in processors(changed):
        for token in (part.get("special_tokens") or {}).values():
            token["ids"] = [new[i] for i in token["ids"]]
        for name in ("sep", "cls"):
            if name in part:
                part[name] = [part[name][0], new[part[name][1]]]
    return changed


def _write_beside(source: Path, folder: Path, new: Mapping[int, int]) -> None:
    """Write the files beside a tokenizer.json, with new ids."""
    for name in (SPECIAL_TOKENS_MAP, CHAT_TEMPLATE, OTHER_TEMPLATES):
        copy_beside(source, folder, name)
    config = read_json(source / TOKENIZER_CONFIG)
    if "added_tokens_decoder" in config:
        known = config["added_tokens_decoder"]
        config["added_tokens_decoder"] = {
            str(new[int(i)]): token for i, token in known.items() if int(i) in new
        }
    generation = read_json(source / GENERATION_CONFIG)
    for name in [name for name in generation if name.endswith("_token_id")]:
        del generation[name]  # the model's folder gets those of the tokenizer
    for name, values in ((TOKENIZER_CONFIG, config), (GENERATION_CONFIG, generation)):
        if values:
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")
