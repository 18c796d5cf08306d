"""Tokenization and chat templates by the rules of lm-evaluation-harness for `hf` models."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jinja2 import TemplateError
from tokenizers import Tokenizer

from flash.data.chat import ChatRenderer
from flash.errors import InputError, under
from flash.model.tokenizer import ModelTokenizer

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class HarnessTokenizer:
    """Tokenizer by the rules of the harness.

    Attributes:
        tokenizer: Tokenizer of the model.
    """

    tokenizer: ModelTokenizer

    @classmethod
    def open(cls, folder: Path) -> "HarnessTokenizer":
        """Read the tokenizer of a checkpoint folder.

        Raises:
            InputError: tokenizer.json is missing or damaged, or has no end-of-text token.
        """
        return cls(ModelTokenizer.open(folder / "tokenizer.json"))

    @property
    def backend(self) -> Tokenizer:
        """Tokenizer of the library."""
        return self.tokenizer.backend

    @property
    def folder(self) -> Path:
        """Folder of the tokenizer and of its chat template."""
        return self.tokenizer.path.parent

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation."""
        return self.tokenizer.ends

    @cached_property
    def prefix_id(self) -> int:
        """Token that serves as the context of a text without one."""
        begin = self.tokenizer.special.get("bos_token")
        found = self.backend.token_to_id(begin) if begin is not None else None
        return found if found is not None else self.tokenizer.end_of_text

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
        return self.tokenizer.decode(tokens)

    def answer(self, tokens: list[int], until: list[str]) -> str:
        """Return the text of a generation up to the first end token or stop string.

        A stop string may be, or contain, a special token.
        """
        for length, token in enumerate(tokens):
            if token in self.end_ids:
                tokens = tokens[:length]
                break
            if self.tail_stops(tokens[: length + 1], until):
                tokens = tokens[: length + 1]
                break
        text = self.decode(tokens)
        for stop in until:
            text = text.split(stop)[0]
        return text

    def tail_stops(self, tokens: list[int], until: list[str]) -> bool:
        """Return True if the last token is an end token or completes a stop string."""
        if tokens[-1] in self.end_ids:
            return True
        # A token has at least one byte; four more tokens, as the first may split a character.
        longest = max((len(stop.encode()) for stop in until), default=0)
        tail = self.backend.decode(tokens[-longest - 4 :], skip_special_tokens=False)
        return any(stop in tail for stop in until)

    def containing(self, until: list[str]) -> list[int]:
        """Return the tokens whose text contains a whole stop string."""
        ids = [[i] for i in range(self.tokenizer.size)]
        texts = self.backend.decode_batch(ids, skip_special_tokens=False)
        return [i for i, text in enumerate(texts) if any(stop in text for stop in until)]

    def with_chat(self) -> "HarnessTokenizer":
        """Return a copy whose end tokens include the one that ends the assistant's turn.

        Raises:
            InputError: There is no chat template.
        """
        end = self._renderer.end_of_turn
        ends = self.end_ids if end is None else tuple(dict.fromkeys([*self.end_ids, end]))
        return HarnessTokenizer(dataclasses.replace(self.tokenizer, ends=ends))

    @property
    def template(self) -> tuple[str, dict[str, str]]:
        """Source of the chat template, and the special tokens that it may use.

        Raises:
            InputError: There is no chat template.
        """
        template = self.tokenizer.chat_template
        if template is None:
            raise InputError(
                "suite.apply_chat_template=true: expected chat_template.jinja or a chat_template "
                f"in tokenizer_config.json in {self.folder}, found none; copy the one it was "
                "trained with, or evaluate a chat model"
            )
        return template, self.tokenizer.special

    @cached_property
    def _renderer(self) -> ChatRenderer:
        template = self.template
        with under(str(self.folder), ": "):
            return ChatRenderer(self.backend, *template)

    def render(self, messages: Messages, *, prompt: bool = True, continued: bool = False) -> str:
        """Render a conversation with the chat template.

        Args:
            messages: Messages with the keys `role` and `content`.
            prompt: End with the header of the assistant's answer.
            continued: Leave the last message open, so that the model continues it.

        Raises:
            InputError: There is no chat template, or it refuses the conversation.
        """
        renderer = self._renderer
        try:
            return renderer.render(messages, prompt=prompt, continued=continued)
        except TemplateError:  # for templates without a system role, the harness omits it
            shorter = [message for message in messages if message["role"] != "system"]
        try:
            return renderer.render(shorter, prompt=prompt, continued=continued)
        except TemplateError as error:
            raise InputError(
                f"{self.folder}: the chat template refuses {shorter}: {error}"
            ) from error
