"""Tokenizer of a model's folder: the one reader of the files beside a tokenizer.json.

Other parts of the product ask here for special tokens, for the token between documents, for
begin-of-text and for the chat template, and write them with `ModelTokenizer.write`.

- End tokens are a set: `eos_token_id` of generation_config.json, then of config.json, then the
  `eos_token` of tokenizer_config.json. This is the order in which `generate` of transformers looks,
  which stops at the first file that exists; a set loses none of them.
- Documents begin with the tokens that the post-processor of tokenizer.json puts in front of a text.
  transformers does so too, and ignores `add_bos_token` where there is a tokenizer.json.
- Truncation and padding in tokenizer.json are switched off, as in transformers.
"""

import dataclasses
import hashlib
import json
import logging
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from flash.errors import InputError, require, under
from flash.model.tokenizer_json import added_tokens, read_backend, with_begin

log = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
"""Token that ends each document with the tokenizers that flash trains."""

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
OTHER_TEMPLATES = "additional_chat_templates"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


@dataclass(frozen=True, kw_only=True)
class ModelTokenizer:
    """Tokenizer with its special tokens and chat template.

    Attributes:
        backend: Tokenizer of the library; encodes without truncation and padding.
        path: The tokenizer.json.
        end_of_text: Token that follows each document.
        ends: Tokens that end a generation; at least one.
        begin: Token that begins a text, as the files name it, also if encoding adds none.
        prefix: Tokens that encoding puts in front of a text; mostly none, or `begin`.
        pad: Token for padding.
        special: Special tokens by name, such as `bos_token`, which chat templates may use.
        chat_template: Jinja source of the chat template.
        taught: Whether training taught `chat_template`, so that it replaces that of the files.
    """

    backend: Tokenizer
    path: Path
    end_of_text: int
    ends: tuple[int, ...]
    begin: int | None
    prefix: tuple[int, ...]
    pad: int | None
    special: dict[str, str]
    chat_template: str | None
    taught: bool = False

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        end_of_text: str | None = None,
        begin_of_text: bool | None = None,
        key: str = "",
    ) -> "ModelTokenizer":
        """Read a tokenizer.json and the files beside it.

        Args:
            path: The tokenizer.json.
            end_of_text: Token that follows each document. None: the one that the post-processor
                adds, else `eos_token`, else the first end token.
            begin_of_text: Whether encoding puts the begin-of-text token in front. None: as
                tokenizer.json does.
            key: Text before the path in errors, such as `data.tokenizer=`.

        Raises:
            InputError: A file is damaged, or names no end-of-text or begin-of-text token.
        """
        backend = read_backend(path, key)
        files = _Files(path, backend)
        with under(f"{key}{path}", ": "):
            prefix, suffix = added_tokens(backend)
        begin = prefix[0] if prefix else files.first_id("bos_token")
        if begin_of_text is not None and begin_of_text != bool(prefix):
            backend = with_begin(backend, begin, suffix, f"{key}{path}", begin_of_text)
            prefix = (begin,) if begin_of_text and begin is not None else ()
        ends = [*files.ids("eos_token"), *suffix[-1:]]
        if not ends and end_of_text is None:
            ends = [i for i in [backend.token_to_id(END_OF_TEXT)] if i is not None]
        named = files.named.get("eos_token")
        end = next((found for found in (*suffix[-1:], named, *ends) if found is not None), None)
        if end_of_text is not None:
            end = _chosen_end(end_of_text, backend, path)
        if end is None:
            raise InputError(
                f"{key}{path}: neither it nor {TOKENIZER_CONFIG}, config.json or "
                f"{GENERATION_CONFIG} beside it names an end-of-text token; set data.end_of_text "
                "to the token that ends a document"
            )
        return cls(
            backend=backend,
            path=path,
            end_of_text=end,
            ends=tuple(dict.fromkeys([*ends, end])),
            begin=begin,
            prefix=prefix,
            pad=files.first_id("pad_token"),
            special=files.special({"bos_token": begin, "eos_token": end}),
            chat_template=files.chat_template(),
        )

    @cached_property
    def size(self) -> int:
        """Largest token id plus one; more than the number of tokens where ids have holes."""
        return max(self.backend.get_vocab().values()) + 1

    @property
    def token_ids(self) -> dict[str, Any]:
        """Special token ids under the names of config.json; several end tokens are a list."""
        eos = self.ends[0] if len(self.ends) == 1 else list(self.ends)
        values = {"bos_token_id": self.begin, "eos_token_id": eos, "pad_token_id": self.pad}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def identity(self) -> bytes:
        """All that decides the tokens of a document: vocabulary, rules, begin and end."""
        return f"{self.backend.to_str()}begin {self.prefix} end {self.end_of_text}".encode()

    @property
    def digest(self) -> str:
        """Hash of `identity`."""
        return hashlib.sha256(self.identity).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text to be continued: begin-of-text where it belongs, no end."""
        return [*self.prefix, *self.backend.encode(text, add_special_tokens=False).ids]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of the tokens without special tokens."""
        return self.backend.decode(tokens, skip_special_tokens=True)

    def require_fits(self, vocab_size: int, key: str = "") -> None:
        """Check that a model with `vocab_size` entries has every token.

        Raises:
            InputError: A token id is too large.
        """
        if self.size > vocab_size:
            raise InputError(
                f"{key}{self.path}: has {self.size} entries: expected at most the model's "
                f"vocabulary of {vocab_size}"
            )

    def with_chat(self, template: str, end_of_turn: int | None) -> "ModelTokenizer":
        """Return a copy that was taught a chat template and the token that ends a turn."""
        ends = self.ends if end_of_turn is None else (*self.ends, end_of_turn)
        ends = tuple(dict.fromkeys(ends))
        return dataclasses.replace(self, chat_template=template, ends=ends, taught=True)

    def write(self, folder: Path) -> None:
        """Write tokenizer.json and the files beside it into `folder`.

        Values that the files already have stay. tokenizer_config.json gets the names of special
        tokens and of the class: without a class there, `AutoTokenizer` takes the one of the model
        family, and that of Qwen silently replaces the pre-tokenizer of tokenizer.json by its own.
        """
        own = json.loads(self.path.read_text("utf-8"))
        ours = json.loads(self.backend.to_str())
        changed = ("truncation", "padding", "post_processor")
        if any(own.get(name) != ours.get(name) for name in changed):
            own.update({name: ours.get(name) for name in changed})
            _write_json(folder / "tokenizer.json", own, indent=None)
        else:
            shutil.copyfile(self.path, folder / "tokenizer.json")
        source = self.path.parent
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: self.special[name] for name in self.special if name[:3] in ("bos", "eos")},
            **read_json(source / TOKENIZER_CONFIG),
        }
        if self.taught:
            config.pop("chat_template", None)
            (folder / CHAT_TEMPLATE).write_text(self.chat_template or "", "utf-8")
        else:
            copy_beside(source, folder, CHAT_TEMPLATE)
            copy_beside(source, folder, OTHER_TEMPLATES)
        copy_beside(source, folder, SPECIAL_TOKENS_MAP)
        _write_json(folder / TOKENIZER_CONFIG, config)
        generation = {**read_json(source / GENERATION_CONFIG), **self.token_ids}
        _write_json(folder / GENERATION_CONFIG, generation)


