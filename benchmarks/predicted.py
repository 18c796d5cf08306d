"""Predicted latencies against those that exports measure, of architectures that are new to both.

Stage 1 of the search fits the predictors of `space=tiny` on this machine, with the settings that
users get. Twelve other members of the space, stratified over it, are then measured as an export
does: each alone with the backbone's program, in fresh processes. One that stage 1 has measured is
not taken.

Cases are `<predictor>/<point>`. `error_pct` is the absolute difference of the measured latency
from the predicted one, as the export's summary shows them: for the speed that the machine had,
which the backbone shows (flash.export.predicted). `raw_error_pct` is without that correction,
`bias_pct` its median with its sign, and `largest_error_pct` the largest of `error_pct`.

Programs and measurements of stage 1 are kept in runs/predicted, so that a killed run goes on; a
second run fits to the same measurements of stage 1. `python benchmarks/predicted.py [--smoke]`;
`--smoke` takes few and short measurements and keeps no results.
"""

import argparse
import dataclasses
import logging
from pathlib import Path

import numpy as np
from record import Recorder

import conf
from flash.arch import ArchSpec
from flash.device.factory import open_device
from flash.device.measurement import Program
from flash.device.settings import DeviceSettings
from flash.device.workload import Workload
from flash.export.predicted import PredictedLatencies
from flash.latency.fit import LatencyModel, collect, make_profiler
from flash.latency.profiler import Profiler
from flash.latency.programs import Subject, recorded_lower_s
from flash.latency.settings import LatencySettings, PredictorKind
from flash.latency.store import MeasurementStore
from flash.lowering.settings import LoweringSettings
from flash.progress import progress

UNSEEN = 12
PREDICTORS = (PredictorKind.analytical, PredictorKind.blocks)
FOLDER = Path("runs/predicted")


def smoke_device() -> DeviceSettings:
    """Return settings of measurements that take a second."""
    return dataclasses.replace(
        conf.host(),
        processes=1,
        warmups=0,
        runs=1,
        lowering=LoweringSettings(max_context=64),
        workload=Workload(prompts=[32], contexts=[32], decode_tokens=4),
    )


def open_profiler(device: DeviceSettings, settings: LatencySettings, folder: Path) -> Profiler:
    """Open the profiler of stage 1."""
    return make_profiler(
        backbone=conf.space("tiny").base,
        device=open_device(device),
        workload=device.workload,
        lowering=device.lowering,
        settings=settings,
        store=MeasurementStore(folder / "measurements.jsonl"),
        cache_dir=folder / "lowered",
    )


def fit(profiler: Profiler) -> LatencyModel:
    """Fit the predictors as the search does."""
    space = conf.space("tiny")
    return collect(
        space=space,
        backbone=space.base,
        device=profiler.device,
        workload=profiler.workload,
        lowering=profiler.lowering,
        settings=profiler.settings,
        store=profiler.store,
        cache_dir=profiler.cache_dir,
    )


def unseen(models: list[LatencyModel], num: int) -> list[ArchSpec]:
    """Draw members of the space that no predictor was fitted to."""
    seen = {spec for model in models for spec in model.models}
    drawn = conf.space("tiny").stratified(np.random.default_rng(1), num + len(seen))
    return [spec for spec in drawn if spec not in seen][:num]


def predict(model: LatencyModel, spec: ArchSpec) -> PredictedLatencies:
    """Predict one architecture, in the form that exports read."""
    found = {}
    for point, predictor in model.predictors.items():
        interval = predictor.predict([spec])
        found[point.name] = {
            f"{name}_ms": float(getattr(interval, name)[0]) for name in ("mean", "low", "high")
        }
    backbone_ms = {point.name: float(every[-1]) for point, every in model.values_ms.items()}
    return PredictedLatencies(found, model.models[-1], backbone_ms)


def compare(
    record: Recorder, profiler: Profiler, models: dict[str, LatencyModel], num: int
) -> None:
    """Measure unseen architectures as exports do, and compare them with each predictor."""
    backbone = Subject(spec=conf.space("tiny").base.as_program())
    reference = dataclasses.replace(backbone.program(profiler.lowered(backbone)), name="reference")
    errors: dict[tuple[str, str], list[tuple[float, float]]] = {}
    slowdowns: dict[str, list[float]] = {}
    for spec in progress(unseen(list(models.values()), num), "unseen architectures"):
        subject = Subject(spec=spec)
        path = profiler.lowered(subject)
        program: Program = subject.program(path)
        measured = profiler.measure_program(
            subject, program, (backbone, reference), recorded_lower_s(path)
        )
        for name, model in models.items():
            predicted = predict(model, spec)
            at = predicted.at(backbone.spec, measured.reference_ms)
            for point, latency in measured.latencies.items():
                pair = (
                    100 * (latency.ms / at[point]["mean_ms"] - 1),
                    100 * (latency.ms / predicted.by_point[point]["mean_ms"] - 1),
                )
                errors.setdefault((name, point), []).append(pair)
                if name == PREDICTORS[0].value:
                    slowdowns.setdefault(point, []).append(at[point]["slowdown"])
    for (name, point), pairs in errors.items():
        case = f"{name}/{point}"
        record.add(case, "error_pct", [abs(error) for error, _ in pairs], "%")
        record.add(case, "largest_error_pct", [max(abs(error) for error, _ in pairs)], "%")
        record.add(case, "bias_pct", [error for error, _ in pairs], "%")
        record.add(case, "raw_error_pct", [abs(raw) for _, raw in pairs], "%")
        record.add(case, "raw_bias_pct", [raw for _, raw in pairs], "%")
    for point, values in slowdowns.items():
        record.add(point, "slowdown", values, "ratio")


def main(smoke: bool) -> None:
    device = smoke_device() if smoke else conf.host()
    folder = FOLDER / ("smoke" if smoke else "")
    models: dict[str, LatencyModel] = {}
    for kind in PREDICTORS[: 1 if smoke else None]:
        settings = LatencySettings(predictor=kind)
        if smoke:
            settings = LatencySettings(predictor=kind, whole_models=4, attempts=1, group_size=4)
        profiler = open_profiler(device, settings, folder)
        models[kind.value] = fit(profiler)
    record = Recorder("predicted")
    compare(record, profiler, models, 1 if smoke else UNSEEN)
    for name, model in models.items():
        record.add(name, "measured_models", [len(model.models)], "models")
    if not smoke:
        record.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="few and short measurements")
    main(parser.parse_args().smoke)
