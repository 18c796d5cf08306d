"""Tokenization and chat templates by the rules of lm-evaluation-harness for `hf` models."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from flash.data.chat import read_template
from flash.data.tokenizer import end_of_text_id, load_tokenizer
from flash.errors import InputError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class HarnessTokenizer:
    """Tokenizer with its special tokens and chat template.

    Attributes:
        backend: Tokenizer of the model.
        prefix_id: Token that serves as the context of a text without one.
        end_ids: Tokens that end a generation; the first one is the end-of-text token.
        folder: Folder with the chat template; None means that there is none.
    """

    backend: Tokenizer
    prefix_id: int
    end_ids: tuple[int, ...]
    folder: Path | None = None

    @classmethod
    def open(cls, folder: Path) -> "HarnessTokenizer":
        """Read the tokenizer of a checkpoint folder.

        Raises:
            InputError: tokenizer.json is missing or damaged, or has no end-of-text token.
        """
        backend = load_tokenizer(folder / "tokenizer.json")
        settings, config = _read(folder / "tokenizer_config.json"), _read(folder / "config.json")
        ends = [_token_id(backend, settings.get("eos_token"))]
        for source in (config, _read(folder / "generation_config.json")):
            found = source.get("eos_token_id")
            ends += found if isinstance(found, list) else [found]
        known = [end for end in dict.fromkeys(ends) if end is not None]
        end_ids = tuple(known) or (end_of_text_id(backend, folder / "tokenizer.json"),)
        # Like the harness, prefer tokenizer_config.json; config.json is used only without one.
        begin = config.get("bos_token_id")
        if settings:
            begin = _token_id(backend, settings.get("bos_token"))
        return cls(backend, begin if isinstance(begin, int) else end_ids[0], end_ids, folder)

    @cached_property
    def _prefix(self) -> str:
        return self.backend.decode([self.prefix_id], skip_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return token ids; None adds special tokens unless the text begins with the prefix."""
        if add_special_tokens is None:
            add_special_tokens = not text.startswith(self._prefix)
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: list[int]) -> str:
        """Return the text of the tokens without special tokens."""
        return self.backend.decode(tokens, skip_special_tokens=True)

    def answer(self, tokens: list[int], until: list[str]) -> str:
        """Return the text of a generation up to the first end token or stop string."""
        length = next((i for i, token in enumerate(tokens) if token in self.end_ids), len(tokens))
        text = self.decode(tokens[:length])
        for stop in until:
            text = text.split(stop)[0]
        return text

    def tail_stops(self, tokens: list[int], until: list[str]) -> bool:
        """Return True if the last token is an end token or completes a stop string."""
        if tokens[-1] in self.end_ids:
            return True
        # A token has at least one byte; four more tokens, as the first may split a character.
        longest = max((len(stop.encode()) for stop in until), default=0)
        tail = self.decode(tokens[-longest - 4 :])
        return any(stop in tail for stop in until)

    def containing(self, until: list[str]) -> list[int]:
        """Return the tokens whose text contains a whole stop string."""
        ids = [[i] for i in range(self.backend.get_vocab_size())]
        texts = self.backend.decode_batch(ids, skip_special_tokens=True)
        return [i for i, text in enumerate(texts) if any(stop in text for stop in until)]

    def with_chat(self) -> "HarnessTokenizer":
        """Return a copy whose end tokens include the one that ends the assistant's turn.

        Raises:
            InputError: There is no chat template.
        """
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}]
        _, _, after = self.render(messages, prompt=False).rpartition("bcd")
        ids = self.backend.encode(after.lstrip(), add_special_tokens=False).ids
        special = self.backend.get_added_tokens_decoder()
        if not ids or ids[0] not in special or ids[0] in self.end_ids:
            return self
        return HarnessTokenizer(self.backend, self.prefix_id, (*self.end_ids, ids[0]), self.folder)

    @cached_property
    def template(self) -> tuple[str, dict[str, str]]:
        """Source of the chat template, and the special tokens that it may use.

        Raises:
            InputError: There is no chat template.
        """
        try:
            return read_template(self.folder, None)
        except InputError as error:
            raise InputError(
                "suite.apply_chat_template=true: expected chat_template.jinja or a chat_template "
                f"in tokenizer_config.json in {self.folder}, found none; copy the one it was "
                "trained with, or evaluate a chat model"
            ) from error

    @cached_property
    def _renderer(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=self.backend, **self.template[1])

    def render(self, messages: Messages, *, prompt: bool = True, continued: bool = False) -> str:
        """Render a conversation with the chat template.

        Args:
            messages: Messages with the keys `role` and `content`.
            prompt: End with the header of the assistant's answer.
            continued: Leave the last message open, so that the model continues it.

        Raises:
            InputError: There is no chat template, or it refuses the conversation.
        """
        source = self.template[0]
        try:
            return self._render(messages, source, prompt, continued)
        except TemplateError:  # for templates without a system role, the harness omits it
            shorter = [message for message in messages if message["role"] != "system"]
        try:
            return self._render(shorter, source, prompt, continued)
        except TemplateError as error:
            raise InputError(
                f"{self.folder}: the chat template refuses {shorter}: {error}"
            ) from error

    def _render(self, messages: Messages, source: str, prompt: bool, continued: bool) -> str:
        return self._renderer.apply_chat_template(
            messages,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=prompt,
            continue_final_message=continued,
        )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); copy it again") from error


def _token_id(backend: Tokenizer, token: Any) -> int | None:
    token = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(token) if isinstance(token, str) else None
