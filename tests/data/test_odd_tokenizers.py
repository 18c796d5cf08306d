"""Tokenizer folders of all kinds are read as transformers reads them, or refused in one line."""

import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from flash.data.corpus import PackedData
from flash.data.encoders import TextEncoder
from flash.data.packed import token_type, tokenize
from flash.data.settings import DataKind, DataSettings, TextSourceSettings
from flash.data.tokenizer import ByteCounter, load_tokenizer
from flash.errors import InputError
from flash.model.tokenizer import ModelTokenizer
from tests.data.odd_tokenizers import FOLDERS, TEXTS, byte_level, verdict

REFUSED = {
    "wordpiece": "tokenizer.json: model.type=WordPiece: expected BPE or Unigram",
    "no end at all": "names an end-of-text token; set data.end_of_text",
    "a damaged config": "tokenizer_config.json: damaged",
    "an id that is none": "config.json: eos_token_id=</s>: expected the id of a token",
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_as_transformers_reads_it(name, tmp_path):
    found = verdict(FOLDERS[name], tmp_path)
    if name in REFUSED:
        assert found.startswith("refused: ")
        assert REFUSED[name] in found
        assert "\n" not in found
    else:
        assert found == "right"


def test_an_id_beyond_any_vocabulary_is_refused_before_the_library_fills_the_hole(tmp_path):
    values = json.loads(byte_level(["</s>"]).to_str())
    values["model"]["vocab"]["a"] = 2**31
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values), "utf-8")
    with pytest.raises(InputError, match=r"model\.vocab=2147483648: expected an id below 16,777"):
        ModelTokenizer.open(path)


def settings_of(**changes) -> DataSettings:
    values = {"name": "t", "kind": DataKind.folder, "path": "unused", "seq_len": 16, **changes}
    return DataSettings(**values)


def path_of(name, folder):
    folder.mkdir(exist_ok=True)
    FOLDERS[name].write(folder)
    return folder / "tokenizer.json"


