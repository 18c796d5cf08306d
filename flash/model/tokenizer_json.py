"""A tokenizer.json: its vocabulary, and what it puts around a text.

The `tokenizers` library runs the file; its parts are read where the library has no function.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from flash.errors import InputError, require

_MODELS = ("BPE", "Unigram")
_MOST_IDS = 2**24
"""Bound of the ids, far above that of any model: the library writes a line for each hole."""
_TEMPLATES = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")


def read_backend(path: Path, key: str = "") -> Tokenizer:
    """Read a tokenizer.json, without its truncation and padding.

    Args:
        path: The file.
        key: Text before the path in errors, such as `data.tokenizer=`.

    Raises:
        InputError: The file is missing or damaged, or is neither BPE nor Unigram.
    """
    if not path.is_file():
        raise InputError(f"{key}{path}: no such file; expected a tokenizer.json")
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for damaged files
        raise InputError(f"{key}{path}: damaged ({error}); copy it again") from error
    kind = type(backend.model).__name__
    # Other kinds drop the spaces between words, so text cannot be restored from their tokens.
    require(kind in _MODELS, f"{key}{path}: model.type", kind, " or ".join(_MODELS))
    require(backend.get_vocab_size() > 0, f"{key}{path}: model.vocab", {}, "one token or more")
    largest = max(backend.get_vocab().values())
    good = f"an id below {_MOST_IDS:,}"
    require(largest < _MOST_IDS, f"{key}{path}: model.vocab", largest, good)
    backend.no_truncation()
    backend.no_padding()
    return backend


def added_tokens(backend: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special tokens that encoding puts before and after a text.

    Raises:
        InputError: The post-processor has no place for the text, or adds unknown tokens.
    """
    processor = json.loads(backend.to_str()).get("post_processor")
    prefix: list[int] = []
    suffix: list[int] = []
    for step in processors(processor):
        if step["type"] == "TemplateProcessing":
            pieces = [piece.get("SpecialToken") for piece in step["single"]]
            texts = [piece["Sequence"]["id"] for piece in step["single"] if "Sequence" in piece]
            require(texts == ["A"], "post_processor.single", step["single"], "the text A, once")
            text = pieces.index(None)
            before, after = (
                [i for piece in part for i in step["special_tokens"][piece["id"]]["ids"]]
                for part in (pieces[:text], pieces[text + 1 :])
            )
        elif step["type"] in _TEMPLATES:  # that of BERT or RoBERTa: pairs of text and id
            before, after = [step["cls"][1]], [step["sep"][1]]
        else:
            continue
        prefix, suffix = [*before, *prefix], [*suffix, *after]
    for i in (*prefix, *suffix):
        known = backend.id_to_token(i) is not None
        require(known, "post_processor", i, "ids of tokens of the vocabulary")
    return tuple(prefix), tuple(suffix)


def processors(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Steps of a post-processor, in order."""
    if processor is None:
        return []
    if processor["type"] != "Sequence":
        return [processor]
    return [step for member in processor["processors"] for step in processors(member)]


def with_begin(
    backend: Tokenizer, begin: int | None, suffix: tuple[int, ...], file: str, wanted: bool
) -> Tokenizer:
    """Copy a tokenizer with another rule about begin-of-text; `suffix` stays."""
    if begin is None:
        raise InputError(
            f"data.begin_of_text=true: {file} and the files beside it name no bos_token; leave it "
            "null"
        )
    values = json.loads(backend.to_str())
    names = {i: backend.id_to_token(i) for i in (begin, *suffix)}

    def piece(number: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": names[begin], "type_id": 0}}] if wanted else []
        after = [{"SpecialToken": {"id": names[i], "type_id": 0}} for i in suffix]
        return [*before, {"Sequence": {"id": "AB"[number], "type_id": number}}, *after]

    template = {
        "type": "TemplateProcessing",
        "single": piece(0),
        "pair": [*piece(0), *piece(1)],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()
        },
    }
    steps = processors(values.get("post_processor"))
    kept = [step for step in steps if step["type"] not in _TEMPLATES]
    values["post_processor"] = {"type": "Sequence", "processors": [*kept, template]}
    return Tokenizer.from_str(json.dumps(values))


def vocabulary_bytes(backend: Tokenizer) -> Iterator[tuple[int, int]]:
    """Yield each token id with the number of UTF-8 bytes of text that it stands for.

    Special tokens stand for none. The blank that some tokenizers put in front of a text counts as
    one byte, and so does what a normalizer adds.
    """
    values = json.loads(backend.to_str())
    steps = [*pipeline_steps(values.get("decoder")), *pipeline_steps(values.get("pre_tokenizer"))]
    kinds = {step["type"] for step in steps}
    blanks = {step["replacement"] for step in steps if step["type"] == "Metaspace"}
    blanks |= {step["pattern"]["String"] for step in steps if _makes_blank(step)}
    suffix = next((step["suffix"] for step in steps if step["type"] == "BPEDecoder"), "")
    fallback = bool(values["model"].get("byte_fallback"))
    added = backend.get_added_tokens_decoder()
    for token, token_id in backend.get_vocab().items():
        if token_id in added:
            length = 0 if added[token_id].special else len(token.encode())
        elif "ByteLevel" in kinds:
            length = len(token)  # each character of the byte-level alphabet is a byte
        elif fallback and _is_byte(token):
            length = 1
        else:
            text = token.removesuffix(suffix) + " " if suffix and token.endswith(suffix) else token
            for blank in blanks:
                text = text.replace(blank, " ")
            length = len(text.encode())
        yield token_id, length


def pipeline_steps(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Steps of a decoder or pre-tokenizer, in order."""
    if component is None:
        return []
    members = component.get("decoders", component.get("pretokenizers"))
    if component["type"] != "Sequence" or members is None:
        return [component]
    return [step for member in members for step in pipeline_steps(member)]


def _makes_blank(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and step["content"] == " " and "String" in step["pattern"]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
