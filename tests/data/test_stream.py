"""Streamed data on real files: every guarantee by counting."""

import json
from collections import Counter
from itertools import takewhile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset

from flash.data.corpus import PackedData
from flash.data.encoders import TextEncoder, in_validation_split
from flash.data.factory import open_splits
from flash.data.logical_shards import fit_logical_shards
from flash.data.mixture import FileSlices, Split, StreamedSequences
from flash.data.module import PackedDataModule
from flash.data.readers import _SHARED
from flash.data.sampler import Share
from flash.data.settings import DataKind, DataSettings, DocumentUnit, TextSourceSettings
from flash.data.sources import TextSource, rows_of
from flash.data.stream import SequenceStream, StreamLoader, first_sequences
from flash.data.tokenizer import train_tokenizer
from flash.errors import InputError
from flash.model.tokenizer import ModelTokenizer
from tests.conftest import opened

SEQ_LEN = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ModelTokenizer:
    texts = [f"alpha{i} beta{i % 7} gamma" for i in range(200)]
    return opened(train_tokenizer(texts, 320), tmp_path_factory.mktemp("tokenizer"))


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


def sequences_of(files, tokenizer, sources=None, **changes) -> StreamedSequences:
    settings = sources or [TextSourceSettings(path=str(files / "*.parquet"))]
    opened = [
        TextSource(source, f"data.sources[{i}]", skip_damaged=False)
        for i, source in enumerate(settings)
    ]
    encoder = TextEncoder(tokenizer)
    values = {"logical_shards": 12, "seed": 5, **changes}
    return StreamedSequences(opened, encoder, SEQ_LEN, tokenizer.end_of_text, **values)


def take(sequences, world_size, workers, steps, *, batch_size=12, start=0, states=None):
    """Global batches (in the order of their sequences), and the states after the last of them."""
    states = sequences.initial_states() if states is None else states
    ranks = []
    for rank in range(world_size):
        stream = SequenceStream(
            sequences, Share(batch_size, world_size, rank), start, states.clone()
        )
        ranks.append(iter(StreamLoader(stream, workers)))
    batches, states = [], states.clone()
    for _ in range(steps):
        mine = [next(rank) for rank in ranks]
        for batch in mine:
            for state in batch.stream_state:
                states[int(state[0])] = state
        rows = [mine[g % world_size].tokens[g // world_size] for g in range(batch_size)]
        batches.append(torch.stack(rows))
    del ranks
    return torch.stack(batches), states


def documents_in(windows, sequences) -> list[list[int]]:
    """Documents of consecutive windows of one logical shard, the last, unfinished one left out."""
    stream = [int(windows[0][0])] + [int(t) for window in windows for t in window[1:]]
    found: list[list[int]] = [[]]
    for token in stream:
        found[-1].append(token)
        if token == sequences.end_of_text:
            found.append([])
    return found[:-1]


def encoded(sequences, values) -> list[tuple[int, ...]]:
    return [tuple(d.tokens.tolist()) for d in sequences.encoder.encode(values) if d is not None]


def test_every_document_is_seen_once_an_epoch(files, tokenizer):
    sequences = sequences_of(files, tokenizer)
    batches, _ = take(sequences, 1, 0, steps=260)
    in_order = batches.flatten(0, 1)
    first_epoch: Counter = Counter()
    for shard in range(sequences.logical_shards):
        found = [
            tuple(d) for d in documents_in(in_order[shard :: sequences.logical_shards], sequences)
        ]
        size = sum(
            len(list(takewhile(lambda row: row < 50, rows_of(part.offset, part.stride, 0))))
            for part in FileSlices(3, shard, sequences.logical_shards)
        )
        assert len(found) > 2 * size  # two whole epochs at least
        assert sorted(found[:size]) == sorted(found[size : 2 * size])
        assert found[:size] != found[size : 2 * size]  # in another order
        first_epoch.update(found[:size])
    assert first_epoch == Counter(encoded(sequences, texts(0, 150)))


@pytest.mark.parametrize("logical_shards", [1, 4, 12, 64])
@pytest.mark.parametrize("num_files", [1, 3, 40, 1000])
def test_logical_shards_share_all_rows_evenly(num_files, logical_shards):
    rows = 130
    seen: Counter = Counter()
    sizes = []
    for shard in range(logical_shards):
        mine = [
            (part.file, row)
            for part in FileSlices(num_files, shard, logical_shards)
            for row in takewhile(lambda row: row < rows, rows_of(part.offset, part.stride, 0))
        ]
        seen.update(mine)
        sizes.append(len(mine))
    assert len(seen) == num_files * rows
    assert set(seen.values()) == {1}
    assert max(sizes) <= 1.6 * min(sizes) + 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (3, 2), (2, 3), (6, 1)])
