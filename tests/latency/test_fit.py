"""Facts about stage 1, on a device whose latencies are known."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from omegaconf import OmegaConf

from flash.arch import (
    ArchSpec,
    Attention,
    Choices,
    FfnChoices,
    SearchSpace,
    SpaceSettings,
    parse_pattern,
)
from flash.device.host import HostDevice
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.errors import InputError
from flash.latency.fit import collect, make_grid, whole_models
from flash.latency.programs import Subject
from flash.latency.settings import LatencySettings, PredictorKind
from flash.latency.store import MeasurementStore, SubjectKind
from flash.lowering.settings import LoweringSettings
from tests.latency.fake_device import WORKLOAD, FakeDevice, Killed, latency_ms

# botorch imports linear_operator, which scripts a function at import.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

BACKBONE = ArchSpec(
    model_dim=256,
    ffn_dim=1024,
    layer_types=parse_pattern("FFFFFF"),
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=512,
    sliding_window=32,
    tie_embeddings=False,
)
SPACE = SearchSpace(
    SpaceSettings(
        name="test",
        num_layers=Choices(min=3, max=6),
        model_dim=Choices(min=128, max=256, step=32),
        ffn_dim=FfnChoices(min=256, max=1024, step=64),
    ),
    BACKBONE,
)
PREFILL, DECODE = WORKLOAD.points
LOWERING = LoweringSettings(max_context=128, prefill_last_only=False)
BLOCKS = LatencySettings()
SETTINGS = replace(BLOCKS, group_size=5)
ACTIVE = LatencySettings(predictor=PredictorKind.analytical, group_size=5, whole_models=25)


@pytest.fixture
def lowered(monkeypatch):
    """Names of the lowered subjects; a "program" is the description of its subject."""
    names = []

    def lower(subject, settings):
        names.append(str(subject))
        return json.dumps(subject.to_dict()).encode()

    monkeypatch.setattr(Subject, "lower", lower)
    return names


def num_measured(model):
    return len({row.key for row in model.rows}) // len(WORKLOAD.points)


def of_point(model, point):
    return [row for row in model.rows if row.conditions.point["phase"] == point.phase.value]


def run(tmp_path, device, settings=SETTINGS, **changes):
    arguments = {
        "space": SPACE,
        "backbone": BACKBONE,
        "device": device,
        "workload": WORKLOAD,
        "lowering": LOWERING,
        "settings": settings,
        "store": MeasurementStore(tmp_path / "measurements.jsonl"),
        "cache_dir": tmp_path / "programs",
        "seed": 0,
    }
    return collect(**{**arguments, **changes})


def test_blocks_predict_models_that_were_never_measured(tmp_path, lowered):
    model = run(tmp_path, FakeDevice())
    unseen = [SPACE.sample(np.random.default_rng(7)) for _ in range(50)]
    truth = np.array([latency_ms(spec.to_dict()) for spec in unseen])
    np.testing.assert_allclose(model.predictors[PREFILL].predict(unseen).mean, truth, rtol=0.03)
    np.testing.assert_allclose(model.predictors[DECODE].predict(unseen).mean, truth / 4, rtol=0.03)
    assert model.objective == PREFILL
    assert len(lowered) - 1 == num_measured(model) == 30 + 4 + 1  # and the reference
    assert model.models[-1].layer_types == BACKBONE.layer_types
    scores = model.scores[PREFILL]
    assert set(scores) == {"blocks", "params", "flops"}
    assert scores["blocks"].mape_pct < scores["params"].mape_pct
    assert scores["blocks"].n == 5
    lines = model.describe().splitlines()
    assert lines[1].split()[:2] == ["prefill_64", "blocks"]
    assert max(map(len, lines)) <= 80
    assert "few models" in lines[-1]
    assert model.metrics()["latency/decode_64/blocks/n"] == 5


def test_second_call_lowers_and_measures_nothing(tmp_path, lowered):
    first = run(tmp_path, FakeDevice())
    count = len(lowered)
    device = FakeDevice()
    start = time.process_time()
    again = run(tmp_path, device)
    assert time.process_time() - start < 1
    assert (len(lowered), device.measured) == (count, [])
    specs = [SPACE.sample(np.random.default_rng(1)) for _ in range(9)]
    np.testing.assert_array_equal(
        first.predictors[PREFILL].predict(specs).high, again.predictors[PREFILL].predict(specs).high
    )


def test_kill_between_groups_loses_only_the_group_that_ran(tmp_path, lowered):
    killed = FakeDevice(die_at_group=3)
    with pytest.raises(Killed):
        run(tmp_path, killed)
    assert len(killed.measured) == 3 * SETTINGS.group_size
    resumed = FakeDevice()
    model = run(tmp_path, resumed)
    assert not set(killed.measured) & set(resumed.measured)
    assert len(killed.measured) + len(resumed.measured) == num_measured(model)
    assert len(lowered) == len(set(lowered)) == num_measured(model) + 1


def test_no_subject_is_measured_twice(tmp_path, lowered):
    device = FakeDevice()
    model = run(tmp_path, device)
    assert len(device.measured) == len(set(device.measured)) == num_measured(model)
    # More models: those measured before are among them.
    more = run(tmp_path, device, replace(BLOCKS, calibration_models=7))
    assert set(model.models) < set(more.models)
    assert len(device.measured) == len(set(device.measured)) == num_measured(more)


def test_other_device_workload_or_protocol_is_measured_anew(tmp_path, lowered):
    run(tmp_path, FakeDevice())
    other = FakeDevice(name="other")
    run(tmp_path, other)
    careful = FakeDevice()
    careful.settings.processes = 7
    run(tmp_path, careful)
    assert len(other.measured) == len(careful.measured) == 35
    assert len(lowered) == 36  # the programs were in the cache


def test_programs_are_deleted_on_demand(tmp_path, lowered):
    model = run(tmp_path, FakeDevice(), replace(BLOCKS, keep_programs=False))
    [left] = (tmp_path / "programs").glob("*.pte")  # the reference
    assert json.loads(left.read_text())["layer_types"] == ["full_attention"] * 3
    assert model.models


@pytest.mark.parametrize("kind", [PredictorKind.gp, PredictorKind.params, PredictorKind.flops])
def test_other_predictors_measure_whole_models_only(tmp_path, lowered, kind):
    model = run(tmp_path, FakeDevice(), LatencySettings(predictor=kind, whole_models=5))
    assert {row.kind for row in model.rows} == {SubjectKind.model}
    assert num_measured(model) == 6
    assert len(model.predictors[DECODE].predict(model.models)) == 6
    assert model.scores[DECODE][kind.value].n == 6


@pytest.mark.parametrize("busy", [0, 2])
def test_group_on_a_busy_device_is_measured_again(tmp_path, lowered, caplog, busy):
    device = FakeDevice(reference_ms=lambda group: 13.0 if group == busy else 10.0, slowdown=True)
    model = run(tmp_path, device)
    assert len(device.measured) == num_measured(model) + SETTINGS.group_size
    truth = [latency_ms(spec.to_dict()) for spec in model.models]
    np.testing.assert_allclose(model.values_ms[PREFILL], truth, rtol=1e-6)
    assert "busy during" not in caplog.text
    repeated = [row for row in of_point(model, PREFILL) if row.attempt == 2]
    assert len(repeated) == SETTINGS.group_size


def test_measurement_without_the_reference_does_not_count(tmp_path, lowered):
    first = run(tmp_path, FakeDevice())
    path = tmp_path / "measurements.jsonl"
    path.unlink()
    for row in first.rows[-1], of_point(first, PREFILL)[-1]:
        exported = {**row.result, "reference": None, "conditions": [{}]}
        MeasurementStore(path).append(replace(row, result=exported))
    device = FakeDevice()
    again = run(tmp_path, device)
    assert len(device.measured) == num_measured(again) == num_measured(first)
    assert again.rows[-1].attempt == 2


def test_left_out_predictions_are_those_that_the_scores_are_of(tmp_path, lowered):
    model = run(tmp_path, FakeDevice())
    left_out, values = model.left_out_ms[DECODE], model.values_ms[DECODE]
    mape_pct = 100 * np.mean(abs(left_out / values - 1))
    assert mape_pct == pytest.approx(model.scores[DECODE]["blocks"].mape_pct)


def test_drift_between_groups_is_taken_out(tmp_path, lowered):
    drifting = [1.0, 1.14, 1.08, 1.12, 1.1, 1.06, 1.13]
    device = FakeDevice(reference_ms=lambda group: 10.0 * drifting[group], slowdown=True)
    model = run(tmp_path, device)
    truth = np.array([latency_ms(spec.to_dict()) for spec in model.models])
    raw = np.array([row.result["ms"] for row in of_point(model, PREFILL)[-5:]])
    assert abs(raw / truth - 1).max() > 0.1
    assert abs(model.values_ms[PREFILL] / truth - 1).max() < 0.04


def test_device_that_stays_busy_is_reported_and_not_measured_for_ever(tmp_path, lowered, caplog):
    calm_once = FakeDevice(reference_ms=lambda group: 10.0 if group == 0 else 13.0)
    run(tmp_path, calm_once)
    assert "busy during 30 of 70 measurements, 3 attempts each" in caplog.text
    assert len(calm_once.measured) == 5 + 3 * 30
    again = FakeDevice()
    run(tmp_path, again)
    assert again.measured == []


def test_analytical_predictor_measures_until_it_is_good_enough(tmp_path, lowered):
    model = run(tmp_path, FakeDevice(), ACTIVE)
    assert num_measured(model) < 25
    assert {row.kind for row in model.rows} == {SubjectKind.model}
    assert model.scores[PREFILL]["analytical"].mape_pct < 5
    unseen = [SPACE.sample(np.random.default_rng(seed)) for seed in range(50)]
    truth = np.array([latency_ms(spec.to_dict()) for spec in unseen])
    assert np.abs(model.predictors[model.objective].predict(unseen).mean / truth - 1).mean() < 0.04
    device = FakeDevice()
    again = run(tmp_path, device, ACTIVE)
    assert (device.measured, again.models) == ([], model.models)
    strict = run(tmp_path, device, replace(ACTIVE, target_error_pct=1e-6))
    assert num_measured(strict) == 25 + 1
    assert set(model.models) < set(strict.models)


def test_measuring_ends_when_the_space_has_no_more_models(tmp_path, lowered):
    few = SpaceSettings(
        name="few",
        num_layers=Choices(min=6, max=6),
        model_dim=Choices(min=192, max=256, step=64),
        ffn_dim=FfnChoices(min=512, max=1024, step=256),
        kinds=[Attention.full_attention],
    )
    strict = replace(ACTIVE, target_error_pct=1e-6)
    model = run(tmp_path, FakeDevice(), strict, space=SearchSpace(few, BACKBONE))
    assert num_measured(model) == 2 * 3


def test_killed_active_measurement_goes_on_where_it_was(tmp_path, lowered):
    killed = FakeDevice(die_at_group=2)
    with pytest.raises(Killed):
        run(tmp_path, killed, ACTIVE)
    resumed = FakeDevice()
    model = run(tmp_path, resumed, ACTIVE)
    assert not set(killed.measured) & set(resumed.measured)
    assert len(killed.measured) + len(resumed.measured) == num_measured(model)


def other_ms(subject):
    """Latency on a device on which work takes other multiples of the first one's time [ms]."""
    ffn = sum(2e-6 * subject["model_dim"] * subject["ffn_dim"] for _ in subject["layer_types"])
    return 0.4 * latency_ms(subject) + 0.5 * ffn


