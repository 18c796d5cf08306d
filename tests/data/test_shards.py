"""Shards prepared ahead: the same text, resumable, checked."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hydra.core.global_hydra import GlobalHydra

from flash.config import entry
from flash.data.arrays import write_array
from flash.data.corpus import PackedData
from flash.data.encoders import in_validation_split
from flash.data.module import PackedDataModule
from flash.data.prepare import prepare
from flash.data.settings import DataKind, DataSettings, PrepareSettings, TextSourceSettings
from flash.data.shards import Manifest, ShardedTokens, open_shards
from flash.data.tokenizer import load_tokenizer
from flash.errors import InputError
from flash.records import file_digest

TEXTS = [f"def f{i}(x):\n    return {'x + ' * (i % 9)}{i}\n" for i in range(700)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(2):
        pq.write_table(pa.table({"text": TEXTS[i * 350 : (i + 1) * 350]}), folder / f"{i}.parquet")
    return folder


@pytest.fixture
def settings(files, backbone_settings, tmp_path) -> PrepareSettings:
    data = DataSettings(
        name="texts",
        kind=DataKind.datasets,
        sources=[TextSourceSettings(path=str(files))],
        validation_percent=10,
    )
    return PrepareSettings(
        backbone=backbone_settings,
        data=data,
        out=str(tmp_path / "shards"),
        shard_tokens=4000,
        runs=str(tmp_path / "runs"),
    )


@pytest.fixture
def tokenizer(backbone_folder):
    return load_tokenizer(backbone_folder / "tokenizer.json")


def documents(tokens: np.ndarray, tokenizer) -> list[str]:
    end = tokenizer.backend.token_to_id("<|endoftext|>")
    cut = np.split(tokens, np.flatnonzero(tokens == end) + 1)
    assert len(cut[-1]) == 0  # shards hold whole documents
    return [tokenizer.decode(part[:-1].tolist()) for part in cut[:-1]]


def test_every_document_is_in_one_shard_once(settings, tokenizer):
    folder = prepare(settings)
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert len(manifest.shards) > 2
    found = [
        text
        for shard in manifest.shards
        for text in documents(np.load(folder / shard.file), tokenizer)
    ]
    assert sorted(found) == sorted(text for text in TEXTS if not in_validation_split(text, 10))
    held = documents(np.load(folder / "validation.npy"), tokenizer)
    assert sorted(held) == sorted(text for text in TEXTS if in_validation_split(text, 10))
    assert [shard.documents for shard in manifest.shards] == [
        len(documents(np.load(folder / shard.file), tokenizer)) for shard in manifest.shards
    ]


def test_a_manifest_of_the_former_version_is_read(settings):
    folder = prepare(settings)
    now = Manifest.read(folder)
    path = folder / "manifest.json"
    values = json.loads(path.read_text("utf-8"))
    former = {**values, "version": 1, "heldout": values.pop("validation")}
    del former["validation"]
    path.write_text(json.dumps(former), "utf-8")
    assert Manifest.read(folder) == now
    prepare(settings)  # the key is of the data, not of the names of settings


def test_preparing_goes_on_after_a_kill(settings, monkeypatch, tmp_path):
    whole = Manifest.read(prepare(settings))
    settings.out = str(tmp_path / "again")
    from flash.data import prepare as module

    write, written = module.write_shard, []

    def killed(folder, name, documents):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(name)
        return write(folder, name, documents)

    monkeypatch.setattr("flash.data.prepare.write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings)
    monkeypatch.setattr("flash.data.prepare.write_shard", write)
    resumed = Manifest.read(prepare(settings))
    assert resumed == whole


def test_shards_of_another_validation_text_are_others(settings, tmp_path):
    held_out = tmp_path / "validation.txt"
    held_out.write_text("def g(x):\n    return x\n", "utf-8")
    settings.data.validation = TextSourceSettings(path=str(held_out))
    prepare(settings)
    assert prepare(settings) == Path(str(settings.out))
    held_out.write_text("def g(y):\n    return y\n", "utf-8")
    with pytest.raises(InputError, match="holds shards of other data"):
        prepare(settings)


def test_weights_decide_how_many_tokens(settings, tmp_path, tokenizer):
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": f"# note {i}"}) + "\n" for i in range(50)), "utf-8"
    )
    settings.data.sources[0].weight = 3.0
    settings.data.sources.append(TextSourceSettings(path=str(tmp_path / "b.jsonl")))
    settings.tokens = 12_000
    folder = prepare(settings)
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert 12_000 <= manifest.tokens < 20_000
    tokens = np.concatenate([np.load(folder / shard.file) for shard in manifest.shards])
    notes = sum(
        len(tokenizer.encode(text)) + 1
        for text in documents(tokens, tokenizer)
        if text.startswith("#")
    )
    assert notes / manifest.tokens == pytest.approx(0.25, abs=0.1)


def opened(folder, tokenizer, tmp_path, **options) -> PackedData:
    settings = DataSettings(name="s", kind=DataKind.shards, path=str(folder), seq_len=32, **options)
    return PackedData(settings, tokenizer, batch_size=4, seed=0, cache=tmp_path / "cache")


def test_shards_are_read_as_one_stream(settings, tokenizer, tmp_path):
    folder = prepare(settings)
    manifest = Manifest.read(folder)
    assert manifest is not None
    paths = [folder / shard.file for shard in manifest.shards]
    joined = np.concatenate([np.load(path) for path in paths])
    stream = ShardedTokens(paths)
    assert len(stream) == len(joined)
    end = manifest.shards[0].tokens
    for start, stop in ((0, 5), (end - 3, end + 3), (end, end + 1), (10, len(joined)), (7, 7)):
        assert np.array_equal(stream[start:stop], joined[start:stop])
    data = opened(folder, tokenizer, tmp_path, document_masks=True, workers=2)
    num_windows = (len(joined) - 1) // 32
    rows = []
    batches = iter(PackedDataModule(data).train_dataloader())
    while len(rows) < num_windows:
        rows += [tuple(row.tolist()) for row in next(batches).tokens]
    expected = [tuple(joined[i * 32 : i * 32 + 33].tolist()) for i in range(num_windows)]
    assert sorted(rows[:num_windows]) == sorted(expected)


def test_damaged_shards_are_named_and_left_out_only_if_told(settings, tokenizer, tmp_path, caplog):
    folder = prepare(settings)
    whole = opened(folder, tokenizer, tmp_path)
    path = folder / "train_00001.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"train_00001\.npy: is damaged .*skip_damaged=true"):
        opened(folder, tokenizer, tmp_path)
    rest = opened(folder, tokenizer, tmp_path, skip_damaged=True)
    assert "train_00001.npy: is damaged and is skipped" in caplog.text
    assert len(rest.train_set) < len(whole.train_set)  # pyright: ignore
    assert rest.digest != whole.digest
    path.unlink()
    with pytest.raises(InputError, match=r"train_00001\.npy: is missing"):
        opened(folder, tokenizer, tmp_path)
    (folder / "validation.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"validation\.npy: is damaged .*delete .* to prepare all"):
        opened(folder, tokenizer, tmp_path, skip_damaged=True)


def test_whole_shards_are_hashed_once(settings, tokenizer, tmp_path, monkeypatch):
    folder = prepare(settings)
    first = opened(folder, tokenizer, tmp_path)
    monkeypatch.setattr("flash.data.shards.file_digest", pytest.fail)
    assert opened(folder, tokenizer, tmp_path).digest == first.digest


def test_unusable_shards_are_named(settings, tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"data\.path=.*flash prepare"):
        open_shards(tmp_path, tokenizer, tmp_path)
    folder = prepare(settings)
    settings.seed = 1
    with pytest.raises(InputError, match=r"out=.*holds shards of other data"):
        prepare(settings)
    tokenizer.backend.add_special_tokens(["<|other|>"])
    with pytest.raises(InputError, match=r"made with another tokenizer"):
        open_shards(folder, tokenizer, tmp_path)
    (folder / "manifest.json").write_text("{", "utf-8")
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        open_shards(folder, tokenizer, tmp_path)


def test_shards_of_other_values_than_tokens_are_named(settings, tokenizer, tmp_path):
    folder = prepare(settings)
    manifest = Manifest.read(folder)
    assert manifest is not None
    for odd in (np.zeros((5, 5), np.uint16), np.zeros(25, np.float32)):
        np.save(folder / "train_00000.npy", odd)
        shard = manifest.shards[0]
        hashed = file_digest(folder / shard.file)
        manifest.shards[0] = dataclasses.replace(shard, sha256=hashed)
        manifest.write(folder)
        with pytest.raises(InputError, match=r"train_00000\.npy: expected an array of token ids"):
            open_shards(folder, tokenizer, tmp_path)


def test_preparing_does_not_call_damaged_shards_finished(settings):
    folder = prepare(settings)
    path = folder / "validation.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"validation\.npy: is damaged; .* prepare it again"):
        prepare(settings)


@pytest.mark.parametrize("notes", ["5", "{", '{"train_00000.npy": 5}'])
def test_damaged_notes_only_cost_hashing(notes, settings, tokenizer, tmp_path):
    folder = prepare(settings)
    first = open_shards(folder, tokenizer, tmp_path)
    [path] = tmp_path.glob("whole_*.json")
    path.write_text(notes, "utf-8")
    assert open_shards(folder, tokenizer, tmp_path).digest == first.digest


def test_the_command_prepares(files, backbone_folder, tmp_path):
    command = [sys.executable, "-m", "flash", "prepare", "data=files", f"runs={tmp_path}"]
    backbone = f"backbone.weights={backbone_folder}"
    done = subprocess.run(
        [*command, backbone, f"data.sources=[{{path: {files}}}]"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    manifest = Manifest.read(tmp_path / "shards" / "files")
    assert manifest is not None
    assert manifest.complete


def test_wrong_keys_of_a_part_are_named(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASH_VERB", "prepare")
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["prepare", "data=files", "data.sources=[{pth: texts}]"])
    with pytest.raises(SystemExit) as stop:
        entry("prepare", pytest.fail)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pth: unknown key; did you mean 'path'?" in error


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_arrays_are_files_of_numpy(dtype, tmp_path):
    array = np.arange(1000).astype(dtype)
    write_array(tmp_path / "ours.npy", array)
    np.save(tmp_path / "theirs.npy", array)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
