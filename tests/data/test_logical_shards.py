"""Small data: logical shards and splits that suit it, or one line that says what is missing."""

import gc
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from flash.data.corpus import PackedData
from flash.data.encoders import in_validation_split
from flash.data.factory import open_splits
from flash.data.logical_shards import fit_logical_shards
from flash.data.mixture import StreamedSequences
from flash.data.module import PackedDataModule
from flash.data.sampler import Share
from flash.data.settings import DataKind, DataSettings, DocumentUnit, TextSourceSettings
from flash.data.stream import SequenceStream, StreamLoader, first_sequences
from flash.data.tokenizer import END_OF_TEXT, train_tokenizer
from flash.errors import InputError
from tests.conftest import opened
from tests.data.odd_files import lines


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = train_tokenizer([f"say number {i} yes word" for i in range(300)], 400)
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return made


def chat(number: int, answered: bool = True) -> dict:
    messages = [{"role": "user", "content": f"say {number}"}]
    return {
        "messages": [*messages, {"role": "assistant", "content": f"yes {number}"}][: 1 + answered]
    }


def settings_of(path, kind=DataKind.datasets, source=None, **changes) -> DataSettings:
    column = "messages" if kind is DataKind.chat else "text"
    source = {"path": str(path), "column": column, **(source or {})}
    if kind is DataKind.chat:
        changes["chat_template"] = "conf/data/chatml.jinja"
    values = {"seq_len": 40, "validation_percent": 20, **changes}
    return DataSettings(name="t", kind=kind, sources=[TextSourceSettings(**source)], **values)


def packed(settings, tokenizer, tmp_path) -> PackedData:
    tokenizer = opened(tokenizer, tmp_path / ".tokenizer")
    return PackedData(settings, tokenizer, batch_size=4, seed=0, cache=tmp_path / "cache")


def numbers_in(tokens: torch.Tensor, tokenizer) -> list[int]:
    text = tokenizer.decode(tokens.flatten().tolist(), skip_special_tokens=False)
    return [int(found) for found in re.findall(r"(?:yes|word) (\d+)[.<]", text)]


def test_twenty_chats_are_trained_on(tmp_path, tokenizer):
    rows = [chat(i) for i in range(20)]
    (tmp_path / "chats.jsonl").write_bytes(lines(*rows))
    settings = settings_of(tmp_path / "chats.jsonl", DataKind.chat)
    data = packed(settings, tokenizer, tmp_path)
    sequences = data.train_set
    assert isinstance(sequences, StreamedSequences)
    assert sequences.logical_shards in {2, 4}
    batches = iter(PackedDataModule(data).train_dataloader())
    seen = Counter(n for _ in range(40) for n in numbers_in(next(batches).tokens, tokenizer))
    trained = [i for i, row in enumerate(rows) if not in_validation_split(row["messages"], 20)]
    assert sorted(seen) == trained
    assert max(seen.values()) < 2 * min(seen.values())
    assert packed(settings, tokenizer, tmp_path).digest == data.digest
    fewer = settings_of(tmp_path / "chats.jsonl", DataKind.chat, logical_shards=1)
    assert packed(fewer, tokenizer, tmp_path).digest != data.digest


def test_small_data_resume_in_the_middle(tmp_path, tokenizer):
    (tmp_path / "chats.jsonl").write_bytes(lines(*(chat(i) for i in range(20))))
    settings = settings_of(tmp_path / "chats.jsonl", DataKind.chat, workers=2)
    whole = iter(PackedDataModule(packed(settings, tokenizer, tmp_path)).train_dataloader())
    batches = [next(whole) for _ in range(9)]
    data = packed(settings_of(tmp_path / "chats.jsonl", DataKind.chat), tokenizer, tmp_path)
    module, states = PackedDataModule(data), data.train_set.initial_states()  # pyright: ignore
    for batch in batches[:5]:
        for state in batch.stream_state:  # pyright: ignore
            states[int(state[0])] = state
    module.load_state_dict({"steps": 5, "stream_states": states})
    resumed = iter(module.train_dataloader())
    assert all(torch.equal(next(resumed).tokens, batch.tokens) for batch in batches[5:])


@pytest.mark.parametrize("logical_shards", [1, 2, 12, 64])
def test_every_shard_has_lines_of_a_text_in_double_space(tmp_path, tokenizer, logical_shards):
    (tmp_path / "a.txt").write_text("\n\n".join(f"word {i}." for i in range(900)), "utf-8")
    source = {"unit": DocumentUnit.line}
    settings = settings_of(tmp_path / "a.txt", source=source, logical_shards=logical_shards)
    sequences = packed(settings, tokenizer, tmp_path).train_set
    assert isinstance(sequences, StreamedSequences)
    assert sequences.logical_shards == logical_shards
    seen = {
        number
        for sequence in first_sequences(sequences, 600)
        for number in numbers_in(sequence.tokens, tokenizer)
    }
    assert seen == {i for i in range(900) if not in_validation_split(f"word {i}.", 20)}


