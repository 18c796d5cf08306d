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
second run fits to the same measurements of stage 1.
"""

import dataclasses
import logging
from pathlib import Path

import flash_space
import numpy as np
from record import SMOKE, Recorder, output

import conf
from flash.arch import ArchSpec
from flash.device.measurement import Program
from flash.device.settings import DeviceSettings
from flash.export.predicted import PredictedLatencies
from flash.latency.fit import LatencyModel, collect
from flash.latency.profiler import Profiler
from flash.latency.programs import Subject, recorded_lower_s
from flash.latency.settings import LatencySettings, PredictorKind
from flash.progress import progress

UNSEEN = 1 if SMOKE else 12
PREDICTORS = (PredictorKind.analytical, PredictorKind.blocks)[: 1 if SMOKE else None]
FOLDER = output(Path("runs/predicted"))


def open_profiler(device: DeviceSettings, settings: LatencySettings) -> Profiler:
    """Open the profiler of stage 1."""
    store = FOLDER / "measurements.jsonl"
    return flash_space.open_bench("tiny", device, settings, store, FOLDER / "lowered")


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
    backbone_ms = {point.name: float(every[-1]) for point, every in model.values_ms.items()}
    return PredictedLatencies(model.predict([spec])[0], model.models[-1], backbone_ms)


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


def main() -> None:
    models: dict[str, LatencyModel] = {}
    for kind in PREDICTORS:
        settings = LatencySettings(predictor=kind)
        if SMOKE:
            settings = LatencySettings(predictor=kind, whole_models=4, attempts=1, group_size=4)
        profiler = open_profiler(conf.host(), settings)
        models[kind.value] = fit(profiler)
    record = Recorder("predicted")
    compare(record, profiler, models, UNSEEN)
    for name, model in models.items():
        record.add(name, "measured_models", [len(model.models)], "models")
    record.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
