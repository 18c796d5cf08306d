"""Facts about one measurement after another: what is stored, and what is not measured again."""

import json
from dataclasses import replace

import pytest

from flash.device.measurement import Program
from flash.interop.baselines import stock_model
from flash.latency.profiler import Profiler, subject_key
from flash.latency.programs import Subject, program_digest
from flash.latency.store import MeasurementStore, SubjectKind
from flash.lowering.settings import LoweringSettings
from tests.latency.fake_device import WORKLOAD, FakeDevice
from tests.latency.test_fit import BACKBONE

HALF = BACKBONE.replace(layer_types=BACKBONE.layer_types[:3])
LEAST = BACKBONE.replace(layer_types=BACKBONE.layer_types[:2])


@pytest.fixture
def profiler(tmp_path, monkeypatch) -> Profiler:
    """A "program" is the description of its subject."""

    def write(subject, path, lowering):
        path.write_text(json.dumps(subject.to_dict()))

    monkeypatch.setattr(Subject, "write", write)
    return Profiler(
        device=FakeDevice(),  # pyright: ignore[reportArgumentType]
        workload=WORKLOAD,
        lowering=LoweringSettings(max_context=128),
        store=MeasurementStore(tmp_path / "measurements.jsonl"),
        cache_dir=tmp_path / "programs",
        reference=Subject.of(LEAST),
    )


def test_tied_or_not_a_model_is_one_subject():
    untied = BACKBONE.replace(tie_embeddings=False)
    assert Subject.of(untied) == Subject.of(BACKBONE.replace(tie_embeddings=True))
    stock = Subject.of(stock_model("lfm2_350m"))
    assert (stock.kind, str(stock)) == (SubjectKind.stock, "lfm2_350m")


def test_what_is_measured_alone_is_not_measured_again(profiler):
    subject = Subject.of(BACKBONE)
    first = profiler.measure_alone(subject)
    again = replace(profiler, store=MeasurementStore(profiler.store.path)).measure_alone(subject)
    assert first == again
    assert len(profiler.device.measured) == 1
    assert list(first.latencies) == [point.name for point in WORKLOAD.points]
    assert [set(sample) for sample in first.samples] == 3 * [
        {"accepted", "prefill_64", "decode_64"}
    ]


def test_only_the_points_that_are_missing_are_measured_alone(profiler):
    subject = Subject.of(BACKBONE)
    prefill = replace(profiler, workload=WORKLOAD.only(WORKLOAD.points[:1]))
    prefill.measure_alone(subject)
    profiler.measure_alone(subject)
    assert len(profiler.device.measured) == 2
    assert [row.attempt for row in profiler.store] == [1, 1]


def test_measurements_beside_others_and_alone_stay_apart(profiler):
    subject = Subject.of(BACKBONE)
    profiler.measure_missing([subject])
    profiler.measure_alone(subject)
    profiler.measure_missing([subject])
    assert len(profiler.device.measured) == 2
    for point in WORKLOAD.points:
        rows = profiler.store.attempts(profiler.key(subject, point))
        assert [row.attempt for row in rows] == [1, 2]
        assert [row.result["reference"] for row in rows] == [subject_key(Subject.of(LEAST)), None]
        assert profiler.attempts(subject, point) == [rows[0]]


def test_an_export_is_a_further_attempt_that_the_search_does_not_count(profiler):
    subject, backbone = Subject.of(HALF), Subject.of(BACKBONE)
    program, other = (
        Program(name=name, path=profiler.lowered(each), vocab_size=BACKBONE.vocab_size)
        for name, each in (("winner", subject), ("reference", backbone))
    )
    profiler.measure_missing([subject, backbone])
    measured = profiler.measure_program(subject, program, (backbone, other), 1.5)
    profiler.measure_program(backbone, other, None, 2.5)
    assert "prefill_64" in measured.conditions[0]["reference_ms"]
    count = len(profiler.device.measured)
    for point in WORKLOAD.points:
        rows = profiler.store.attempts(profiler.key(subject, point))
        assert [row.attempt for row in rows] == [1, 2]
        assert rows[1].result["reference"] == subject_key(backbone)
        assert rows[1].result["lower_s"] == 1.5
        assert [len(profiler.attempts(each, point)) for each in (subject, backbone)] == [1, 1]
    profiler.measure_missing([subject, backbone])
    assert profiler.measure_alone(backbone).name == str(backbone)  # as its export measured it
    assert len(profiler.device.measured) == count


def test_programs_and_references_keep_the_hashes_of_earlier_versions(monkeypatch):
    """Other hashes lower again, and measure again, what users have."""
    monkeypatch.setattr("flash.latency.programs.RUNTIME", "executorch 1.5.1")
    monkeypatch.setattr("flash.latency.programs.LOWERING_VERSION", 3)
    subject = Subject.of(BACKBONE)
    assert subject_key(subject) == "4f95d806d57bb181cd9b86aa"
    assert program_digest(subject, LoweringSettings(max_context=128)) == "debc3de6d42a54b7d92bb57b"