@pytest.mark.parametrize("period", [2, 4, 8, 64])
def test_rows_of_use_that_come_in_a_rhythm_reach_every_shard(tmp_path, tokenizer, period):
    rows = [chat(i, answered=i % period == 1) for i in range(30 * period * 16)]
    (tmp_path / "chats.jsonl").write_bytes(lines(*rows))
    settings = settings_of(tmp_path / "chats.jsonl", DataKind.chat, logical_shards=16)
    sequences = packed(settings, tokenizer, tmp_path).train_set
    assert sequences.logical_shards == 16  # pyright: ignore


@pytest.mark.parametrize(("files", "rows"), [(1, 1), (1, 2), (64, 1), (3, 7), (90, 2), (700, 1)])
def test_any_small_data_are_read_whole(tmp_path, tokenizer, files, rows):
    texts = [f"word {i}." for i in range(files * rows)]
    for i in range(files):
        part = [{"text": text} for text in texts[i * rows : (i + 1) * rows]]
        (tmp_path / f"{i}.jsonl").write_bytes(lines(*part))
    (tmp_path / "held.txt").write_text("word 1. " * 40, "utf-8")
    held = TextSourceSettings(path=str(tmp_path / "held.txt"))
    settings = settings_of(tmp_path / "*.jsonl", validation=held)
    sequences = packed(settings, tokenizer, tmp_path).train_set
    assert isinstance(sequences, StreamedSequences)
    assert sequences.logical_shards <= max(1, len(texts) // 4)
    seen = {
        number
        for sequence in first_sequences(sequences, 3 * len(texts) + 40)
        for number in numbers_in(sequence.tokens, tokenizer)
    }
    assert seen == set(range(len(texts)))


def test_sources_without_documents_are_refused_with_their_size(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": text} for text in ("", None, ""))))
    expected = r"sources\[0\]\.path=.*0 documents with text in 3 rows, \d of which .* one or more"
    with pytest.raises(InputError, match=expected):
        packed(settings_of(tmp_path / "a.jsonl"), tokenizer, tmp_path)
    (tmp_path / "b.jsonl").write_bytes(lines(*(chat(i, answered=False) for i in range(9))))
    expected = (
        r"0 documents with assistant tokens among the first 41 \(data\.seq_len \+ 1\) in 9 rows, "
        r"\d of which .* expected one or more$"
    )
    with pytest.raises(InputError, match=expected):
        packed(settings_of(tmp_path / "b.jsonl", DataKind.chat), tokenizer, tmp_path)
    (tmp_path / "c.txt").write_text("word 1. " * 40, "utf-8")
    expected = r"in 1 rows, 1 .*: lower data\.validation_percent=99, or set data\.validation$"
    with pytest.raises(InputError, match=expected):
        packed(settings_of(tmp_path / "c.txt", validation_percent=99), tokenizer, tmp_path)


def test_more_ranks_than_shards_are_refused_before_the_first_step(tmp_path, tokenizer):
    (tmp_path / "chats.jsonl").write_bytes(lines(*(chat(i) for i in range(20))))
    settings = settings_of(tmp_path / "chats.jsonl", DataKind.chat)
    sequences = packed(settings, tokenizer, tmp_path).train_set
    assert isinstance(sequences, StreamedSequences)
    stream = SequenceStream(sequences, Share(8, 8), 0, sequences.initial_states())
    with pytest.raises(InputError, match=r"logical_shards: \d have 4 .* multiple of 8 ranks"):
        StreamLoader(stream, 2)


@pytest.mark.parametrize("kind", [DataKind.datasets, DataKind.chat])
def test_the_share_that_an_empty_validation_split_is_told_is_enough(tmp_path, tokenizer, kind):
    rows = [chat(i) if kind is DataKind.chat else {"text": f"word {i}."} for i in range(30)]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows))
    settings = settings_of(tmp_path / "a.jsonl", kind, validation_percent=1)
    with pytest.raises(InputError) as caught:
        packed(settings, tokenizer, tmp_path)
    found = re.fullmatch(
        r"data\.validation_percent=1: holds out (\d+) of (\d+) .*; expected (\d+) or more for a "
        r"sequence: set it to (\d+) or more, or give more text, or name data\.validation",
        str(caught.value),
    )
    assert found is not None
    held, total, needed, share = map(int, found.groups())
    assert held < needed < total
    settings.validation_percent = share - 1
    with pytest.raises(InputError):
        packed(settings, tokenizer, tmp_path)
    settings.validation_percent = share
    assert len(packed(settings, tokenizer, tmp_path).validation_set) >= 1