def test_a_second_device_needs_few_measurements_of_its_own(tmp_path, lowered):
    first = run(tmp_path, FakeDevice())
    device = FakeDevice(name="other", latency=other_ms)
    second = run(tmp_path, device, replace(SETTINGS, whole_models=32), first=first)
    assert num_measured(second) <= 20
    assert {row.kind for row in second.rows} == {SubjectKind.model}
    assert second.predictor is PredictorKind.analytical
    unseen = [SPACE.sample(np.random.default_rng(seed)) for seed in range(50)]
    truth = np.array([other_ms(spec.to_dict()) for spec in unseen])
    assert np.abs(second.predictors[PREFILL].predict(unseen).mean / truth - 1).mean() < 0.03
    again = FakeDevice(name="other", latency=other_ms)
    run(tmp_path, again, replace(SETTINGS, whole_models=32), first=first)
    assert again.measured == []
    strict = replace(SETTINGS, whole_models=32, target_error_pct=1e-6)
    assert num_measured(run(tmp_path, device, strict, first=first)) == 20


def test_models_that_the_store_knows_count_for_every_predictor(tmp_path, lowered):
    active = run(tmp_path, FakeDevice(), ACTIVE)
    model = run(tmp_path, FakeDevice(), SETTINGS)
    assert set(active.models) <= set(model.models)