class _Files:
    """Values of the files beside a tokenizer.json.

    Attributes:
        named: Ids of the special tokens that have a name, such as `eos_token`.
    """

    def __init__(self, path: Path, backend: Tokenizer) -> None:
        self._folder, self._backend = path.parent, backend
        self._tokenizer_config = read_json(self._folder / TOKENIZER_CONFIG)
        self._generation = read_json(self._folder / GENERATION_CONFIG)
        self._config = read_json(self._folder / "config.json")
        self._names = self._read_names()
        self.named: dict[str, int] = {}
        for name, token in self._names.items():
            token_id = backend.token_to_id(token) if token is not None else None
            if token_id is not None:
                self.named[name] = token_id
            elif token is not None:
                log.warning("%s: has no %r, the %s of the files beside it", path, token, name)
        # Like transformers, which makes tokens of the vocabulary special once they have a name.
        special = [token for name, token in self._names.items() if name in self.named and token]
        known = backend.get_added_tokens_decoder()
        marked = {token.content for token in known.values() if token.special}
        plain = [token for token in special if token not in marked]
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in plain])

    def _read_names(self) -> dict[str, str | None]:
        """Special tokens by name. None: the files say that there is no such token."""
        files = {TOKENIZER_CONFIG: self._tokenizer_config}
        if "added_tokens_decoder" not in self._tokenizer_config:
            # Otherwise transformers ignores the older file.
            files[SPECIAL_TOKENS_MAP] = read_json(self._folder / SPECIAL_TOKENS_MAP)
        names: dict[str, str | None] = {}
        for file, values in files.items():
            for name in (name for name in _NAMES if name in values):
                token = values[name]
                token = token.get("content") if isinstance(token, dict) else token
                valid = token is None or isinstance(token, str)
                require(valid, f"{self._folder / file}: {name}", token, "a token, or null")
                names[name] = token
        return names

    def ids(self, name: str) -> list[int]:
        """All ids of a special token, in the order of the files; without double ones."""
        found: list[int] = []
        for file, values in (
            (GENERATION_CONFIG, self._generation),
            ("config.json", self._config),
        ):
            value = values.get(f"{name}_id")
            candidates: list[Any] = value if isinstance(value, list) else [value]
            key = f"{self._folder / file}: {name}_id"
            found += [token_id for token_id in candidates if self._is_token(token_id, key)]
        if name in self.named:
            found.append(self.named[name])
        return list(dict.fromkeys(found))

    def first_id(self, name: str) -> int | None:
        """Id of a special token of which there is one: its name's, else the first of the files."""
        found = self.named.get(name)
        return found if found is not None else next(iter(self.ids(name)), None)

    def _is_token(self, value: Any, key: str) -> bool:
        """True for the id of a token that the model has; None and -1 stand for no token."""
        if value is None or value == -1:
            return False
        is_id = type(value) is int and 0 <= value < 2**32
        require(is_id, key, value, "the id of a token")
        limit = self._config.get("vocab_size")
        if isinstance(limit, int) and value >= limit:
            log.warning("%s=%d is not below vocab_size=%d and is left out", key, value, limit)
            return False
        return True

    def special(self, defaults: dict[str, int | None]) -> dict[str, str]:
        """Special tokens by name; those of `defaults` for names about which the files are silent.

        A tokenizer_config.json that names no `bos_token` is not silent about it: it means none.

        Args:
            defaults: Ids of tokens by name.
        """
        if self._tokenizer_config:
            defaults = {**defaults, "bos_token": self.named.get("bos_token")}
        tokens = {
            name: self._backend.id_to_token(i) for name, i in defaults.items() if i is not None
        }
        return {k: token for k, token in {**tokens, **self._names}.items() if token is not None}

    def chat_template(self) -> str | None:
        """Jinja source of the chat template; of several, the one named `default`."""
        path = self._folder / CHAT_TEMPLATE
        if path.is_file():
            return read_template_file(path)
        found = self._tokenizer_config.get("chat_template")
        key = f"{self._folder / TOKENIZER_CONFIG}: chat_template"
        if isinstance(found, list):
            named = all(isinstance(entry, dict) and "name" in entry for entry in found)
            require(named, key, found, "a text, or a list of {name, template}")
            found = next((e.get("template") for e in found if e["name"] == "default"), None)
        if isinstance(found, dict):
            found = found.get("default")
        require(found is None or isinstance(found, str), key, found, "a text, or texts by name")
        return found