@pytest.mark.parametrize("name", ["tokenizer_config only", "config only", "sentencepiece bpe"])
def test_documents_begin_as_transformers_begins_a_text(name, tmp_path):
    tokenizer = load_tokenizer(path_of(name, tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    documents = TextEncoder(tokenizer).encode(list(TEXTS))
    for text, document in zip(TEXTS, documents, strict=True):
        assert document is not None
        assert document.tokens.tolist() == [*theirs(text).input_ids, tokenizer.end_of_text]


def test_packed_text_begins_with_begin_of_text(tmp_path, data_settings):
    tokenizer = load_tokenizer(path_of("tokenizer_config only", tmp_path / "model"))
    streams = tokenize(data_settings, tokenizer, tmp_path / "cache")
    for stream in (streams.train, streams.validation):
        starts = [0, *(np.flatnonzero(stream == tokenizer.end_of_text)[:-1] + 1)]
        assert len(starts) > 1
        assert set(stream[starts].tolist()) == {tokenizer.begin}
    data = PackedData(data_settings, tokenizer, batch_size=4, seed=0, cache=tmp_path / "cache")
    assert (next(data.calibration_batches(64)) == tokenizer.begin).any()


@pytest.mark.parametrize("begin", [True, False])
def test_begin_of_text_is_one_setting_that_the_result_keeps(begin, tmp_path):
    name = "config only" if begin else "template in a sequence"
    path = path_of(name, tmp_path / "source")
    plain = load_tokenizer(path, settings_of())
    tokenizer = load_tokenizer(path, settings_of(begin_of_text=begin))
    assert tokenizer.prefix == ((tokenizer.begin,) if begin else ())
    assert tokenizer.begin == plain.begin == 0
    assert tokenizer.digest != plain.digest
    result = tmp_path / "result"
    result.mkdir()
    tokenizer.write(result)
    again = ModelTokenizer.open(result / "tokenizer.json")
    assert (again.prefix, again.digest) == (tokenizer.prefix, tokenizer.digest)
    stock = AutoTokenizer.from_pretrained(result)
    assert stock(TEXTS[1]).input_ids == tokenizer.encode(TEXTS[1])
    assert load_tokenizer(path, settings_of(begin_of_text=not begin)).digest == plain.digest


def test_unusable_settings_of_begin_and_end_are_named(tmp_path):
    path = path_of("no end at all", tmp_path)
    with pytest.raises(InputError, match=r"data\.end_of_text=<e>: expected a token of .*json"):
        load_tokenizer(path, settings_of(end_of_text="<e>"))
    found = load_tokenizer(path, settings_of(end_of_text="<s>"))
    assert (found.end_of_text, found.ends) == (0, (0,))
    with pytest.raises(InputError, match=r"data\.begin_of_text=true: .* name no bos_token"):
        load_tokenizer(path, settings_of(end_of_text="<s>", begin_of_text=True))
    source = TextSourceSettings(path="x", column="messages")
    with pytest.raises(InputError, match="begin_of_text=true: expected null, it has no effect"):
        settings_of(kind=DataKind.chat, path=None, sources=[source], begin_of_text=True)


def test_another_end_of_documents_is_one_more_end_token(tmp_path):
    path = path_of("tokenizer_config only", tmp_path)
    found = load_tokenizer(path, settings_of(end_of_text="<e>"))
    assert (found.end_of_text, found.ends) == (2, (1, 2))
    assert found.digest != load_tokenizer(path).digest


def test_truncation_and_padding_are_left_out_of_what_is_written(tmp_path):
    path = path_of("truncation and padding", tmp_path / "source")
    (tmp_path / "written").mkdir()
    load_tokenizer(path).write(tmp_path / "written")
    before, after = (
        json.loads(each.read_text("utf-8"))
        for each in (path, tmp_path / "written" / "tokenizer.json")
    )
    assert before["truncation"] is not None
    assert before["padding"] is not None
    assert after == {**before, "truncation": None, "padding": None}


def test_ids_with_holes_need_a_wider_type(tmp_path):
    tokenizer = load_tokenizer(path_of("holes", tmp_path))
    assert tokenizer.backend.get_vocab_size() < 1 << 16 < tokenizer.size
    assert token_type(tokenizer) is np.uint32
    with pytest.raises(InputError, match="has 70001 entries: expected at most the model's"):
        tokenizer.require_fits(70_000)


def test_ids_beyond_the_vocabulary_are_left_out_with_a_warning(tmp_path, caplog):
    folder = replace(FOLDERS["config only"], config={"vocab_size": 400, "eos_token_id": [1, 400]})
    folder.write(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").ends == (1,)
    assert "config.json: eos_token_id=400 is not below vocab_size=400" in caplog.text


def test_a_named_token_that_is_not_there_is_left_out_with_a_warning(tmp_path, caplog):
    folder = replace(FOLDERS["config only"], tokenizer_config={"eos_token": "<none>"})
    folder.write(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").ends == (1, 2)
    assert "has no '<none>', the eos_token of the files beside it" in caplog.text


BYTES = ["sentencepiece bpe", "sentencepiece without begin", "unigram", "tokenizer_config only"]


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_documents_are_those_of_their_texts(name, tmp_path):
    tokenizer = load_tokenizer(path_of(name, tmp_path))
    documents = TextEncoder(tokenizer).encode(list(TEXTS))
    stream = np.concatenate([document.tokens for document in documents])
    stream = np.array([tokenizer.end_of_text, *stream])
    count = ByteCounter(tokenizer).count(stream[:-1], stream[1:])
    assert count == sum(len(text.encode()) for text in TEXTS)


ODD_FILES = {
    "tokenizer_config.json": [
        ('{"eos_token": 5}', "tokenizer_config.json: eos_token=5: expected a token"),
        ('{"chat_template": ["a"]}', "tokenizer_config.json: chat_template="),
        ('{"chat_template": 5}', "tokenizer_config.json: chat_template=5: expected a text"),
        ('{"bos_token": "\\ud800"}', "tokenizer_config.json: damaged"),
        ("[" * 10**5, "tokenizer_config.json: damaged"),
    ],
    "special_tokens_map.json": [('{"pad_token": []}', "special_tokens_map.json: pad_token=[]")],
    "generation_config.json": [(f'{{"eos_token_id": {2**70}}}', "eos_token_id=")],
    "chat_template.jinja": [("\udcff", "chat_template.jinja: is not UTF-8")],
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_values_that_cannot_be_meant_are_named_in_one_line(name, tmp_path):
    path = path_of("tokenizer_config only", tmp_path)
    end = ModelTokenizer.open(path).special["eos_token"]
    for content, message in ODD_FILES[name]:
        (tmp_path / name).write_text(content, "utf-8", "surrogateescape")
        with pytest.raises(InputError) as refused:
            ModelTokenizer.open(path, end_of_text=end)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)


def test_a_post_processor_must_keep_the_text_and_know_its_tokens(tmp_path):
    path = path_of("tokenizer_config only", tmp_path)
    values = json.loads(path.read_text("utf-8"))
    text, token = {"Sequence": {"id": "A", "type_id": 0}}, {"id": "x", "type_id": 0}
    for single, message in [
        ([{"SpecialToken": token}], "post_processor.single="),
        ([text, text], "post_processor.single="),
        ([{"SpecialToken": token}, text], "post_processor=99999: expected ids of tokens"),
    ]:
        values["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"x": {"id": "x", "ids": [99999], "tokens": ["x"]}},
        }
        path.write_text(json.dumps(values), "utf-8")
        with pytest.raises(InputError, match=message):
            ModelTokenizer.open(path)


def test_a_token_that_texts_are_made_of_ends_no_document(tmp_path):
    byte_level(["<end>"]).save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "tokenizer.json"
    assert ModelTokenizer.open(path, end_of_text="<end>").end_of_text == 0
    with pytest.raises(InputError, match=r"data.end_of_text=a: expected a token of its own"):
        ModelTokenizer.open(path, end_of_text="a")
    with pytest.raises(InputError, match=r"data.end_of_text=<no>: expected a token of .*none"):
        ModelTokenizer.open(path, end_of_text="<no>")