def test_second_device_starts_from_the_first(tmp_path, lowered):
    first = run(tmp_path, FakeDevice(), replace(ACTIVE, target_error_pct=1e-6))
    second = FakeDevice(name="second")
    settings = replace(ACTIVE, transfer_from="fake")
    model = run(tmp_path, second, settings)
    assert type(model.predictors[model.objective]).__name__ == "TransferPredictor"
    assert num_measured(model) <= 16 < num_measured(first)
    unseen = [SPACE.sample(np.random.default_rng(seed)) for seed in range(50)]
    truth = np.array([latency_ms(spec.to_dict()) for spec in unseen])
    assert np.abs(model.predictors[model.objective].predict(unseen).mean / truth - 1).mean() < 0.03
    with pytest.raises(InputError, match=r"transfer_from=nobody: .* holds fake, second$"):
        run(tmp_path, FakeDevice(name="third"), replace(ACTIVE, transfer_from="nobody"))


def test_other_work_on_the_device_is_said(tmp_path, lowered, caplog):
    run(tmp_path / "calm", FakeDevice(others_s=1.0))
    assert "other work" not in caplog.text
    run(tmp_path / "shared", FakeDevice(others_s=9.0))
    assert "other work kept 90 % of a processor busy throughout" in caplog.text


def test_blocks_are_refused_where_they_cannot_be_timed(tmp_path, lowered):
    phone = FakeDevice()
    phone.settings.name = "phone"
    phone.times_blocks = False
    with pytest.raises(InputError, match="phone cannot time blocks; choose latency=analytical"):
        run(tmp_path, phone)
    assert (lowered, phone.measured) == ([], [])
    assert run(tmp_path, phone, ACTIVE).models