def _chosen_end(token: str, backend: Tokenizer, path: Path) -> int:
    """Id of the token that `data.end_of_text` names.

    Raises:
        InputError: There is no such token, or texts are made of it.
    """
    end = backend.token_to_id(token)
    if end is None:
        raise InputError(f"data.end_of_text={token}: expected a token of {path}, found none")
    if end not in backend.get_added_tokens_decoder():
        raise InputError(
            f"data.end_of_text={token}: expected a token of its own, found one that texts are made "
            f"of; choose one of added_tokens in {path}"
        )
    return end


def read_template_file(path: Path, key: str = "") -> str:
    """Read a Jinja file; `key` is text before the path in errors, such as `data.chat_template=`.

    Raises:
        InputError: It is missing, or not UTF-8.
    """
    if not path.is_file():
        raise InputError(f"{key}{path}: no such file; expected a Jinja file")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{key}{path}: is not UTF-8 ({error}); convert it") from error


def read_json(path: Path) -> dict[str, Any]:
    """Content of a file beside a tokenizer.json; empty if there is none.

    Raises:
        InputError: The file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text("utf-8"))
        json.dumps(values, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}); copy it again") from error
    require(isinstance(values, dict), str(path), type(values).__name__, "a JSON object")
    return values


def _write_json(path: Path, values: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n", "utf-8")


def copy_beside(source: Path, target: Path, name: str) -> None:
    """Copy a file or a folder beside a tokenizer.json, if there is one of this name."""
    if (source / name).is_dir():
        shutil.copytree(source / name, target / name)
    elif (source / name).is_file():
        shutil.copyfile(source / name, target / name)
