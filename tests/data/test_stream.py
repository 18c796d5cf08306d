"""Streamed data on real files: every guarantee by counting."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from flash.data.encoders import TextEncoder, is_held_out
from flash.data.factory import open_source
from flash.data.module import PackedData
from flash.data.sampler import Share
from flash.data.settings import DataKind, DataSettings, DocumentUnit, TextSourceSettings
from flash.data.sources import TextSource
from flash.data.stream import Batches, Corpus, Side, Stream, pieces_of
from flash.data.tokenizer import train_tokenizer
from flash.errors import InputError

SEQ_LEN = 16


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [f"alpha{i} beta{i % 7} gamma" for i in range(200)]
    return train_tokenizer(texts, 320)


def texts(start: int, count: int) -> list[str]:
    """Documents that are all different, of very different lengths."""
    return [f"<{start + i}>" + " word" * (1 + (start + i) * 7 % 40) for i in range(count)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same kind of documents as parquet (3 files), jsonl and text."""
    folder = tmp_path_factory.mktemp("files")
    for i in range(3):
        table = pa.table({"id": list(range(50)), "text": texts(i * 50, 50)})
        pq.write_table(table, folder / f"part{i}.parquet", row_group_size=13)
    lines = [json.dumps({"content": text}) for text in texts(1000, 120)]
    (folder / "code.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "lines.txt").write_text("\n".join(texts(2000, 60)) + "\n", "utf-8")
    return folder


def corpus_of(files, tokenizer, parts=None, **changes) -> Corpus:
    settings = parts or [TextSourceSettings(path=str(files / "*.parquet"))]
    opened = [TextSource(p, f"data.parts[{i}]", skip_damaged=False) for i, p in enumerate(settings)]
    encoder = TextEncoder(tokenizer)
    values = {"lanes": 12, "seed": 5, **changes}
    return Corpus(opened, encoder, SEQ_LEN, encoder.end_of_text, **values)


def take(corpus, world_size, workers, steps, *, batch_size=12, start=0, places=None):
    """Global batches (in the order of their sequences), and the places after the last of them."""
    places = corpus.first_places() if places is None else places
    ranks = []
    for rank in range(world_size):
        stream = Stream(corpus, Share(batch_size, world_size, rank), start, places.clone())
        ranks.append(iter(Batches(stream, workers)))
    batches, places = [], places.clone()
    for _ in range(steps):
        mine = [next(rank) for rank in ranks]
        for batch in mine:
            for place in batch.place:
                places[int(place[0])] = place
        rows = [mine[g % world_size].tokens[g // world_size] for g in range(batch_size)]
        batches.append(torch.stack(rows))
    del ranks
    return torch.stack(batches), places


def documents_in(windows, corpus) -> list[list[int]]:
    """Documents of consecutive windows of one lane, the last, unfinished one left out."""
    stream = [int(windows[0][0])] + [int(t) for window in windows for t in window[1:]]
    found: list[list[int]] = [[]]
    for token in stream:
        found[-1].append(token)
        if token == corpus.end_of_text:
            found.append([])
    return found[:-1]


def encoded(corpus, values) -> list[tuple[int, ...]]:
    return [tuple(d.tokens.tolist()) for d in corpus.encoder.encode(values) if d is not None]


def test_every_document_is_seen_once_an_epoch(files, tokenizer):
    corpus = corpus_of(files, tokenizer)
    batches, _ = take(corpus, 1, 0, steps=200)
    by_lane = batches.flatten(0, 1)
    first_epoch: Counter = Counter()
    for lane in range(corpus.lanes):
        found = [tuple(d) for d in documents_in(by_lane[lane :: corpus.lanes], corpus)]
        size = sum(
            len(range(piece.offset, 50, piece.stride)) for piece in pieces_of(3, lane, corpus.lanes)
        )
        assert len(found) > 2 * size  # two whole epochs at least
        assert sorted(found[:size]) == sorted(found[size : 2 * size])
        assert found[:size] != found[size : 2 * size]  # in another order
        first_epoch.update(found[:size])
    assert first_epoch == Counter(encoded(corpus, texts(0, 150)))


@pytest.mark.parametrize("lanes", [1, 4, 12, 64])
@pytest.mark.parametrize("num_files", [1, 3, 40, 1000])
def test_lanes_share_all_rows_evenly(num_files, lanes):
    rows = 130
    seen: Counter = Counter()
    sizes = []
    for lane in range(lanes):
        mine = [
            (piece.file, row)
            for piece in pieces_of(num_files, lane, lanes)
            for row in range(piece.offset, rows, piece.stride)
        ]
        seen.update(mine)
        sizes.append(len(mine))
    assert len(seen) == num_files * rows
    assert set(seen.values()) == {1}
    assert max(sizes) <= 1.6 * min(sizes) + 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 2), (2, 3), (6, 1)])
