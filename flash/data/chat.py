"""Conversations: rendered with the tokenizer's chat template, encoded, and masked for the loss.

Only the tokens of the assistant count for the loss.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from flash.data.encoders import EncodedDocument, json_type
from flash.errors import InputError

_SHAPE = "a list of messages with role and content"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatEncoder:
    """Encoder of conversations, given as lists of `{role, content}`.

    The assistant's text is the text that the template puts between `{% generation %}` and
    `{% endgeneration %}`. In a template without these marks it is the text that each assistant
    message adds to the rendering of the messages before it, generation prompt included; the
    end-of-turn token therefore belongs to the message.

    Args:
        tokenizer: Encoder of the rendered text.
        template: Jinja source of the chat template.
        special: Special tokens by name (`bos_token`, ...) that the template may use.
        max_tokens: Length to which longer conversations are cut [tokens].
    """

    needed = "assistant tokens"
    splits_documents = False

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str,
        special: dict[str, str],
        *,
        max_tokens: int,
    ) -> None:
        self.tokenizer, self.template, self.max_tokens = tokenizer, template, max_tokens
        self._renderer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
        self._marked = re.search(r"{%-?\s*generation\s*-?%}", template) is not None

    def check(self, value: Any) -> None:
        if not isinstance(value, list):
            raise InputError(f"expected {_SHAPE}, found {json_type(value)}")
        for message in value:
            if not isinstance(message, dict):
                raise InputError(f"expected {_SHAPE}, found {json_type(message)} in the list")
            known = {key for key, found in message.items() if found is not None}
            if "role" not in known or not ("content" in message or "tool_calls" in known):
                raise InputError(f"expected {_SHAPE}, found {', '.join(message)}")

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
        out: Any = self._renderer.apply_chat_template(
            messages,
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens = np.array(out["input_ids"][: self.max_tokens], np.int64)
        return EncodedDocument(tokens, np.array(out["assistant_masks"][: self.max_tokens], bool))

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


def read_template(folder: Path | None, chosen: str | None) -> tuple[str, dict[str, str]]:
    """Read the chat template and the special tokens that it may use.

    Args:
        folder: Folder of the tokenizer, with `chat_template.jinja` or `tokenizer_config.json`.
        chosen: Jinja file to read the template from instead.

    Returns:
        Jinja source of the template, and special tokens by name.

    Raises:
        InputError: No template was found, or a file is damaged.
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
    if isinstance(configured, list):  # several templates, each with a name
        configured = {entry["name"]: entry["template"] for entry in configured}.get("default")
    if not isinstance(configured, str):
        raise InputError(
            "data.chat_template=null: expected a chat template beside the tokenizer, found none; "
            "set it to a Jinja file, such as conf/data/chatml.jinja"
        )
    return configured
