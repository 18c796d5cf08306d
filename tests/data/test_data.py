from itertools import islice

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram

from flash.data.corpus import PackedData, find_tokenizer
from flash.data.encoders import EncodedDocument, TextEncoder
from flash.data.files import find_documents, read_documents
from flash.data.packed import PackedSequences, tokenize
from flash.data.sampler import ResumableBatchSampler, Share
from flash.data.settings import DataKind, DataSettings
from flash.data.tokenizer import load_tokenizer, token_bytes
from flash.errors import InputError
from tests.conftest import opened


@pytest.fixture
def tokenizer(data_settings, tmp_path):
    return load_tokenizer(find_tokenizer(data_settings, None, tmp_path))


def test_held_out_files_are_in_no_training_stream(data_settings, tokenizer, tmp_path):
    streams = tokenize(data_settings, tokenizer, tmp_path)
    documents = find_documents(data_settings)
    held = [d for d in documents if d.in_validation_split(20)]
    assert 0 < len(held) < len(documents)
    end = tokenizer.backend.token_to_id("<|endoftext|>")
    for split, members in (
        (streams.validation, held),
        (streams.train, [d for d in documents if not d.in_validation_split(20)]),
    ):
        decoded = [
            tokenizer.decode(part[part != end].tolist())
            for part in np.split(split, np.flatnonzero(split == end) + 1)[:-1]
        ]
        assert decoded == [d.path.read_text("utf-8") for d in members]


def test_the_split_depends_on_the_relative_path_alone(data_settings, corpus, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    for path in corpus.iterdir():
        (other / path.name).write_text("other text", "utf-8")
    moved = DataSettings(**{**vars(data_settings), "path": str(other)})
    split = {d.name: d.in_validation_split(20) for d in find_documents(data_settings)}
    assert split == {d.name: d.in_validation_split(20) for d in find_documents(moved)}


def test_bytes_per_token_add_up_to_the_text(data_settings, tokenizer, tmp_path):
    streams = tokenize(data_settings, tokenizer, tmp_path)
    lengths = token_bytes(tokenizer.backend)
    texts = [d for d in find_documents(data_settings) if not d.in_validation_split(20)]
    total = sum(len(d.path.read_bytes()) for d in texts)
    assert lengths[streams.train].sum() == total


def test_unchanged_texts_are_not_tokenized_again(data_settings, tokenizer, tmp_path, monkeypatch):
    first = tokenize(data_settings, tokenizer, tmp_path)
    monkeypatch.setattr("flash.data.packed._encode", pytest.fail)
    again = tokenize(data_settings, tokenizer, tmp_path)
    assert again.digest == first.digest
    assert np.array_equal(again.train, first.train)


@pytest.mark.parametrize("file", ["train.npy", "validation.npy", "summary.json"])
@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:-9], lambda whole: whole[:-9] + b"odd bytes"]
)
def test_damaged_streams_are_made_again(file, damage, data_settings, tokenizer, tmp_path, caplog):
    first = tokenize(data_settings, tokenizer, tmp_path)
    train, validation = np.array(first.train), np.array(first.validation)
    path = tmp_path / f"streams_{first.digest}" / file
    path.write_bytes(damage(path.read_bytes()))
    again = tokenize(data_settings, tokenizer, tmp_path)
    assert np.array_equal(again.train, train)
    assert np.array_equal(again.validation, validation)
    assert f"{path}: " in caplog.text
    assert "made again" in caplog.text


