"""Conversion of a tokenizer.json to the fields of a GGUF file.

llama.cpp does not read the rules of a pre-tokenizer. It knows some pre-tokenizers by name and has
code for each. A byte-level BPE tokenizer can therefore be written only if its pre-tokenizer is one
of those: under the nearest name llama.cpp would split text into other tokens than those that the
model was trained on.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from flash.errors import InputError, require, shown
from flash.model.tokenizer import ModelTokenizer
from flash.model.tokenizer_json import added_tokens

log = logging.getLogger(__name__)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    ("gpt-2", False): "gpt-2",
    ("digits gpt-2", False): "smollm",
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "smaug-bpe",
    (_QWEN2, False): "qwen2",
    (_GPT4O, False): "gpt-4o",
}
"""llama.cpp's names of pre-tokenizers, by splitting pattern and `ignore_merges`.

With `ignore_merges` a piece that is in the vocabulary as a whole becomes one token without merging.
"""
PATTERNS_BY_NAME = {name: pattern for (pattern, _), name in _PRE_TOKENIZERS.items()}
"""Splitting pattern of each of llama.cpp's names of pre-tokenizers."""
KNOWN_PRE_TOKENIZERS = "that of GPT-2, SmolLM, Llama 3, Qwen2 or GPT-4o"
"""The keys of `_PRE_TOKENIZERS` in words, for messages."""


class TokenType(IntEnum):
    """Kinds of token in llama.cpp."""

    normal = 1
    control = 3
    user_defined = 4
    unused = 5


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokenizer fields of a GGUF file.

    Attributes:
        tokens: Text of every id, in the byte-level alphabet; added tokens in plain text.
        types: Kind of every id.
        merges: Pairs in order of priority, each joined by a blank.
        pre: llama.cpp's name of the pre-tokenizer.
        bos_id: Token that begins a text.
        eos_id: First token that ends a generation.
        eot_id: Last one, if there are several; the end of a turn after instruction tuning.
        eom_id: Another one, if there are three.
        pad_id: Token for padding.
        add_bos: Whether encoding puts `bos_id` in front.
        add_eos: Whether encoding puts `eos_id` at the end.
        chat_template: Jinja source; None if the tokenizer's folder has no template.
    """

    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    pre: str
    bos_id: int
    eos_id: int
    eot_id: int | None
    eom_id: int | None
    pad_id: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_vocabulary(tokenizer: ModelTokenizer, vocab_size: int) -> Vocabulary:
    """Convert a tokenizer for a model of `vocab_size` entries.

    A GGUF file names up to three tokens that end a generation.

    Args:
        tokenizer: Tokenizer of the model.
        vocab_size: Rows of the model's embedding; rows without a token get a name and the kind
            `unused`.

    Raises:
        InputError: It is not a byte-level BPE tokenizer, llama.cpp does not know its
            pre-tokenizer, or it does not fit the model.
    """
    path = tokenizer.path
    values = json.loads(path.read_text("utf-8"))
    pre = pre_tokenizer_name(path)
    tokens, types = _tokens(values, vocab_size, path)
    prefix, suffix = added_tokens(tokenizer.backend)
    require(len(prefix) <= 1, f"{path}: post_processor", prefix, "at most one token in front")
    require(len(suffix) <= 1, f"{path}: post_processor", suffix, "at most one token after")
    # llama.cpp adds eos_token_id where a tokenizer adds an end.
    eos, *others = dict.fromkeys([*suffix, *tokenizer.ends])
    if len(others) > 2:
        left_out = [str(tokenizer.backend.id_to_token(i)) for i in others[1:-1]]
        log.warning("GGUF names three end tokens at most; %s are left out", ", ".join(left_out))
    bos = tokenizer.begin if tokenizer.begin is not None else eos
    for name, token_id in (("eos_token_id", eos), ("bos_token_id", bos)):
        require(0 <= token_id < vocab_size, name, token_id, f"an id below {vocab_size}")
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[m if isinstance(m, str) else " ".join(m) for m in values["model"]["merges"]],
        pre=pre,
        bos_id=bos,
        eos_id=eos,
        eot_id=others[-1] if others else None,
        eom_id=others[0] if len(others) > 1 else None,
        pad_id=tokenizer.pad,
        add_bos=bool(prefix),
        add_eos=bool(suffix),
        chat_template=tokenizer.chat_template,
    )


def pre_tokenizer_name(path: Path) -> str:
    """Return llama.cpp's name of the pre-tokenizer of a tokenizer.json.

    Raises:
        InputError: The tokenizer is not byte-level BPE, or llama.cpp does not know its
            pre-tokenizer.
    """
    values = json.loads(path.read_text("utf-8"))
    model = values["model"]
    for key, wanted in {"type": "BPE", "byte_fallback": False, "dropout": None}.items():
        found = model.get(key, wanted)
        require(
            found == wanted,
            f"{path}: model.{key}",
            found,
            f"{shown(wanted)}; not supported in GGUF",
        )
    normalizer = (values.get("normalizer") or {}).get("type")
    # llama.cpp leaves Qwen's composition of accents out; text is nearly always composed already.
    require(normalizer in (None, "NFC"), f"{path}: normalizer", normalizer, "none or NFC")
    pattern = _pattern(values.get("pre_tokenizer") or {})
    ignores = bool(model.get("ignore_merges", False))
    name = _PRE_TOKENIZERS.get((pattern, ignores))
    if name is None:
        raise InputError(
            f"{path}: pre_tokenizer={pattern!r} with ignore_merges={shown(ignores)}: expected "
            f"{KNOWN_PRE_TOKENIZERS}, since llama.cpp knows no other; "
            "formats.gguf_tokenizer=false writes token ids only"
        )
    return name


def is_qwen2(path: Path) -> bool:
    """Return True if a tokenizer.json splits text as Qwen2's does."""
    values = json.loads(path.read_text("utf-8"))
    return _pattern(values.get("pre_tokenizer") or {}) == _QWEN2


def _pattern(pre: Mapping[str, Any]) -> str:
    """The splitting regular expression, a word for a built-in one, or JSON for any other rule."""
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    kinds = [step.get("type") for step in steps]
    if kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space", True):
        uses_regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and uses_regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and uses_regex and steps[0].get("individual_digits"):
            return "digits gpt-2"
        if kinds == ["Split", "ByteLevel"] and not uses_regex and _isolates(steps[0]):
            return steps[0]["pattern"]["Regex"]
    return json.dumps(pre)


def _isolates(split: Mapping[str, Any]) -> bool:
    """Return True if each match of the regular expression becomes a piece of its own."""
    isolated = split.get("behavior") == "Isolated" and not split.get("invert", False)
    return isolated and "Regex" in split["pattern"]


def _tokens(
    values: Mapping[str, Any], vocab_size: int, path: Path
) -> tuple[list[str], list[TokenType]]:
    """Texts and kinds of all ids from 0 to `vocab_size` - 1."""
    tokens: dict[int, str] = {i: token for token, i in values["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.normal)
    for added in values.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.control if added["special"] else TokenType.user_defined
    most = max(tokens) + 1
    require(most <= vocab_size, f"{path}: size", most, f"at most arch.vocab_size={vocab_size}")
    for i in range(vocab_size):
        if i not in tokens:
            tokens[i], types[i] = f"[PAD{i}]", TokenType.unused
    double = len(tokens) - len(set(tokens.values()))
    require(double == 0, f"{path}: tokens of the same text", double, "none; llama.cpp would stop")
    return [tokens[i] for i in range(vocab_size)], [types[i] for i in range(vocab_size)]
