"""Facts about the measurement store."""

import csv
import json
import logging
import re
import sys
import threading
from dataclasses import replace

import pytest

from flash.arch import ArchSpec, parse_pattern
from flash.bundled import CONF
from flash.cli import main
from flash.errors import InputError
from flash.interop.baselines import stock_model
from flash.latency.store import Conditions, MeasurementStore, StoredLatency, SubjectKind

DATA = CONF.parent / "benchmarks" / "data"
CONDITIONS = Conditions(
    point={"phase": "prefill", "tokens": 128},
    protocol={"processes": 3},
    lowering={"quantization": "8da4w"},
    runtime="executorch 1.5.1",
    device={"device": "host", "cpu": "x"},
)


def row(number, value=1.0, conditions=CONDITIONS):
    return StoredLatency(
        kind=SubjectKind.block,
        subject={"number": number},
        conditions=conditions,
        result={
            **{"ms": value, "se_ms": 0.1, "rejected": 0, "reference": None, "lower_s": 1.0},
            **{"load_ms": 2.0, "peak_rss_mib": 3.0, "model_rss_mib": 1.0, "conditions": [{}]},
            "samples": [{"accepted": True, "runs": [{"wall_s": value}, {"wall_s": value + 0.1}]}],
        },
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store" / "measurements.jsonl"


def test_row_survives_a_new_process(path):
    MeasurementStore(path).append(row(1))
    again = MeasurementStore(path)
    [kept] = again.attempts(row(1).key)
    assert kept.result == row(1).result
    assert kept.time_utc.endswith("+00:00")


def test_no_row_is_dropped_and_the_store_numbers_the_attempts(path):
    store = MeasurementStore(path)
    assert [store.append(row(1, ms)).attempt for ms in (9.0, 5.0, 5.0)] == [1, 2, 3]
    assert store.append(row(2)).attempt == 1
    for each in (store, MeasurementStore(path)):
        assert [found.result["ms"] for found in each.attempts(row(1).key)] == [9.0, 5.0, 5.0]
        assert [found.attempt for found in each.attempts(row(1).key)] == [1, 2, 3]
        assert len(each) == 4
    assert len(path.read_text().splitlines()) == 4


def test_two_open_stores_number_the_attempts_of_one_key(path):
    first, second = MeasurementStore(path), MeasurementStore(path)
    first.append(row(1, 1.0))
    assert second.append(row(1, 2.0)).attempt == 2
    assert [each.result["ms"] for each in second.attempts(row(1).key)] == [1.0, 2.0]


@pytest.mark.parametrize("name", ["flash_space", "repeatability_1", "repeatability_2"])
def test_keys_of_stored_rows_are_those_that_they_were_stored_under(name):
    lines = (DATA / f"{name}.jsonl").read_text().splitlines()
    for line in (lines[0], lines[len(lines) // 2], lines[-1]):
        values = json.loads(line)
        assert StoredLatency.from_dict(values).key == values["key"]
    assert len(MeasurementStore(DATA / f"{name}.jsonl")) == len(lines)


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
    assert len(kinds) == len(SubjectKind)
    assert CONDITIONS.key(SubjectKind.model, {"a": 2, "b": 1}) in kinds


def test_torn_last_line_is_dropped_and_overwritten(path, caplog):
    store = MeasurementStore(path)
    store.append(row(1))
    store.append(row(2))
    whole = path.read_bytes()
    for cut in (1, 20, len(whole) // 2 - 1):
        path.write_bytes(whole[:-cut])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            store = MeasurementStore(path)
        assert "incomplete last line" in caplog.text
        assert len(store) == 1
        assert [len(store.attempts(row(n).key)) for n in (1, 2)] == [1, 0]
        store.append(row(2))
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
    with pytest.raises(InputError, match="line 2: (not a measurement|kind: missing); remove"):
        MeasurementStore(path)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("ms", "1", 'result.ms="1": input should be a valid number'),
        ("ms", float("nan"), "result.ms=nan: expected a positive number"),
        ("rejected", 0.5, "result.rejected=0.5: input should be a valid integer"),
        ("samples", [{}], "result.samples.0.accepted: missing"),
    ],
)
def test_a_value_of_another_type_is_named(path, key, value, problem):
    MeasurementStore(path).append(row(1))
    values = json.loads(path.read_text())
    values["result"][key] = value
    path.write_text(f"{json.dumps(values)}\n")
    with pytest.raises(InputError, match=f"line 1: {re.escape(problem)}"):
        MeasurementStore(path)


def test_devices_measure_at_once_but_each_only_for_one_process(path, caplog):
    first, second = MeasurementStore(path), MeasurementStore(path)
    with first.exclusive("phone_a"), second.exclusive("phone_b"):
        first.append(row(1))
        second.append(row(2))
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
    assert again.attempts(row(2).key)[0].result["ms"] == 3.0


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
    changed = {"ms": 2.5, "se_ms": 0.1, "rejected": 1, "peak_rss_mib": 9.0}
    result = {**row(1).result, **changed}
    runs = tmp_path / "runs"
    store = MeasurementStore(runs / "measurements.jsonl")
    store.append(replace(row(1), kind=SubjectKind.model, subject=spec.to_dict(), result=result))
    block = {"kind": "ffn", "spec": spec.to_dict()}
    store.append(replace(row(1), subject=block, result=result))
    stock = stock_model("lfm2_350m").to_dict()
    store.append(replace(row(1), kind=SubjectKind.stock, subject=stock, result=result))
    table = tmp_path / "table.csv"
    assert call(monkeypatch, "--runs", str(runs), "export", str(table)) == 0
    assert "3 measurements" in capsys.readouterr().out
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["kind"] for line in lines] == ["model", "ffn", "stock"]
    assert [line["stock"] for line in lines] == ["", "", "lfm2_350m"]
    assert lines[0]["pattern"] == "F-S"
    assert (lines[0]["phase"], lines[0]["tokens"], lines[0]["ms"]) == ("prefill", "128", "2.5")
    assert lines[0]["se_ms"] == "0.1"
    other = tmp_path / "other"
    assert call(monkeypatch, "--runs", str(other), "merge", str(store.path)) == 0
    assert "3 measurements added, 3 in all" in capsys.readouterr().out
    assert call(monkeypatch, "--runs", str(other), "merge", str(tmp_path / "none")) == 2
    assert "none: no such file" in capsys.readouterr().err


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["flash", "measurements", *arguments])
    try:
        return main()
    except SystemExit as stop:
        return stop.code
