"""Latencies of models with random weights: storage, comparison, and refused settings."""

import dataclasses
import json
import re
import shutil

import pytest
import yaml

from flash.arch import ArchSpec, count_parameters, parse_pattern
from flash.config import CONF
from flash.device.base import Device
from flash.device.factory import open_device
from flash.device.measurement import Latency, Measurement
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.errors import InputError
from flash.export import random_weights as shapes
from flash.export.random_weights import ShapeResult, measure_shape, shape_of, shape_results
from flash.export.table6 import flash_of, paper_figures, table6
from flash.interop.baselines import STOCK_MODELS, stock_model
from flash.latency.programs import Subject
from flash.latency.store import MeasurementStore, SubjectKind
from flash.lowering.settings import LoweringSettings
from flash.model.settings import BackboneSettings
from flash.paths import Runs
from flash.workspace import arch_of

TINY = ArchSpec(
    model_dim=32,
    ffn_dim=64,
    layer_types=parse_pattern("F-"),
    num_heads=1,
    num_kv_heads=1,
    head_dim=32,
    vocab_size=64,
    max_context=256,
)
BACKBONE = BackboneSettings(name="tiny", arch=TINY.to_dict())


def device(
    *, processes: int = 2, max_context: int = 64, prefill_chunk: int = 16, prompts=(20, 40)
) -> Device:
    settings = DeviceSettings(
        name="test",
        lowering=LoweringSettings(max_context=max_context, prefill_chunk=prefill_chunk),
        workload=Workload(prompts=list(prompts), contexts=[30], decode_tokens=2),
        processes=processes,
        warmups=1,
        runs=1,
        reject_ratio=1000.0,
    )
    return open_device(settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def measured(runs):
    return measure_shape("own", TINY, device(), runs)


@pytest.fixture
def no_work(monkeypatch):
    """Make lowering and measuring raise an error."""

    def refuse(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(Subject, "write", refuse)
    monkeypatch.setattr(Device, "measure", refuse)


def test_all_points_are_measured_and_kept(measured, runs):
    assert list(measured.measurement.latencies) == ["prefill_20", "prefill_40", "decode_30"]
    assert measured.parameters == count_parameters(TINY).total
    assert measured.stack == "flash"
    path = measured.path(runs, device().settings)
    assert path == runs.root / "shapes" / "test" / f"own.{measured.key[:8]}.json"
    assert ShapeResult.read(path) == measured
    programs = list((runs.root / "lowered").glob("model-*.pte"))
    assert [program.stat().st_size for program in programs] == [measured.pte_bytes]


def test_the_same_is_not_measured_again(measured, runs, no_work):
    assert measure_shape("own", TINY, device(), runs) == measured


def test_another_protocol_measures_the_same_program(measured, runs, tmp_path, monkeypatch):
    runs = Runs(shutil.copytree(runs.root, tmp_path / "runs"))
    monkeypatch.delattr(Subject, "write")
    monkeypatch.setattr(Device, "measure", lambda *args: [measured.measurement])
    again = measure_shape("own", TINY, device(processes=3), runs)
    assert again.lower_s == measured.lower_s
    assert again.key != measured.key
    assert shape_results(runs, device()) == [measured]
    assert shape_results(runs, device(processes=3)) == [again]


def test_another_name_takes_what_the_store_has(measured, runs, tmp_path, no_work):
    runs = Runs(shutil.copytree(runs.root, tmp_path / "runs"))
    again = measure_shape("other", TINY.replace(tie_embeddings=False), device(), runs)
    assert again.measurement == dataclasses.replace(measured.measurement, name="other")
    assert len(MeasurementStore(runs.measurements)) == 3


def test_only_points_that_the_store_lacks_are_measured(measured, runs, tmp_path):
    runs = Runs(shutil.copytree(runs.root, tmp_path / "runs"))
    more = measure_shape("own", TINY, device(prompts=[20, 40, 30]), runs)
    assert list(more.measurement.latencies) == [
        *("prefill_20", "prefill_40", "prefill_30", "decode_30"),
    ]
    for name in measured.measurement.latencies:
        assert more.measurement.latencies[name] == measured.measurement.latencies[name]
    assert len(MeasurementStore(runs.measurements)) == 4


def test_stock_shapes_are_in_the_store_and_in_its_table(tmp_path, monkeypatch):
    lowered = []

    def write(subject, path, lowering):
        lowered.append(subject)
        path.write_bytes(b"program")

    found = result("any", prefill_20=1.0, prefill_40=2.0, decode_30=0.5).measurement
    samples = [{"accepted": True, "prefill_20": [], "prefill_40": [], "decode_30": []}]
    found = dataclasses.replace(found, samples=samples, conditions=[{"started": 1.0}])
    monkeypatch.setattr(Subject, "write", write)
    monkeypatch.setattr(Device, "measure", lambda *args: [found])
    runs, stock = Runs(tmp_path), stock_model("lfm2_350m")
    measured = measure_shape("lfm2_350m", stock, device(), runs)
    monkeypatch.delattr(Device, "measure")
    again = measure_shape("again", stock, device(), runs)
    assert again.measurement == dataclasses.replace(measured.measurement, name="again")
    assert [subject.stock for subject in lowered] == [stock]
    assert len(list(runs.lowered.glob("stock-*.pte"))) == 1
    store = MeasurementStore(runs.measurements)
    assert {row.kind for row in store} == {SubjectKind.stock}
    assert store.write_csv(tmp_path / "table.csv") == 3
    assert (tmp_path / "table.csv").read_text("utf-8").count("lfm2_350m") == 3


def test_a_damaged_result_is_named(measured, runs, tmp_path, no_work):
    runs = Runs(shutil.copytree(runs.root, tmp_path / "runs"))
    measured.path(runs, device().settings).write_text("{}", "utf-8")
    with pytest.raises(InputError, match=r"own\.\w+\.json: damaged .*; delete it to measure again"):
        measure_shape("own", TINY, device(), runs)


def result(name: str, **latencies: float) -> ShapeResult:
    return ShapeResult(
        name=name,
        shape={},
        stack="flash",
        parameters=350_000_000,
        measurement=Measurement(
            name=name,
            latencies={k: Latency(ms=v, se_ms=v / 100) for k, v in latencies.items()},
            load_ms=1.0,
            peak_rss_mib=1.0,
            model_rss_mib=1.0,
        ),
        pte_bytes=1,
        lower_s=1.0,
        device={"device": "host", "processor": "X", "threads": 1, "cpus": ""},
        conditions="c",
        key="k",
    )


def cells(text: str, name: str) -> list[str]:
    """Cells of a row, from all the tables that its columns are shared out among."""
    rows = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    assert max(map(len, rows)) <= 80
    return [name, *(cell for row in rows for cell in re.split(r"\s{2,}", row)[1:])]


def test_the_table_compares_with_flash_of_the_class_here_and_on_the_phone():
    text = table6([
        result("lfm2_700m", prefill_2048=9000.0, decode_2048=50.0),
        result("own", prefill_2048=1000.0, decode_2048=10.0),
        result("flash_650m", prefill_2048=6000.0, decode_2048=40.0),
    ])
    assert cells(text, "model") == [
        *("model", "parameters", "TTFT 2k [s]", "Galaxy S25", "decode 2k [tok/s]", "Galaxy S25"),
    ]
    lfm2 = ["lfm2_700m", "350.0M", "9.00 +- 0.09 (1.50x)", "6.01 (1.80x)"]
    assert cells(text, "lfm2_700m") == [*lfm2, "20.0 +- 0.2 (1.25x)", "53.57 (1.59x)"]
    flash = ["flash_650m", "350.0M", "6.00 +- 0.06", "3.34", "25.0 +- 0.2", "85.35"]
    assert cells(text, "flash_650m") == flash
    assert cells(text, "own")[3] == "-"
    names = [line.split()[0] for line in text.splitlines()[1:4]]
    assert names == ["flash_650m", "lfm2_700m", "own"]
    assert "host: processor X, threads 1; Galaxy S25: arXiv:2603.15954" in text


def test_without_flash_of_the_class_there_is_no_ratio_here():
    text = table6([result("lfm2_700m", prefill_1000=900.0)])
    assert cells(text, "lfm2_700m")[2:] == ["0.9000 +- 0.0090", "-"]
    assert "TTFT 1000 [s]" in text
    assert table6([]) == "no shape was measured under these conditions"


def test_every_model_of_the_paper_has_a_file_and_figures():
    phone = paper_figures()
    names = [name for names in phone["classes"].values() for name in names]
    for name in names:
        arch = yaml.safe_load((CONF / "arch" / f"{name}.yaml").read_text("utf-8"))
        assert arch.get("stock", name) == name
        for kind in ("ttft_s", "decode_tok_s"):
            assert list(phone[kind][name]) == [1024, 2048, 4096]
    assert set(STOCK_MODELS) < set(names)
    assert set(phone["ttft_s"]) == set(phone["decode_tok_s"]) == set(names)
    assert flash_of("gemma3_1b") == "flash_1_4b"
    assert flash_of("flash_1_4b") is None


@pytest.mark.parametrize("name", ["qwen3_0_6b", "llama3_2_1b"])
def test_whole_specs_are_those_of_their_backbones(name):
    arch = yaml.safe_load((CONF / "arch" / f"{name}.yaml").read_text("utf-8"))
    backbone = yaml.safe_load((CONF / "backbone" / f"{name}.yaml").read_text("utf-8"))
    del arch["defaults"]
    assert ArchSpec.from_dict(arch) == ArchSpec.from_dict(backbone["arch"])


def test_arch_selects_a_shape():
    assert shape_of({}, BACKBONE) == TINY
    assert shape_of({"ffn_dim": 32}, BACKBONE) == TINY.replace(ffn_dim=32)
    nothing = BackboneSettings(name="none")
    assert shape_of({"stock": "lfm2_350m"}, nothing) == stock_model("lfm2_350m")


@pytest.mark.parametrize(
    ("arch", "model", "message"),
    [
        ({"stock": "lfm2_35m"}, "random", "arch.stock=lfm2_35m: .*did you mean 'lfm2_350m'?"),
        ({"stock": "lfm2_350m"}, None, "model=null: expected random: arch.stock=lfm2_350m has no"),
        ({"stock": "lfm2_350m"}, "folder", "model=folder: expected random"),
        ({"stock": "lfm2_350m", "ffn_dim": 64}, "random", "arch.ffn_dim=64: expected no key"),
        ({"stok": "lfm2_350m"}, "random", "arch.stok: unknown key"),
    ],
)
def test_mistakes_are_named(arch, model, message):
    with pytest.raises(InputError, match=message):
        shape_of(arch, BACKBONE, model)


def test_stock_baselines_are_neither_trained_nor_searched():
    backbone = shapes.Backbone.open(BACKBONE)
    with pytest.raises(InputError, match="arch.stock=gemma3_1b: expected an architecture of ours"):
        arch_of({"stock": "gemma3_1b"}, backbone)


def test_contexts_are_checked_before_lowering(tmp_path, no_work):
    long = device(max_context=512)
    with pytest.raises(InputError, match=r"lowering.max_context=512: expected at most arch"):
        measure_shape("own", TINY, long, Runs(tmp_path))
    gemma = stock_model("gemma3_270m")
    settings = device(max_context=4096, prefill_chunk=2048)
    with pytest.raises(InputError, match=r"lowering.prefill_chunk=2048: expected at most 1024"):
        measure_shape("gemma", gemma, settings, Runs(tmp_path))
    assert not list(tmp_path.iterdir())


def test_results_of_other_devices_and_settings_do_not_mix(tmp_path):
    runs = Runs(tmp_path)
    conditions = shapes.device_conditions(device(), device().settings)
    mine = dataclasses.replace(result("mine", prefill_20=1.0), conditions=conditions)
    for each in (mine, result("other", prefill_20=1.0)):
        each.write(each.path(runs, device().settings))
    assert shape_results(runs, device()) == [mine]
    assert json.loads(mine.path(runs, device().settings).read_text("utf-8"))["key"] == "k"
