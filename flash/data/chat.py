"""Conversations: rendered with the tokenizer's chat template, encoded, and masked for the loss.

Only the tokens of the assistant count for the loss.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from flash.data.encoders import EncodedDocument, json_type
from flash.data.template_limits import LIMITS, MAX_CHARACTERS, within_limits
from flash.errors import InputError, short
from flash.model.tokenizer import ModelTokenizer, read_template_file

_SHAPE = "a list of messages with role and content"
_SHORT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}]
"""Conversation that nearly every template renders."""


class ChatEncoder:
    """Encoder of conversations, given as lists of `{role, content}`.

    The assistant's text is the text that the template puts between `{% generation %}` and
    `{% endgeneration %}`. In a template without these marks it is the text that each assistant
    message adds to the rendering of the messages before it, generation prompt included. The
    end-of-turn token after it belongs to it, also if the template puts it behind the marks.

    Args:
        tokenizer: Encoder of the rendered text.
        template: Jinja source of the chat template.
        special: Special tokens by name (`bos_token`, ...) that the template may use.
        max_tokens: Length to which longer conversations are cut [tokens].

    Attributes:
        renderer: Renderer of the template.
    """

    splits_documents = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        special: Mapping[str, str],
        *,
        max_tokens: int,
    ) -> None:
        self.tokenizer, self.template, self.max_tokens = tokenizer, template, max_tokens
        self.needed = f"assistant tokens among the first {max_tokens} (data.seq_len + 1)"
        self.renderer = ChatRenderer(tokenizer, template, special)
        self._marked = re.search(r"{%-?\s*generation\s*-?%}", template) is not None

    def check(self, value: Any) -> None:
        if not isinstance(value, list):
            raise InputError(f"expected {_SHAPE}, found {json_type(value)}")
        for message in value:
            if not isinstance(message, dict):
                raise InputError(f"expected {_SHAPE}, found {json_type(message)} in the list")
            known = {key for key, found in message.items() if found is not None}
            if "role" not in known or not ("content" in message or "tool_calls" in known):
                raise InputError(f"expected {_SHAPE}, found {short(', '.join(message))}")
            if not isinstance(message["role"], str):
                raise InputError(
                    f"expected a role that is text, found {json_type(message['role'])}"
                )

    def encode(self, values: list[Any]) -> list[EncodedDocument | InputError | None]:
        return [self._encode(value) for value in values]

    def usable(self, value: Any) -> bool | InputError:
        encoded = self._encode(value)
        return encoded if isinstance(encoded, InputError) else encoded is not None

    def _encode(self, messages: Any) -> EncodedDocument | InputError | None:
        if not messages:
            return None
        try:
            self._check_rendering(messages)
            encoded = self._from_marks(messages) if self._marked else self._from_prefixes(messages)
        except Exception as error:  # a template is a program, which fails in its own ways
            problem = str(error).strip().splitlines() or [type(error).__name__]
            if not isinstance(error, InputError):
                problem[0] = f"the chat template fails: {problem[0]}"
            return InputError(
                f"{problem[0]} in a conversation that begins {str(messages[0])[:80]!r}"
            )
        if self.renderer.end_of_turn is not None:
            _learn_end_of_turn(encoded, self.renderer.end_of_turn, self.tokenizer)
        # The first token cannot be predicted, as no token comes before it.
        mask = encoded.loss_mask
        return encoded if mask is not None and mask[1:].any() else None

    def _check_rendering(self, messages: list[dict[str, Any]]) -> None:
        """Check that the template knows all kinds of messages of a conversation.

        Raises:
            InputError: It leaves tool calls out, or writes parts of a content as Python code.
        """
        special = [m for m in messages if m.get("tool_calls")]
        coded = [m for m in messages if not isinstance(m.get("content"), str | None)]
        if not special and not coded:
            return
        whole = self._render(messages)
        for message in coded:
            content = message["content"]
            emptied = [{**m, "content": ""} if m is message else m for m in messages]
            if whole.count(str(content)) > self._rendered(emptied).count(str(content)):
                raise InputError(
                    f"the chat template writes a content that is {json_type(content)} as code"
                )
        for message in special:
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            if self._rendered([rest if m is message else m for m in messages]) == whole:
                raise InputError("the chat template leaves tool_calls out")

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        """Rendering of messages; nothing for messages that the template refuses."""
        try:
            return self._render(messages)
        except Exception:  # as above
            return ""

    def _from_marks(self, messages: list[dict[str, Any]]) -> EncodedDocument:
        tokens, mask = self.renderer.encode_marked(messages)
        return EncodedDocument(
            np.array(tokens[: self.max_tokens], np.int64), np.array(mask[: self.max_tokens], bool)
        )

    def _from_prefixes(self, messages: list[dict[str, Any]]) -> EncodedDocument:
        whole = self._render(messages)
        encoding = self.tokenizer.encode(whole, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets[: self.max_tokens]], np.int64)
        loss_mask = np.zeros(len(starts), bool)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._render(messages[:i], prompt=True)
                after = self._render(messages[: i + 1])
                if not (after.startswith(before) and whole.startswith(after)):
                    raise InputError(
                        f"data.chat_template: message {i} is rendered differently once others "
                        "follow, so the assistant's text cannot be located; expected a template "
                        "with {% generation %} marks"
                    )
                loss_mask |= (starts >= len(before)) & (starts < len(after))
        return EncodedDocument(np.array(encoding.ids[: self.max_tokens], np.int64), loss_mask)

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        return self.renderer.render(messages, prompt=prompt) if messages else ""


def _learn_end_of_turn(encoded: EncodedDocument, end: int, tokenizer: Tokenizer) -> None:
    """Add to the mask the end of turn after each of the assistant's texts, if it is not there.

    Some templates close `{% generation %}` before it; a model that never learns it never stops.
    """
    tokens, mask = encoded.tokens, encoded.loss_mask
    assert mask is not None
    for start in np.flatnonzero(mask[:-1] & ~mask[1:]) + 1:
        stop = start
        while stop < len(tokens) and tokenizer.decode([tokens[stop]]).isspace():
            stop += 1
        if stop < len(tokens) and tokens[stop] == end:
            mask[start : stop + 1] = True


class ChatRenderer:
    """Renderer of conversations with a chat template.

    Args:
        tokenizer: Tokenizer of the model.
        template: Jinja source of the chat template.
        special: Special tokens by name (`bos_token`, ...) that the template may use.

    Raises:
        InputError: The template has an error of syntax, or has no end within reasonable limits.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, special: Mapping[str, str]) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._library: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        if not within_limits(lambda: self.render(_SHORT)):
            raise InputError(
                f"the chat template takes more than {LIMITS} for two short messages; mend it"
            )
        try:
            self.render(_SHORT)
        except TemplateSyntaxError as error:
            raise InputError(
                f"the chat template has an error of syntax in line {error.lineno} "
                f"({error.message}); mend it"
            ) from error
        except Exception:  # a template may refuse it; the first conversation reports a failure
            pass

    def render(self, messages: list[Any], *, prompt: bool = False, continued: bool = False) -> str:
        """Render a conversation.

        Args:
            messages: Messages with the keys `role` and `content`.
            prompt: End with the header of the assistant's answer.
            continued: Leave the last message open, so that the model continues it.

        Raises:
            TemplateError: The template refuses the conversation.
            InputError: The rendering is longer than any conversation.
        """
        text = self._library.apply_chat_template(
            messages,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=prompt,
            continue_final_message=continued,
        )
        if len(text) > MAX_CHARACTERS:
            raise InputError(f"the chat template writes more than {MAX_CHARACTERS:,} characters")
        return text

    def encode_marked(self, messages: list[Any]) -> tuple[list[int], list[int]]:
        """Return the tokens of a conversation, and 1 for those between `{% generation %}` marks."""
        out = self._library.apply_chat_template(
            messages,
            chat_template=self._template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return out["input_ids"], out["assistant_masks"]

    @cached_property
    def end_of_turn(self) -> int | None:
        """Token that the template puts after an answer; None if it is no single special token."""
        try:
            _, found, after = self.render(_SHORT).rpartition(_SHORT[-1]["content"])
        except Exception:  # a template is a program; the first conversation reports its failure
            return None
        ids = self._tokenizer.encode(after.lstrip(), add_special_tokens=False).ids
        known = self._tokenizer.get_added_tokens_decoder()
        return ids[0] if found and ids and ids[0] in known else None


def read_template(tokenizer: ModelTokenizer, chosen: str | None) -> str:
    """Read the Jinja source of a chat template.

    Args:
        tokenizer: Tokenizer of the model, with the template of its folder.
        chosen: Jinja file to read the template from instead.

    Raises:
        InputError: No template was found.
    """
    if chosen is not None:
        return read_template_file(Path(chosen), "data.chat_template=")
    if tokenizer.chat_template is None:
        raise InputError(
            "data.chat_template=null: expected a chat template beside the tokenizer, found none; "
            "set it to a Jinja file, such as '${bundled:conf/data/chatml.jinja}'"
        )
    return tokenizer.chat_template


def taught(tokenizer: ModelTokenizer, chosen: str | None) -> ModelTokenizer:
    """Return the tokenizer of a model that was trained on conversations.

    Its chat template is the one of the training, and the end of a turn is one of its end tokens.

    Args:
        tokenizer: Tokenizer before the training.
        chosen: Jinja file of the chat template; None is that of `tokenizer`.

    Raises:
        InputError: No template was found.
    """
    template = read_template(tokenizer, chosen)
    renderer = ChatRenderer(tokenizer.backend, template, tokenizer.special)
    return tokenizer.with_chat(template, renderer.end_of_turn)
