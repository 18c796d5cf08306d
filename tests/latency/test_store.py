"""Facts about the measurement store."""

import json
import logging
from dataclasses import replace

import pytest

from flash.errors import InputError
from flash.latency.store import Conditions, MeasurementStore, Row, SubjectKind

CONDITIONS = Conditions(
    point={"phase": "prefill", "tokens": 128},
    protocol={"processes": 3},
    lowering={"quantization": "8da4w"},
    runtime="executorch 1.5.1",
    device={"cpu": "x"},
)


def row(number, value=1.0, conditions=CONDITIONS):
    return Row(
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