def test_ranks_and_workers_change_nothing(files, tokenizer, world_size, workers):
    corpus = corpus_of(files, tokenizer)
    whole, end = take(corpus, 1, 0, steps=5)
    dealt, dealt_end = take(corpus, world_size, workers, steps=5)
    assert torch.equal(dealt, whole)
    assert torch.equal(dealt_end, end)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_runs_go_on_with_other_numbers_of_ranks_and_workers(files, tokenizer):
    parts = [
        TextSourceSettings(path=str(files / "*.parquet"), weight=2.0),
        TextSourceSettings(path=str(files / "code.jsonl"), column="content"),
    ]
    corpus = corpus_of(files, tokenizer, parts)
    whole, _ = take(corpus, 1, 0, steps=20)
    places, done = None, 0
    for world_size, workers, steps in ((2, 2, 3), (1, 0, 4), (3, 1, 6), (1, 3, 7)):
        some, places = take(corpus, world_size, workers, steps, start=done, places=places)
        assert torch.equal(some, whole[done : done + steps])
        done += steps


def test_resuming_tokenises_one_document_again_at_most(files, tokenizer, monkeypatch):
    corpus = corpus_of(files, tokenizer, lanes=1)
    _, places = take(corpus, 1, 0, steps=8, batch_size=4)
    encodings = []
    encode = corpus.encoder.encode
    monkeypatch.setattr(corpus.encoder, "encode", lambda v: encodings.append(v) or encode(v))
    stream = iter(Stream(corpus, Share(4), 8, places))
    first = next(stream)
    needed = int((first.tokens == corpus.end_of_text).sum())
    assert len(encodings) <= needed + 2