def test_ranks_and_workers_change_nothing(files, tokenizer, world_size, workers):
    sequences = sequences_of(files, tokenizer)
    whole, end = take(sequences, 1, 0, steps=5)
    dealt, dealt_end = take(sequences, world_size, workers, steps=5)
    assert torch.equal(dealt, whole)
    assert torch.equal(dealt_end, end)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_runs_go_on_with_other_numbers_of_ranks_and_workers(files, tokenizer):
    sources = [
        TextSourceSettings(path=str(files / "*.parquet"), weight=2.0),
        TextSourceSettings(path=str(files / "code.jsonl"), column="content"),
    ]
    sequences = sequences_of(files, tokenizer, sources)
    whole, _ = take(sequences, 1, 0, steps=20)
    states, done = None, 0
    for world_size, workers, steps in ((2, 2, 3), (1, 0, 4), (3, 1, 6), (1, 3, 7)):
        some, states = take(sequences, world_size, workers, steps, start=done, states=states)
        assert torch.equal(some, whole[done : done + steps])
        done += steps


def test_resuming_tokenizes_one_document_again_at_most(files, tokenizer, monkeypatch):
    sequences = sequences_of(files, tokenizer, logical_shards=1)
    _, states = take(sequences, 1, 0, steps=8, batch_size=4)
    encodings = []
    encode = sequences.encoder.encode
    monkeypatch.setattr(sequences.encoder, "encode", lambda v: encodings.append(v) or encode(v))
    stream = iter(SequenceStream(sequences, Share(4), 8, states))
    first = next(stream)
    needed = int((first.tokens == sequences.end_of_text).sum())
    assert len(encodings) <= needed + 2