def test_splits_of_few_files_are_told_what_is_enough(tmp_path, tokenizer):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"word {i}. " * 40, "utf-8")
    values = {"name": "t", "kind": DataKind.folder, "path": str(tmp_path), "pattern": "*.txt"}
    settings = DataSettings(**values, validation_percent=1, seq_len=40)
    with pytest.raises(InputError, match=r"split of 3 files empty; expected \d+ to \d+") as caught:
        packed(settings, tokenizer, tmp_path)
    for share in re.findall(r"(\d+) to (\d+)", str(caught.value))[0]:
        settings.validation_percent = int(share)
        data = packed(settings, tokenizer, tmp_path)
        assert len(next(iter(PackedDataModule(data).train_dataloader())).tokens) == 4
    settings.seq_len = 5000
    with pytest.raises(InputError, match=r"seq_len=5000: .* at most \d+, as the train split has"):
        packed(settings, tokenizer, tmp_path)
    for path in ("1.txt", "2.txt"):
        (tmp_path / path).unlink()
    with pytest.raises(InputError, match=r"split of 1 files empty; expected more files"):
        packed(settings, tokenizer, tmp_path)


def test_skipped_rows_are_counted_once_at_the_end(tmp_path, tokenizer, caplog):
    good = [{"text": f"word {i}."} for i in range(200)]
    (tmp_path / "a.jsonl").write_bytes(lines(*good[:100], 5, *good[100:], b"{", {"body": 1}))
    (tmp_path / "b.jsonl").write_bytes(lines(*good, {"text": 1}))
    settings = settings_of(tmp_path, skip_damaged=True, logical_shards=4, validation_sequences=1)
    gc.disable()  # readers that were dropped, as those of the validation, are not waited for
    try:
        data = packed(settings, tokenizer, tmp_path)
        batches = iter(PackedDataModule(data).train_dataloader())
        for _ in range(60):
            next(batches)
    finally:
        gc.enable()
    counts = [message for message in caplog.messages if "were skipped" in message]
    assert [re.sub(r"\S*/", "", message) for message in counts] == [
        "data.sources[0]: a.jsonl: rows that were skipped: 3",
        "data.sources[0]: b.jsonl: rows that were skipped: 1",
    ]
    firsts = [message for message in caplog.messages if "it is skipped" in message]
    assert len(firsts) == 2
    settings.skip_damaged = False
    with pytest.raises(InputError, match=r"[ab]\.jsonl, row \d+: .*skip_damaged=true"):
        next(
            batch
            for batch in PackedDataModule(packed(settings, tokenizer, tmp_path)).train_dataloader()
            if batch is None
        )


@pytest.mark.parametrize("special", [True, False])
def test_texts_that_mention_end_of_text_are_one_document(tmp_path, tokenizer, special):
    """Also where a tokenizer.json does not mark the token as special."""
    description = json.loads(tokenizer.to_str())
    for token in description["added_tokens"]:
        token["special"] = special
    tokenizer, end = Tokenizer.from_str(json.dumps(description)), 0
    assert tokenizer.token_to_id(END_OF_TEXT) == end
    texts = [f"word {i} {END_OF_TEXT} <|im_end|> word {i}." for i in range(30)]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text, "utf-8")
    values = {"seq_len": 8, "document_masks": True, "validation_percent": 20}
    indexed = DataSettings(
        name="t", kind=DataKind.folder, path=str(folder), pattern="*.txt", **values
    )
    own = opened(tokenizer, tmp_path / "tokenizer")
    splits = open_splits(indexed, own, seed=0, cache=tmp_path)
    found = np.split(splits.train.tokens, np.flatnonzero(splits.train.tokens == end) + 1)  # pyright: ignore
    decoded = {tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False) for part in found}
    assert decoded - {""} == {
        text
        for text in texts
        if tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) in decoded
    }
    assert len(decoded - {""}) == len(found) - 1 >= 15
    streamed = settings_of(folder, logical_shards=1, **values)
    sequences = open_splits(streamed, own, seed=0, cache=tmp_path).train
    assert isinstance(sequences, StreamedSequences)
    stream = torch.cat([sequence.tokens[1:] for sequence in first_sequences(sequences, 200)])
    whole = [text for text in texts if not in_validation_split(text, 20)]
    ends = int((stream == end).sum())
    sizes = sum(len(sequences.encoder.encode([text])[0].tokens) for text in whole)  # pyright: ignore
    assert ends == pytest.approx(len(stream) * len(whole) / sizes, abs=2)


def test_fitted_shards_divide_the_chosen_number(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": f"word {i}."} for i in range(40))))
    settings = settings_of(tmp_path / "a.jsonl", logical_shards=15)
    sequences = packed(settings, tokenizer, tmp_path).train_set
    assert isinstance(sequences, StreamedSequences)
    assert sequences.logical_shards == 5
    assert fit_logical_shards(sequences) == sequences
