"""Facts about the measurement store."""

import csv
import json
import logging
import sys
import threading
from dataclasses import replace

import pytest

from flash.arch import ArchSpec, parse_pattern
from flash.cli import main
from flash.errors import InputError
from flash.latency.store import Conditions, MeasurementStore, StoredLatency, SubjectKind

CONDITIONS = Conditions(
    point={"phase": "prefill", "tokens": 128},
    protocol={"processes": 3},
    lowering={"quantization": "8da4w"},
    runtime="executorch 1.5.1",
    device={"cpu": "x"},
)


def row(number, value=1.0, conditions=CONDITIONS):
    return StoredLatency(
        kind=SubjectKind.block,
        subject={"number": number},
        conditions=conditions,
        result={"ms": value, "samples": [value, value + 0.1]},
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store" / "measurements.jsonl"


def test_row_survives_a_new_process(path):
    MeasurementStore(path).append(row(1))
    again = MeasurementStore(path)
    assert list(again) == [row(1)] or again.get(row(1).key).result == row(1).result
    assert again.get(row(1).key).time_utc.endswith("+00:00")


def test_same_key_is_never_stored_twice(path):
    store = MeasurementStore(path)
    assert store.append(row(1, 1.0))
    assert not store.append(row(1, 2.0))
    assert len(path.read_text().splitlines()) == 1
    assert store.get(row(1).key).result["ms"] == 1.0


def test_same_key_from_two_open_stores_is_stored_once(path):
    first, second = MeasurementStore(path), MeasurementStore(path)
    assert first.append(row(1, 1.0))
    assert not second.append(row(1, 2.0))
    assert second.get(row(1).key).result["ms"] == 1.0


def test_later_attempt_is_kept_beside_the_first(path):
    store = MeasurementStore(path)
    store.append(row(1, 9.0))
    again = replace(row(1, 5.0), attempt=2)
    assert store.append(again)
    assert not store.append(again)
    assert not store.append(row(1, 1.0))
    for each in (store, MeasurementStore(path)):
        assert each.get(again.key).result["ms"] == 5.0
        assert [each.attempt for each in each.attempts(again.key)] == [1, 2]
        assert len(each) == 2
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"point": {"phase": "prefill", "tokens": 256}},
        {"protocol": {"processes": 1}},
        {"lowering": {"quantization": "fp32"}},
        {"runtime": "executorch 1.4.1"},
        {"device": {"cpu": "y"}},
    ],
)
def test_key_depends_on_every_condition(change):
    other = Conditions(**{**vars(CONDITIONS), **change})
    assert row(1, conditions=other).key != row(1).key


def test_key_depends_on_subject_and_kind_but_not_on_result_or_order():
    assert row(1).key != row(2).key
    assert row(1, 1.0).key == row(1, 2.0).key
    subject = {"b": 1, "a": 2}
    kinds = {CONDITIONS.key(kind, subject) for kind in SubjectKind}
    assert len(kinds) == 2
    assert CONDITIONS.key(SubjectKind.model, {"a": 2, "b": 1}) in kinds


def test_torn_last_line_is_dropped_and_overwritten(path, caplog):
    store = MeasurementStore(path)
    store.append(row(1))
    store.append(row(2))
    whole = path.read_bytes()
    for cut in (1, 20, len(row(2).to_json()) - 1):
        path.write_bytes(whole[:-cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            store = MeasurementStore(path)
        assert "torn last line" in caplog.text
        assert len(store) == 1
        assert [store.get(row(n).key) is None for n in (1, 2)] == [False, True]
        assert store.append(row(2))
        assert len(MeasurementStore(path)) == 2
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_other_schema_is_refused_in_one_line(path):
    MeasurementStore(path).append(row(1))
    path.write_text(path.read_text().replace('"schema":2', '"schema":99'))
    with pytest.raises(InputError, match=r"line 1: schema version 99: expected 2") as caught:
        MeasurementStore(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ["{}", "[1]", "nonsense", '{"schema":2,"key":"x"}'])
def test_damaged_line_is_named(path, line):
    MeasurementStore(path).append(row(1))
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match="line 2: not a measurement"):
        MeasurementStore(path)


def test_devices_measure_at_once_but_each_only_for_one_process(path, caplog):
    first, second = MeasurementStore(path), MeasurementStore(path)
    with first.exclusive("phone_a"), second.exclusive("phone_b"):
        assert first.append(row(1))
        assert second.append(row(2))
    assert len(MeasurementStore(path)) == 2
    done = threading.Event()

    def wait():
        with second.exclusive("phone_a"):
            done.set()

    with first.exclusive("phone_a"):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not done.wait(0.3)
    thread.join(10)
    assert done.is_set()
    assert "waiting for another process that is measuring on phone_a" in caplog.text


def test_stores_of_two_people_merge(path, tmp_path):
    mine, theirs = MeasurementStore(path), MeasurementStore(tmp_path / "theirs.jsonl")
    mine.append(row(1, 1.0))
    theirs.append(row(1, 2.0))
    theirs.append(row(2, 3.0))
    assert mine.merge(theirs) == 2
    assert mine.merge(theirs) == 0  # nothing twice
    again = MeasurementStore(path)
    assert [each.result["ms"] for each in again.attempts(row(1).key)] == [1.0, 2.0]
    assert again.get(row(2).key).result["ms"] == 3.0


def test_store_is_a_table_with_standard_errors(path, monkeypatch, capsys, tmp_path):
    spec = ArchSpec(
        model_dim=64,
        ffn_dim=96,
        layer_types=parse_pattern("F-S"),
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        vocab_size=96,
    )
    result = {"ms": 2.5, "se_ms": 0.1, "rejected": 1, "peak_rss_mib": 9.0}
    runs = tmp_path / "runs"
    store = MeasurementStore(runs / "measurements.jsonl")
    store.append(replace(row(1), kind=SubjectKind.model, subject=spec.to_dict(), result=result))
    block = {"kind": "ffn", "spec": spec.to_dict()}
    store.append(replace(row(1), subject=block, result=result))
    table = tmp_path / "table.csv"
    assert call(monkeypatch, "--runs", str(runs), "export", str(table)) == 0
    assert "2 measurements" in capsys.readouterr().out
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["kind"] for line in lines] == ["model", "ffn"]
    assert lines[0]["pattern"] == "F-S"
    assert (lines[0]["phase"], lines[0]["tokens"], lines[0]["ms"]) == ("prefill", "128", "2.5")
    assert lines[0]["se_ms"] == "0.1"
    other = tmp_path / "other"
    assert call(monkeypatch, "--runs", str(other), "merge", str(store.path)) == 0
    assert "2 measurements added, 2 in all" in capsys.readouterr().out
    assert call(monkeypatch, "--runs", str(other), "merge", str(tmp_path / "none")) == 2
    assert "none: no such file" in capsys.readouterr().err


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["flash", "measurements", *arguments])
    return main()
