"""Conversations: rendered with the tokenizer's chat template, learnt on assistant tokens alone."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from flash.data.encoders import Encoded
from flash.errors import InputError

log = logging.getLogger(__name__)

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatEncoder:
    """Lists of `{role, content}` as tokens.

    What the assistant says is what the template puts between `{% generation %}` and
    `{% endgeneration %}`. Without those it is what each assistant message adds to the rendering of
    the messages before it with the prompt to answer, so its end-of-turn token belongs to it.

    Args:
        tokenizer: Encodes rendered text.
        template: Jinja source of the template.
        special: Special tokens by name (`bos_token`, ...), for the template.
        limit: Longer conversations are cut to this [tokens].
        skip_damaged: Leave conversations out that the template refuses, with a warning.
    """

    wanted = "assistant tokens"
    cuts = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        special: dict[str, str],
        *,
        limit: int,
        skip_damaged: bool = False,
    ) -> None:
        self.tokenizer, self.template, self.limit = tokenizer, template, limit
        self.skip_damaged = skip_damaged
        self._renderer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        self._marked = re.search(r"{%-?\s*generation\s*-?%}", template) is not None

    def encode(self, values: list[Any]) -> list[Encoded | None]:
        return [self._encode(value) for value in values]

    def _encode(self, messages: Any) -> Encoded | None:
        _check(messages)
        try:
            encoded = self._from_marks(messages) if self._marked else self._from_prefixes(messages)
        except (TemplateError, InputError) as error:
            if not self.skip_damaged:
                raise InputError(
                    f"{error} in a conversation that begins {str(messages[0])[:80]!r}; mend it, or "
                    "set data.skip_damaged=true to leave such ones out"
                ) from error
            log.warning("a conversation is left out: %s", error)
            return None
        # The first token has nothing before it to be predicted from.
        return encoded if encoded.learn is not None and encoded.learn[1:].any() else None

    def _from_marks(self, messages: list[dict[str, Any]]) -> Encoded:
        out: Any = self._renderer.apply_chat_template(
            messages,
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens = np.array(out["input_ids"][: self.limit], np.int64)
        return Encoded(tokens, np.array(out["assistant_masks"][: self.limit], bool))

    def _from_prefixes(self, messages: list[dict[str, Any]]) -> Encoded:
        whole = self._render(messages)
        encoding = self.tokenizer.encode(whole, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets[: self.limit]], np.int64)
        learn = np.zeros(len(starts), bool)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:i], prompt=True)
                after = self._render(messages[: i + 1])
                if not (after.startswith(before) and whole.startswith(after)):
                    raise InputError(
                        f"data.chat_template: message {i} is rendered differently once others "
                        "follow, so what the assistant said cannot be told; expected a template "
                        "with {% generation %} marks"
                    )
                learn |= (starts >= len(before)) & (starts < len(after))
        return Encoded(np.array(encoding.ids[: self.limit], np.int64), learn)

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        if not messages:
            return ""
        text = self._renderer.apply_chat_template(
            messages,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=prompt,
        )
        assert isinstance(text, str)
        return text


def _check(messages: Any) -> None:
    shape = "a list of messages with role and content"
    if not isinstance(messages, list):
        raise InputError(f"expected {shape}, found {type(messages).__name__}")
    for message in messages:
        if not (isinstance(message, dict) and "role" in message and "content" in message):
            found = ", ".join(message) if isinstance(message, dict) else type(message).__name__
            raise InputError(f"expected {shape}, found {found}")


def read_template(folder: Path | None, chosen: str | None) -> tuple[str, dict[str, str]]:
    """Source of the chat template, and the special tokens that it may name.

    Args:
        folder: Of the tokenizer: `chat_template.jinja` or `tokenizer_config.json` have it.
        chosen: A Jinja file instead.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    config: dict[str, Any] = {}
    path = folder / "tokenizer_config.json" if folder is not None else None
    if path is not None and path.is_file():
        try:
            config = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: damaged ({error}); copy it again") from error
    special = {}
    for name in _SPECIAL:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    return _template(folder, chosen, config.get("chat_template")), special


def _template(folder: Path | None, chosen: str | None, configured: Any) -> str:
    if chosen is not None:
        if not Path(chosen).is_file():
            raise InputError(f"data.chat_template={chosen}: no such file; expected a Jinja file")
        return Path(chosen).read_text("utf-8")
    if folder is not None and (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    if isinstance(configured, list):  # several by name
        configured = {entry["name"]: entry["template"] for entry in configured}.get("default")
    if not isinstance(configured, str):
        raise InputError(
            "data.chat_template=null: expected a chat template beside the tokenizer, found none; "
            "set it to a Jinja file, such as conf/data/chatml.jinja"
        )
    return configured
