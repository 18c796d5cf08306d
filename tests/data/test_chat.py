"""Conversations become tokens, of which only the assistant's count for the loss."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from flash.data.chat import ChatEncoder, read_template
from flash.data.corpus import PackedData
from flash.data.encoders import EncodedDocument
from flash.data.module import PackedDataModule
from flash.data.settings import DataKind, DataSettings, TextSourceSettings
from flash.data.tokenizer import train_tokenizer
from flash.errors import InputError
from flash.model.tokenizer import ModelTokenizer
from tests.conftest import opened

CHATML = Path("conf/data/chatml.jinja").read_text("utf-8")
UNMARKED = CHATML.replace("{%- generation %}", "").replace("{% endgeneration %}", "")
SYSTEM_ONCE = "{% if messages|length > 2 %}Long. {% endif %}" + UNMARKED


@pytest.fixture(scope="module")
def model_tokenizer(tmp_path_factory) -> ModelTokenizer:
    made = train_tokenizer([f"hello world number {i} yes no" for i in range(300)], 400)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return opened(made, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(model_tokenizer) -> Tokenizer:
    return model_tokenizer.backend


def chat(number: int, turns: int = 1) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "be brief"}]
    for turn in range(turns):
        messages.append({"role": "user", "content": f"say {number} {turn}"})
        messages.append({"role": "assistant", "content": f"yes {number} {turn}" + " yes" * turn})
    return messages


def encoder(tokenizer, template=CHATML, max_tokens=1000, **options) -> ChatEncoder:
    return ChatEncoder(tokenizer, template, {}, max_tokens=max_tokens, **options)


def learnt(tokenizer, encoded) -> str:
    return tokenizer.decode(encoded.tokens[encoded.loss_mask].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("template", [CHATML, UNMARKED])
def test_the_assistants_words_and_end_of_turn_are_learnt(tokenizer, template):
    [encoded] = encoder(tokenizer, template).encode([chat(7, turns=2)])
    assert encoded is not None
    said = learnt(tokenizer, encoded)
    ends = "\n" if template is UNMARKED else ""  # all that the message adds, without marks
    assert said == f"yes 7 0<|im_end|>{ends}yes 7 1 yes<|im_end|>{ends}"
    whole = tokenizer.decode(encoded.tokens.tolist(), skip_special_tokens=False)
    assert whole.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nsay 7 0")


def test_conversations_with_nothing_to_learn_are_left_out(tokenizer):
    made = encoder(tokenizer, max_tokens=12)
    assert made.encode([chat(1)[:2], chat(1)]) == [None, None]  # no answer; the answer is cut off


def test_templates_that_rewrite_earlier_turns_are_refused(tokenizer):
    [error] = encoder(tokenizer, SYSTEM_ONCE).encode([chat(1, turns=2)])
    assert re.search(r"rendered differently.*generation.*begins.*system", str(error))


def test_conversations_that_a_template_refuses_are_errors_of_their_own(tokenizer):
    strict = CHATML + "{% if messages|length > 4 %}{{ raise_exception('too long') }}{% endif %}"
    refused, kept = encoder(tokenizer, strict).encode([chat(1, turns=2), chat(1)])
    assert isinstance(refused, InputError)
    assert "too long in a conversation that begins" in str(refused)
    assert isinstance(kept, EncodedDocument)


@pytest.mark.parametrize("template", ["{{ 1 + 'a' }}", "{% import 'os' as o %}", "{{ 1 / 0 }}"])
def test_a_template_that_fails_is_an_error_of_the_conversation(tokenizer, template):
    failing = encoder(tokenizer, template)
    assert failing.renderer.end_of_turn is None
    [error] = failing.encode([chat(1)])
    assert "the chat template fails: " in str(error)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{{ 'x' * 30000000 }}",
        "{{ 7 ** 999999999 }}",
    ],
)
def test_a_template_without_an_end_is_refused_at_once(tokenizer, template):
    with pytest.raises(InputError, match=r"^the chat template takes more than .*; mend it$"):
        encoder(tokenizer, template)


@pytest.mark.parametrize("template", ["{% for m in messages %}", "a\n{{ ", "{{ 'x' | nofilter }}"])
def test_an_error_of_syntax_is_named_once(tokenizer, template):
    line = template.count("\n") + 1
    with pytest.raises(
        InputError, match=rf"^the chat template has an error of syntax in line {line}"
    ):
        encoder(tokenizer, template)


def test_a_conversation_that_is_rendered_endlessly_is_an_error_of_its_own(tokenizer):
    template = "{% for m in messages %}{{ m.content * m.content | length }}{% endfor %}"
    long = chat(1)
    long[1]["content"] = "x" * 9999
    [error] = encoder(tokenizer, template).encode([long])
    assert "the chat template writes more than 16,777,216 characters" in str(error)


def test_other_columns_are_named(tokenizer):
    with pytest.raises(InputError, match="expected a list of messages.*found text"):
        encoder(tokenizer).check("text")
    with pytest.raises(InputError, match="role and content, found from, value"):
        encoder(tokenizer).check([{"from": "human", "value": "hello"}])


@pytest.fixture
def settings(tmp_path) -> DataSettings:
    lines = [json.dumps({"messages": chat(i, turns=1 + i % 4)}) for i in range(80)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return DataSettings(
        name="chat",
        kind=DataKind.chat,
        sources=[TextSourceSettings(path=str(tmp_path / "chats.jsonl"), column="messages")],
        validation_percent=20,
        chat_template="conf/data/chatml.jinja",
        seq_len=120,
        validation_sequences=2,
        document_masks=True,
        logical_shards=4,
    )


def test_whole_conversations_are_packed(settings, model_tokenizer, tmp_path):
    data = PackedData(settings, model_tokenizer, batch_size=4, seed=0, cache=tmp_path)
    tokenizer = model_tokenizer.backend
    end = tokenizer.token_to_id("<|endoftext|>")
    start = tokenizer.encode("<|im_start|>system", add_special_tokens=False).ids
    batch = next(iter(PackedDataModule(data).train_dataloader()))
    assert batch.tokens.shape == (4, 121)
    assert batch.loss_mask is not None
    assert batch.document_ids is not None
    for tokens, mask, ids in zip(batch.tokens, batch.loss_mask, batch.document_ids, strict=True):
        for number in ids.unique().tolist():
            members = tokens[:-1][ids == number].tolist()
            whole = members[: len(start)] == start
            assert whole or set(members) == {end}  # a conversation from its beginning, or filling
        said = tokenizer.decode(tokens[1:][mask].tolist(), skip_special_tokens=False)
        assert said.count("yes") >= said.count("<|im_end|>") > 0
        assert "say" not in said
        assert not mask[tokens[1:] == end].any()
    assert int(batch.document_ids.max()) > 0  # several in one sequence


def test_special_tokens_in_a_template_are_part_of_the_data(settings, model_tokenizer, tmp_path):
    template = tmp_path / "begin.jinja"
    template.write_text("{{ bos_token }}" + CHATML, "utf-8")
    begun = dataclasses.replace(settings, chat_template=str(template))

    def data(settings: DataSettings, token: str) -> PackedData:
        special = {**model_tokenizer.special, "bos_token": token}
        tokenizer = dataclasses.replace(model_tokenizer, special=special)
        return PackedData(settings, tokenizer, batch_size=4, seed=0, cache=tmp_path)

    one, other = data(begun, "<|endoftext|>"), data(begun, "<|im_start|>")
    assert one.digest != other.digest
    assert not torch.equal(one.validation_set[0].tokens, other.validation_set[0].tokens)
    assert data(settings, "<|endoftext|>").digest == data(settings, "<|im_start|>").digest


def test_packed_conversations_resume(settings, model_tokenizer, tmp_path):
    data = PackedData(settings, model_tokenizer, batch_size=4, seed=0, cache=tmp_path)
    module = PackedDataModule(data)
    batches = iter(module.train_dataloader())
    first = [next(batches) for _ in range(6)]
    states = data.train_set.initial_states()  # pyright: ignore
    for batch in first[:3]:
        for state in batch.stream_state:  # pyright: ignore
            states[int(state[0])] = state
    module.load_state_dict({"steps": 3, "stream_states": states})
    resumed = iter(module.train_dataloader())
    for batch in first[3:]:
        again = next(resumed)
        assert torch.equal(again.tokens, batch.tokens)
        assert torch.equal(again.loss_mask, batch.loss_mask)  # pyright: ignore


def test_no_assistant_tokens_are_an_error(settings, model_tokenizer, tmp_path):
    lines = [json.dumps({"messages": chat(i)[:2]}) for i in range(20)]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    with pytest.raises(InputError, match=r"data\.sources\[0\].*0 documents with assistant tokens"):
        PackedData(settings, model_tokenizer, batch_size=4, seed=0, cache=tmp_path)


def test_templates_are_found_beside_the_tokenizer(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"data\.chat_template=null: .*chatml\.jinja"):
        read_template(opened(tokenizer, tmp_path), None)
    config = {"chat_template": "configured", "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    found = opened(tokenizer, tmp_path)
    assert read_template(found, None) == "configured"
    assert found.special == {"eos_token": "<|im_end|>"}
    (tmp_path / "chat_template.jinja").write_text("file", "utf-8")
    found = opened(tokenizer, tmp_path)
    assert read_template(found, None) == "file"
    assert read_template(found, "conf/data/chatml.jinja") == CHATML
    with pytest.raises(InputError, match=r"data\.chat_template=none\.jinja: no such file"):
        read_template(found, "none.jinja")
    (tmp_path / "odd.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"data\.chat_template=.*odd\.jinja: is not UTF-8"):
        read_template(found, str(tmp_path / "odd.jinja"))


BEHIND = CHATML.replace(
    "content + '<|im_end|>' }}{% endgeneration %}", "content }}{% endgeneration %}<|im_end|>"
)


def test_an_end_of_turn_behind_the_marks_is_learnt(tokenizer):
    assert BEHIND != CHATML
    [encoded] = encoder(tokenizer, BEHIND).encode([chat(7, turns=2)])
    [other] = encoder(tokenizer, CHATML).encode([chat(7, turns=2)])
    assert encoded is not None
    assert encoded.tokens.tolist() == other.tokens.tolist()
    assert encoded.loss_mask.tolist() == other.loss_mask.tolist()