def test_workload_must_fit_the_context(tmp_path):
    with pytest.raises(InputError, match="lowering.max_context=32: expected at least 68"):
        run(tmp_path, FakeDevice(), lowering=LoweringSettings(max_context=32))


def test_grid_spans_space_and_backbone():
    grid = make_grid(SPACE, BACKBONE.replace(model_dim=512), LatencySettings())
    assert (grid.model_dims[0], grid.model_dims[-1]) == (128, 512)
    assert set(grid.kinds) == set(Attention)


def test_whole_models_start_alike_and_end_with_the_backbone():
    few, many = (whole_models(SPACE, BACKBONE, num, seed=3) for num in (4, 9))
    assert few[:-1] == many[:4]
    assert few[-1] == many[-1] == BACKBONE.replace(tie_embeddings=True)
    assert all(spec in SPACE for spec in few)


@pytest.mark.parametrize("name", ["analytical", "blocks", "gp", "params", "flops"])
def test_values_of_each_group_file_fit_the_schema(name, request):
    path = request.config.rootpath / "conf" / "latency" / f"{name}.yaml"
    schema = OmegaConf.structured(LatencySettings)
    override = OmegaConf.from_dotlist(["group_size=3"])
    settings = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.load(path), override))
    assert settings.predictor is PredictorKind[name]
    assert settings.group_size == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("grid_widths", 1), ("grid_ffn", 0), ("calibration_models", 1), ("group_size", 0)],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(InputError, match=f"^{field}={value}: expected an integer"):
        LatencySettings(**{field: value})


@pytest.mark.slow
def test_stage_one_on_this_machine(tmp_path):
    backbone = BACKBONE.replace(
        model_dim=64, ffn_dim=128, layer_types=parse_pattern("FF"), vocab_size=128
    )
    sizes = SpaceSettings(
        name="smallest",
        num_layers=Choices(min=1, max=2),
        model_dim=Choices(min=64, max=64),
        ffn_dim=FfnChoices(min=64, max=128, step=32),
        kinds=[Attention.full_attention, Attention.skip_attention],
    )
    device_settings = DeviceSettings(
        name="test",
        processes=2,
        warmups=1,
        runs=3,
        lowering=LoweringSettings(max_context=64),
        workload=Workload(prompts=[48], contexts=[32], decode_tokens=4),
    )
    arguments = {
        "space": SearchSpace(sizes, backbone),
        "backbone": backbone,
        "device": HostDevice(device_settings),
        "workload": device_settings.workload,
        "lowering": device_settings.lowering,
        "settings": replace(BLOCKS, grid_widths=2, grid_ffn=2, calibration_models=2),
        "store": MeasurementStore(tmp_path / "measurements.jsonl"),
        "cache_dir": tmp_path / "programs",
    }
    model = collect(**arguments)
    assert num_measured(model) == 1 + 3 + 2 + 3
    shallow, deep = (
        backbone.replace(layer_types=parse_pattern(pattern), tie_embeddings=True)
        for pattern in ("F-", "FF")
    )
    for predictor in model.predictors.values():
        prediction = predictor.predict([shallow, deep])
        assert 0 < prediction.mean[0] < prediction.mean[1]
        assert (prediction.low <= prediction.high).all()
    start = time.process_time()
    collect(**arguments)
    assert time.process_time() - start < 1