def test_mixtures_keep_their_weights_in_tokens(files, tokenizer):
    sources = [
        TextSourceSettings(path=str(files / "*.parquet"), weight=0.7),
        TextSourceSettings(path=str(files / "code.jsonl"), column="content", weight=0.2),
        TextSourceSettings(path=str(files / "lines.txt"), unit=DocumentUnit.line, weight=0.1),
    ]
    sequences = sequences_of(files, tokenizer, sources, logical_shards=1)
    batches, _ = take(sequences, 1, 0, steps=1, batch_size=6000)
    shares: Counter = Counter()
    for document in documents_in(batches[0], sequences):
        number = int(tokenizer.decode(document).split(">")[0].strip("<"))
        shares[min(number // 1000, 2)] += len(document)
    total = sum(shares.values())
    for part, weight in enumerate((0.7, 0.2, 0.1)):
        assert shares[part] / total == pytest.approx(weight, abs=0.02)


def test_held_out_documents_are_never_trained_on(files, tokenizer, tmp_path):
    settings = DataSettings(
        name="t",
        kind=DataKind.datasets,
        sources=[TextSourceSettings(path=str(files / "*.parquet"))],
        validation_percent=20,
        seq_len=SEQ_LEN,
        validation_sequences=10_000,
        logical_shards=1,
    )
    splits = open_splits(settings, tokenizer, seed=0, cache=tmp_path)
    sequences = splits.train
    assert isinstance(sequences, StreamedSequences)
    held = [text for text in texts(0, 150) if in_validation_split(text, 20)]
    assert 0 < len(held) < 150
    validation = [splits.validation[i].tokens for i in range(len(splits.validation))]
    seen = {tuple(d) for d in documents_in(validation, sequences)}
    assert seen <= set(encoded(sequences, held))
    assert len(seen) >= len(held) - 1  # the last, incomplete sequence is left out
    batches, _ = take(sequences, 1, 0, steps=100)
    trained = {tuple(d) for d in documents_in(batches.flatten(0, 1), sequences)}
    assert trained == set(encoded(sequences, [t for t in texts(0, 150) if t not in held]))


def test_validation_text_can_be_a_source_of_its_own(files, tokenizer, tmp_path):
    settings = DataSettings(
        name="t",
        kind=DataKind.datasets,
        sources=[TextSourceSettings(path=str(files / "*.parquet"))],
        validation=TextSourceSettings(path=str(files / "lines.txt"), unit=DocumentUnit.line),
        seq_len=SEQ_LEN,
        validation_sequences=0,
        logical_shards=1,
    )
    data = PackedData(settings, tokenizer, batch_size=2, seed=0, cache=tmp_path)
    rows = [batch.tokens for batch in PackedDataModule(data).val_dataloader()]
    assert "<20" in tokenizer.decode(torch.cat(rows).flatten().tolist())
    sequences = data.train_set
    assert isinstance(sequences, StreamedSequences)
    assert sequences.split is Split.all
    assert sum(len(r) for r in rows) == len(data.validation_set)  # pyright: ignore


def test_documents_are_numbered_for_masks(files, tokenizer):
    sequences = sequences_of(files, tokenizer, document_masks=True, logical_shards=1)
    for sequence in first_sequences(sequences, 20):
        assert sequence.document_ids is not None
        ends = sequence.tokens[:-1] == sequences.end_of_text
        expected = torch.cat([torch.zeros(1, dtype=torch.long), ends.cumsum(0)[:-1]])
        assert torch.equal(sequence.document_ids, expected)


def test_calibration_reads_the_training_stream(files, tokenizer, tmp_path):
    settings = DataSettings(
        name="t",
        kind=DataKind.datasets,
        sources=[TextSourceSettings(path=str(files / "*.parquet"))],
        seq_len=SEQ_LEN,
        validation_sequences=2,
        logical_shards=4,
    )
    data = PackedData(settings, tokenizer, batch_size=3, seed=0, cache=tmp_path)
    batches = list(data.calibration_batches(SEQ_LEN * 8))
    assert [b.shape for b in batches] == [(3, SEQ_LEN), (3, SEQ_LEN), (2, SEQ_LEN)]
    first = next(iter(PackedDataModule(data).train_dataloader())).tokens
    assert torch.equal(batches[0], first[:, :-1])


def test_workers_share_the_logical_shards_of_a_rank(files, tokenizer):
    sequences = sequences_of(files, tokenizer)
    stream = SequenceStream(sequences, Share(10, 2), 0, sequences.initial_states())
    assert StreamLoader(stream, 4).workers == 3
    stream = SequenceStream(sequences, Share(10, 5), 0, sequences.initial_states())
    with pytest.raises(InputError, match=r"another number of ranks"):
        StreamLoader(stream, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_logical_shards_without_documents_are_named(tmp_path, tokenizer, workers):
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', "utf-8")
    sequences = sequences_of(
        None, tokenizer, [TextSourceSettings(path=str(tmp_path / "few.jsonl"))]
    )
    batches = StreamLoader(
        SequenceStream(sequences, Share(12), 0, sequences.initial_states()), workers
    )
    expected = r"data\.sources\[0\]\.path=.*logical shard 2 of 12 .*lower data\.log"
    with pytest.raises(InputError, match=expected):
        next(iter(batches))


def test_bad_sources_are_named(files, tmp_path):
    def opened(**changes):
        return TextSource(TextSourceSettings(**changes), "data.sources[1]", skip_damaged=False)

    with pytest.raises(InputError, match=r"data\.sources\[1\]\.column=txt: .*id, text"):
        opened(path=str(files / "*.parquet"), column="txt")
    with pytest.raises(InputError, match=r"data\.sources\[1\]\.column=text: .*content"):
        opened(path=str(files / "code.jsonl"))
    with pytest.raises(InputError, match=r"none\.parquet: no such file"):
        opened(path=str(tmp_path / "none.parquet"))
    with pytest.raises(InputError, match=r"found none"):
        opened(path=str(tmp_path / "*.parquet"))
    (tmp_path / "empty.jsonl").write_text("", "utf-8")
    with pytest.raises(InputError, match=r"expected a file with something in it"):
        opened(path=str(tmp_path / "empty.jsonl"))
    (tmp_path / "bad.jsonl").write_text("no json\n", "utf-8")
    with pytest.raises(
        InputError, match=r"data\.sources\[1\]\.column=text: .*bad\.jsonl, row 1: is no JSON"
    ):
        opened(path=str(tmp_path / "bad.jsonl"))
    with pytest.raises(InputError, match=r"expected files of one kind"):
        opened(path=str(files))
    with pytest.raises(InputError, match=r"sources\[1\]\.path=owner/name: .*cannot be reached"):
        opened(path="owner/name")


def test_columns_of_another_kind_are_named(files, tokenizer):
    part = TextSourceSettings(path=str(files / "*.parquet"), column="id")
    with pytest.raises(
        InputError, match=r"data\.sources\[0\]\.column=id: .*, row \d+: expected text, f.* integer"
    ):
        next(first_sequences(sequences_of(files, tokenizer, [part]), 1))


def test_empty_validation_splits_are_named(tmp_path, tokenizer):
    (tmp_path / "few.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', "utf-8")
    settings = DataSettings(
        name="t",
        kind=DataKind.datasets,
        sources=[TextSourceSettings(path=str(tmp_path / "few.jsonl"))],
        validation_percent=1,
        seq_len=4,
        logical_shards=1,
    )
    with pytest.raises(InputError, match=r"data\.validation_percent=1: holds out 0 of \d+ tokens"):
        open_splits(settings, tokenizer, seed=0, cache=tmp_path)


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
        part = TextSource(settings, "data.sources[0]", skip_damaged=skip_damaged)
        return [row.value for file in range(part.num_files) for row in part.rows(file, 0, 1, 0)]

    with pytest.raises(InputError, match=r"part1\.parquet is damaged.*skip_damaged"):
        read(skip_damaged=False)
    assert read(skip_damaged=True) == texts(0, 50)
    assert "part1.parquet is damaged and is skipped" in caplog.text


def test_data_sets_of_the_hub_are_read_by_their_rows(files, tokenizer, monkeypatch):
    """The hub itself cannot be reached here: the same reader on local files."""
    names = sorted(str(path) for path in files.glob("*.parquet"))
    opened = load_dataset("parquet", data_files=names, split="train", streaming=True)
    monkeypatch.setattr("flash.data.sources._open_hub", lambda settings, key: (opened, ["commit"]))
    settings = TextSourceSettings(path="owner/name")
    source = TextSource(settings, "k", skip_damaged=False)
    assert source.num_files == 3
    rows = [row for file in range(3) for i in range(4) for row in source.rows(file, i, 4, 0)]
    assert sorted(row.value for row in rows) == sorted(texts(0, 150))
    assert {row.place for row in rows} >= {"file 0 of owner/name, row 1"}
    sequences = fit_logical_shards(sequences_of(None, tokenizer, [settings], logical_shards=60))
    assert sequences.logical_shards == 30


def test_lists_of_rows_are_held_once(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": str(i)} for i in range(100)]), "utf-8")
    source = TextSource(TextSourceSettings(path=str(tmp_path)), "k", skip_damaged=False)
    shares = [source.rows(0, i, 4, 0) for i in range(4)]
    firsts = [next(share).value for share in shares]
    assert len(_SHARED) == 1
    assert sorted([*firsts, *(row.value for share in shares for row in share)], key=int) == [
        str(i) for i in range(100)
    ]
    assert len(_SHARED) == 0


def test_rows_are_strided_across_batches_of_a_file(tmp_path):
    rows = [str(i) for i in range(2500)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=700)
    part = TextSource(TextSourceSettings(path=str(tmp_path / "a.parquet")), "k", skip_damaged=False)

    def read(*chosen) -> list[str]:
        return [row.value for row in part.rows(0, *chosen)]

    shares = [read(share, 7, 0) for share in range(7)]
    assert sorted(sum(shares, [])) == sorted(rows)
    for share in shares:  # a row of each block of seven, in order, but not always the same one
        assert [int(row) // 7 for row in share] == list(range(len(share)))
        assert len({int(row) % 7 for row in share}) == 7
    assert read(3, 7, 200) == shares[3][200:]
    assert read(0, 1, 1234)[:3] == rows[1234:1237]
    assert [int(row) // 1000 for row in read(6, 1000, 1)] in ([1], [1, 2])