def test_mixtures_keep_their_weights_in_tokens(files, tokenizer):
    parts = [
        TextSourceSettings(path=str(files / "*.parquet"), weight=0.7),
        TextSourceSettings(path=str(files / "code.jsonl"), column="content", weight=0.2),
        TextSourceSettings(path=str(files / "lines.txt"), unit=DocumentUnit.line, weight=0.1),
    ]
    corpus = corpus_of(files, tokenizer, parts, lanes=1)
    batches, _ = take(corpus, 1, 0, steps=1, batch_size=6000)
    shares: Counter = Counter()
    for document in documents_in(batches[0], corpus):
        number = int(tokenizer.decode(document).split(">")[0].strip("<"))
        shares[min(number // 1000, 2)] += len(document)
    total = sum(shares.values())
    for part, weight in enumerate((0.7, 0.2, 0.1)):
        assert shares[part] / total == pytest.approx(weight, abs=0.02)


def test_held_out_documents_are_never_trained_on(files, tokenizer, tmp_path):
    settings = DataSettings(
        name="t",
        source=DataKind.datasets,
        parts=[TextSourceSettings(path=str(files / "*.parquet"))],
        heldout_percent=20,
        seq_len=SEQ_LEN,
        heldout_sequences=10_000,
        lanes=1,
    )
    opened = open_source(settings, tokenizer, seed=0, cache=tmp_path, folder=None)
    corpus = opened.train
    assert isinstance(corpus, Corpus)
    held = [text for text in texts(0, 150) if is_held_out(text, 20)]
    assert 0 < len(held) < 150
    heldout = [opened.heldout[i].tokens for i in range(len(opened.heldout))]
    seen = {tuple(d) for d in documents_in(heldout, corpus)}
    assert seen <= set(encoded(corpus, held))
    assert len(seen) >= len(held) - 1  # the last, incomplete sequence is left out
    batches, _ = take(corpus, 1, 0, steps=100)
    trained = {tuple(d) for d in documents_in(batches.flatten(0, 1), corpus)}
    assert trained == set(encoded(corpus, [t for t in texts(0, 150) if t not in held]))


def test_held_out_text_can_be_a_part_of_its_own(files, tokenizer, tmp_path):
    settings = DataSettings(
        name="t",
        source=DataKind.datasets,
        parts=[TextSourceSettings(path=str(files / "*.parquet"))],
        heldout=TextSourceSettings(path=str(files / "lines.txt"), unit=DocumentUnit.line),
        seq_len=SEQ_LEN,
        heldout_sequences=0,
        lanes=1,
    )
    data = PackedData(settings, tokenizer, batch_size=2, seed=0, cache=tmp_path)
    rows = [batch.tokens for batch in data.val_dataloader()]
    assert "<20" in tokenizer.decode(torch.cat(rows).flatten().tolist())
    corpus = data.train_set
    assert isinstance(corpus, Corpus)
    assert corpus.side is Side.all
    assert sum(len(r) for r in rows) == len(data.heldout_set)  # pyright: ignore


def test_documents_are_numbered_for_masks(files, tokenizer):
    corpus = corpus_of(files, tokenizer, document_masks=True, lanes=1)
    for sequence in corpus.first(20):
        assert sequence.documents is not None
        ends = sequence.tokens[:-1] == corpus.end_of_text
        expected = torch.cat([torch.zeros(1, dtype=torch.long), ends.cumsum(0)[:-1]])
        assert torch.equal(sequence.documents, expected)


def test_calibration_reads_the_training_stream(files, tokenizer, tmp_path):
    settings = DataSettings(
        name="t",
        source=DataKind.datasets,
        parts=[TextSourceSettings(path=str(files / "*.parquet"))],
        seq_len=SEQ_LEN,
        heldout_sequences=2,
        lanes=4,
    )
    data = PackedData(settings, tokenizer, batch_size=3, seed=0, cache=tmp_path)
    batches = list(data.calibration_batches(SEQ_LEN * 8))
    assert [b.shape for b in batches] == [(3, SEQ_LEN), (3, SEQ_LEN), (2, SEQ_LEN)]
    first = next(iter(data.train_dataloader())).tokens
    assert torch.equal(batches[0], first[:, :-1])


def test_lanes_that_ranks_and_workers_cannot_share_are_named(files, tokenizer):
    corpus = corpus_of(files, tokenizer)
    stream = Stream(corpus, Share(10, 2), 0, corpus.first_places())
    with pytest.raises(InputError, match=r"data\.lanes=12: .*2 ranks.*workers=4; .*1, 2, 3, 6"):
        Batches(stream, 4)
    stream = Stream(corpus, Share(10, 5), 0, corpus.first_places())
    with pytest.raises(InputError, match=r"another number of ranks"):
        Batches(stream, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_lanes_without_documents_are_named(tmp_path, tokenizer, workers):
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', "utf-8")
    corpus = corpus_of(None, tokenizer, [TextSourceSettings(path=str(tmp_path / "few.jsonl"))])
    batches = Batches(Stream(corpus, Share(12), 0, corpus.first_places()), workers)
    with pytest.raises(InputError, match=r"data\.parts\[0\]\.path=.*lane 2 of 12.*lower data\.lan"):
        next(iter(batches))


def test_bad_parts_are_named(files, tmp_path):
    def opened(**changes):
        return TextSource(TextSourceSettings(**changes), "data.parts[1]", skip_damaged=False)

    with pytest.raises(InputError, match=r"data\.parts\[1\]\.column=txt: .*id, text"):
        opened(path=str(files / "*.parquet"), column="txt")
    with pytest.raises(InputError, match=r"data\.parts\[1\]\.column=text: .*content"):
        opened(path=str(files / "code.jsonl"))
    with pytest.raises(InputError, match=r"none\.parquet: no such file"):
        opened(path=str(tmp_path / "none.parquet"))
    with pytest.raises(InputError, match=r"found none"):
        opened(path=str(tmp_path / "*.parquet"))
    (tmp_path / "empty.jsonl").write_text("", "utf-8")
    with pytest.raises(InputError, match=r"expected a file with something in it"):
        opened(path=str(tmp_path / "empty.jsonl"))
    (tmp_path / "bad.jsonl").write_text("no json\n", "utf-8")
    with pytest.raises(InputError, match=r"data\.parts\[1\]\.path=.*bad\.jsonl: cannot be read"):
        opened(path=str(tmp_path / "bad.jsonl"))
    with pytest.raises(InputError, match=r"expected files of one kind"):
        opened(path=str(files))
    with pytest.raises(InputError, match=r"data\.parts\[1\]\.path=owner/name: .*cannot be reached"):
        opened(path="owner/name")


def test_columns_of_another_kind_are_named(files, tokenizer):
    part = TextSourceSettings(path=str(files / "*.parquet"), column="id")
    with pytest.raises(InputError, match=r"data\.parts\[0\]\.column=id: expected text, found int"):
        next(corpus_of(files, tokenizer, [part]).first(1))


def test_nothing_held_out_is_named(tmp_path, tokenizer):
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', "utf-8")
    settings = DataSettings(
        name="t",
        source=DataKind.datasets,
        parts=[TextSourceSettings(path=str(tmp_path / "few.jsonl"))],
        heldout_percent=1,
        seq_len=4,
        lanes=1,
    )
    with pytest.raises(InputError, match=r"data\.heldout_percent=1: gives less than a sequence"):
        open_source(settings, tokenizer, seed=0, cache=tmp_path, folder=None)


@pytest.mark.parametrize("damage", ["footer", "page"])
def test_damaged_files_are_named_and_left_out_only_if_told(tmp_path, tokenizer, damage, caplog):
    for i in range(2):
        table = pa.table({"text": texts(i * 50, 50)})
        pq.write_table(table, tmp_path / f"part{i}.parquet", compression="zstd")
    path = tmp_path / "part1.parquet"
    content = bytearray(path.read_bytes())
    if damage == "footer":
        content = content[:-20]
    else:
        content[20:200] = bytes(180)
    path.write_bytes(content)
    settings = TextSourceSettings(path=str(tmp_path / "*.parquet"))

    def read(skip_damaged):
        part = TextSource(settings, "data.parts[0]", skip_damaged=skip_damaged)
        return [v for file in range(part.num_files) for v in part.values(file, 0, 1, 0)]

    with pytest.raises(InputError, match=r"part1\.parquet is damaged.*skip_damaged"):
        read(skip_damaged=False)
    assert read(skip_damaged=True) == texts(0, 50)
    assert "part1.parquet is damaged and left out" in caplog.text


def test_rows_are_strided_across_batches_of_a_file(tmp_path):
    rows = [str(i) for i in range(2500)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=700)
    part = TextSource(TextSourceSettings(path=str(tmp_path / "a.parquet")), "k", skip_damaged=False)
    assert list(part.values(0, 3, 7, 0)) == rows[3::7]
    assert list(part.values(0, 3, 7, 200)) == rows[3::7][200:]
    assert list(islice(part.values(0, 0, 1, 1234), 3)) == rows[1234:1237]
    assert np.array_equal(list(part.values(0, 6, 1000, 1)), ["1006", "2006"])