def test_a_damaged_trained_tokenizer_is_trained_again(data_settings, tmp_path, caplog):
    path = find_tokenizer(data_settings, None, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert find_tokenizer(data_settings, None, tmp_path) == path
    assert path.read_bytes() == whole
    assert "it is trained again" in caplog.text


def test_a_trained_tokenizer_belongs_to_its_text(data_settings, corpus, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in corpus.iterdir():
        (other / path.name).write_text(path.read_text("utf-8").upper(), "utf-8")
    moved = DataSettings(**{**vars(data_settings), "path": str(other)})
    first, second = (find_tokenizer(each, None, tmp_path) for each in (data_settings, moved))
    assert first != second
    assert find_tokenizer(data_settings, None, tmp_path) == first


def test_every_token_but_the_first_is_a_target_exactly_once():
    tokens = np.arange(101, dtype=np.uint16)
    packed = PackedSequences(tokens, 10, "train")
    targets = [int(t) for i in range(len(packed)) for t in packed[i].tokens[1:]]
    assert targets == list(range(1, 101))


def whole_batches(num_sequences, world_size, accumulation, steps, seed=3, start=0):
    """Global batches of 4, put together from all ranks and micro-batches."""
    shares = [Share(4, world_size, rank, accumulation) for rank in range(world_size)]
    ranks = [iter(ResumableBatchSampler(num_sequences, share, seed, start)) for share in shares]
    return [
        sorted(i for rank in ranks for _ in range(accumulation) for i in next(rank))
        for _ in range(steps)
    ]


def test_batches_resume_in_the_middle_of_an_epoch():
    whole = list(islice(ResumableBatchSampler(23, Share(4), seed=3), 17))
    for start in (1, 4, 5, 6, 12):
        resumed = list(islice(ResumableBatchSampler(23, Share(4), seed=3, start=start), 17 - start))
        assert resumed == whole[start:]
    assert whole[:5] != whole[5:10]
    assert whole != list(islice(ResumableBatchSampler(23, Share(4), seed=4), 17))


def test_each_epoch_has_every_sequence_once():
    batches = list(islice(ResumableBatchSampler(23, Share(4), seed=3), 23))
    seen = [i for batch in batches for i in batch]
    for epoch in range(4):
        assert sorted(seen[epoch * 23 : (epoch + 1) * 23]) == list(range(23))


def test_steps_are_the_same_on_any_number_of_ranks_and_micro_batches():
    whole = whole_batches(23, 1, 1, steps=17)
    for world_size, accumulation in ((2, 1), (1, 4), (2, 2), (4, 1)):
        assert whole_batches(23, world_size, accumulation, steps=17) == whole
        assert whole_batches(23, world_size, accumulation, steps=8, start=9) == whole[9:]


def test_indivisible_batches_are_named():
    with pytest.raises(InputError, match=r"recipe\.batch_size=8.*trainer\.devices.*micro_batch"):
        Share(8, world_size=3)


def test_a_batch_larger_than_the_data_holds_whole_epochs():
    batches = list(islice(ResumableBatchSampler(5, Share(8), seed=3), 5))
    seen = [i for batch in batches for i in batch]
    assert all(sorted(seen[e * 5 : (e + 1) * 5]) == list(range(5)) for e in range(8))
    assert list(islice(ResumableBatchSampler(5, Share(8), seed=3, start=2), 3)) == batches[2:]


def test_calibration_text_is_training_text(data_settings, tokenizer, tmp_path):
    data = PackedData(data_settings, tokenizer, batch_size=4, seed=0, cache=tmp_path)
    train = {tuple(data.train_set[i].tokens[:-1].tolist()) for i in range(len(data.train_set))}
    rows = [row for batch in data.calibration_batches(320) for row in batch]
    assert len(rows) == 10
    assert all(tuple(row.tolist()) in train for row in rows)


def test_bad_corpora_are_named(tmp_path, data_settings):
    missing = DataSettings(name="x", kind=DataKind.folder, path=str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"data\.path=.*none: expected a folder"):
        find_documents(missing)
    (tmp_path / "empty").mkdir()
    empty = DataSettings(name="x", kind=DataKind.folder, path=str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"expected files that match \*\.py, found none"):
        find_documents(empty)
    with pytest.raises(InputError, match=r"^path=null: expected a folder for kind=folder"):
        DataSettings(name="x", kind=DataKind.folder)
    with pytest.raises(InputError, match=r"^validation_percent=100: expected a whole number"):
        DataSettings(name="x", validation_percent=100)


def test_files_are_as_written_or_named(tmp_path, caplog):
    folder = tmp_path / "texts"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "a-checkpoint.py").write_text("copy", "utf-8")
    (folder / "a.py").write_bytes(b"\xef\xbb\xbfa = 1\r\n")
    settings = DataSettings(name="x", kind=DataKind.folder, path=str(folder))
    assert [text for _, text in read_documents(settings)] == ["a = 1\n"]
    (folder / "b.py").write_bytes(b"# caf\xe9")
    with pytest.raises(InputError, match=r"b\.py: is not UTF-8 \(byte 0xe9 at 5\); .*skip_damaged"):
        list(read_documents(settings))
    settings.skip_damaged = True
    assert [text for _, text in read_documents(settings)] == ["a = 1\n"]
    assert "b.py is not UTF-8 (byte 0xe9 at 5) and is skipped" in caplog.text


def test_a_text_that_cannot_be_told_from_end_of_text_is_an_error(tmp_path):
    """A SentencePiece vocabulary holds end-of-text as a piece of its own."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -1.0) for c in "abc ")]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0))
    tokenizer.add_special_tokens(["</s>"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', "utf-8")
    good, bad = TextEncoder(opened(tokenizer, tmp_path)).encode(["a b", "a </s> b"])
    assert isinstance(good, EncodedDocument)
    assert isinstance(bad, InputError)
    assert "mentions </s>, which this tokenizer cannot encode as text" in str(bad)


def test_bad_tokenizers_are_named(tmp_path, data_settings):
    named = DataSettings(**{**vars(data_settings), "tokenizer": str(tmp_path / "t.json")})
    with pytest.raises(InputError, match=r"t\.json: no such file"):
        find_tokenizer(named, None, tmp_path)
    (tmp_path / "t.json").write_text("{", "utf-8")
    with pytest.raises(InputError, match=r"t\.json: damaged"):
        find_tokenizer(named, None, tmp_path)
