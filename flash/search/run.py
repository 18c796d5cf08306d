"""`search.py`: both stages of the method, from a backbone and a device to a frontier."""

import json
import logging
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from omegaconf import MISSING

from flash.arch import ArchSpec, SearchSpace, SpaceSettings, count_parameters
from flash.data import DataSettings
from flash.device import DeviceSettings, open_device
from flash.files import write_text
from flash.latency import LatencyModel, LatencySettings, MeasurementStore, collect
from flash.model import Backbone, BackboneSettings
from flash.prune import fingerprint
from flash.runs import Runs
from flash.search.evaluate import ShortTraining
from flash.search.frontier import write_frontier, write_report
from flash.search.loop import frontier, search
from flash.search.settings import SearchSettings
from flash.search.study import Study, Trial, open_study, space_fingerprint
from flash.training import RecipeSettings, TrainerSettings, heldout_quality
from flash.training.loggers import LoggerSettings, close_logger, make_logger
from flash.training.run import Inputs, importance_of, plain

log = logging.getLogger(__name__)


class Stage(Enum):
    """How far `search.py` goes."""

    latency = "latency"
    """Stage 1 only: measure, fit, report how good the predictor is. Needs no weights, no data."""
    search = "search"
    """Both stages."""


@dataclass(kw_only=True)
class SearchJobSettings:
    """Root of `search.py`."""

    stage: Stage = Stage.search
    """Where to stop."""

    backbone: BackboneSettings = MISSING
    space: SpaceSettings = MISSING
    latency: LatencySettings = MISSING
    device: DeviceSettings = MISSING
    data: DataSettings = MISSING
    recipe: RecipeSettings = MISSING
    trainer: TrainerSettings = MISSING
    logger: LoggerSettings = MISSING
    search: SearchSettings = MISSING
    seed: int = 0
    runs: str = "runs"
    """Folder for everything that runs produce."""


@dataclass(frozen=True)
class _Job:
    """A search that was checked and opened."""

    settings: SearchJobSettings
    space: SearchSpace
    inputs: Inputs
    study: Study

    @property
    def folder(self) -> Path:
        return self.inputs.runs.study(self.settings.search.study)


def _open(settings: SearchJobSettings) -> _Job:
    backbone = Backbone.open(settings.backbone)
    space = SearchSpace(settings.space, backbone.spec)
    if backbone.folder is None:
        backbone.load()  # says that weights are needed
    assert backbone.folder is not None
    runs = Runs(Path(settings.runs))
    inputs = Inputs.open(backbone, settings.data, settings.recipe, seed=settings.seed, runs=runs)
    identity = {
        **space_fingerprint(space),
        "backbone": fingerprint(backbone.folder),
        "data": [inputs.data.streams.digest, settings.data.seq_len],
        "heldout_sequences": settings.data.heldout_sequences,
        "recipe": plain(settings.recipe),
        "precision": settings.trainer.precision.value,
        "device": open_device(settings.device).identity(),
        "workload": plain(settings.device.workload),
        "seed": settings.seed,
    }
    name = settings.search.study
    study = open_study(runs.study(name) / "study.db", name, identity)
    return _Job(settings, space, inputs, study)


def run_search(settings: SearchJobSettings) -> dict[str, Any]:
    """Run or resume a search; returns what `frontier.json` holds.

    Raises:
        InputError: Settings, backbone, data or study that cannot be used.
    """
    if settings.stage is Stage.latency:
        return _stage_one(settings)
    job = _open(settings)
    log.info(
        "space %s: %s architectures (%s with every slot free)",
        settings.space.name,
        f"{job.space.count():,}",
        f"{job.space.count_slots():,}",
    )
    latency = _latency(settings, job.space, job.inputs.backbone)
    finished = [trial for trial in job.study.trials() if trial.finished]
    if len(finished) < settings.search.trials or not (job.folder / "frontier.json").is_file():
        report = _stage_two(job, latency)
    else:
        log.info("study %s is finished: %d trials", settings.search.study, len(finished))
        report = _write(job, latency, job.study.trials(), _reference(job, latency))
    _describe(job, report)
    return report


def _latency(settings: SearchJobSettings, space: SearchSpace, backbone: Backbone) -> LatencyModel:
    runs = Runs(Path(settings.runs))
    return collect(
        space=space,
        backbone=backbone.spec,
        device=open_device(settings.device),
        workload=settings.device.workload,
        lowering=settings.device.lowering,
        settings=settings.latency,
        store=MeasurementStore(runs.measurements),
        cache_dir=runs.lowered,
        seed=settings.seed,
    )


def _stage_one(settings: SearchJobSettings) -> dict[str, Any]:
    """Measure and fit for a device; prints and stores how good the predictor is."""
    backbone = Backbone.open(settings.backbone)
    space = SearchSpace(settings.space, backbone.spec)
    latency = _latency(settings, space, backbone)
    folder = Runs(Path(settings.runs)).latency(settings.device.name)
    report = {
        "device": open_device(settings.device).identity(),
        "space": settings.space.name,
        "backbone": backbone.name,
        "predictor": settings.latency.predictor.value,
        "metrics": latency.metrics(),
        "models": [
            {
                "spec": spec.to_dict(),
                **{p.name: float(latency.values_ms[p][i]) for p in latency.predictors},
                **{
                    f"{p.name}_left_out": float(latency.left_out_ms[p][i])
                    for p in latency.predictors
                },
            }
            for i, spec in enumerate(latency.models)
        ],
        "settings": plain(settings),
    }
    write_text(folder / "latency.json", json.dumps(report, indent=1) + "\n")
    MeasurementStore(Runs(Path(settings.runs)).measurements).write_csv(folder / "measurements.csv")
    print(f"\n{settings.device.name}: leave-one-out over {len(latency.models)} whole models")
    print(latency.describe())
    print(f"\nkept: {folder / 'latency.json'}, {folder / 'measurements.csv'}")
    return report


def _reference(job: _Job, latency: LatencyModel) -> tuple[float, float]:
    """The reference point; the backbone's quality is computed once and kept with the study."""
    quality = job.study.remember(
        "backbone_quality",
        lambda: plain(
            heldout_quality(
                job.inputs.backbone.load(), job.inputs.data, job.settings.trainer.precision
            )
        ),
    )
    backbone_ms = float(_predict(latency, [job.inputs.backbone.spec])[0])
    return job.settings.search.reference(quality["loss"], backbone_ms)


def _predict(latency: LatencyModel, specs: list[ArchSpec]) -> np.ndarray:
    tied = [spec.replace(tie_embeddings=True) for spec in specs]  # the programs are the same
    return latency.target.predict(tied).mean


def _stage_two(job: _Job, latency: LatencyModel) -> dict[str, Any]:
    settings, runs = job.settings, job.inputs.runs
    importance = importance_of(job.inputs.backbone, job.inputs.data, settings.recipe, runs)
    evaluate = ShortTraining(
        job.inputs, importance, settings.recipe, settings.trainer, settings.seed
    )
    reference = _reference(job, latency)
    log.info(
        "reference point: loss %.3f, %s %.1f ms",
        reference[0],
        latency.objective.name,
        reference[1],
    )
    logger = make_logger(
        settings.logger,
        folder=runs.logs,
        run=settings.search.study,
        job="search",
        config=plain(settings),
    )
    try:
        if logger is not None:
            logger.log_metrics(latency.metrics(), step=0)
        trials = search(
            job.study,
            job.space,
            evaluate,
            lambda specs: _predict(latency, list(specs)),
            settings.search,
            reference=reference,
            seed=settings.seed,
            on_trial=lambda trial: _log_trial(logger, trial),
        )
        report = _write(job, latency, trials, reference)
        if logger is not None:
            metrics = {"search/hypervolume": report["hypervolume"][-1]}
            logger.log_metrics(metrics, step=len(trials))
    finally:
        close_logger(logger)
    return report


def _log_trial(logger: Logger | None, trial: Trial) -> None:
    if logger is None or trial.loss is None:
        return
    metrics = {
        "search/loss": trial.loss,
        "search/latency_ms": trial.latency_ms,
        "search/parameters": count_parameters(trial.spec).total,
        "search/model_dim": trial.spec.model_dim,
        "search/ffn_dim": trial.spec.ffn_dim,
        "search/num_layers": trial.spec.num_layers,
    }
    logger.log_metrics(metrics, step=trial.number)


def _write(
    job: _Job, latency: LatencyModel, trials: list[Trial], reference: tuple[float, float]
) -> dict[str, Any]:
    """`frontier.json`, the arch YAML of every frontier member, and the names of the winners."""
    settings, runs = job.settings, job.inputs.runs
    name = settings.search.study
    paths = write_frontier(runs.found_arch, name, trials)
    specs = {trial.number: trial.spec for trial in frontier(trials)}
    backbone = job.inputs.backbone
    specs[-1] = backbone.spec.replace(tie_embeddings=True)
    predicted = {}
    for point, predictor in latency.predictors.items():
        interval = predictor.predict(list(specs.values()))
        rows = zip(specs, interval.mean, interval.low, interval.high, strict=True)
        for number, mean, low, high in rows:
            values = {"mean_ms": float(mean), "low_ms": float(low), "high_ms": float(high)}
            predicted.setdefault(number, {})[point.name] = values
    names = dict(zip((t.number for t in frontier(trials)), (p.stem for p in paths), strict=True))
    return write_report(
        job.folder / "frontier.json",
        name,
        trials,
        reference,
        settings.search.winners,
        about={
            "backbone": {
                "name": backbone.name,
                "spec": backbone.spec.to_dict(),
                "quality": job.study.remember("backbone_quality", dict),
                "predicted": predicted.pop(-1),
            },
            "names": {str(number): stem for number, stem in names.items()},
            "predicted": {str(number): values for number, values in predicted.items()},
            "objective": latency.objective.name,
            "latency_scores": latency.metrics(),
            "latency_points": {
                point.name: [float(value) for value in values]
                for point, values in latency.values_ms.items()
            },
            "latency_fitted": {
                point.name: [float(value) for value in values]
                for point, values in latency.left_out_ms.items()
            },
            "space": {
                "name": settings.space.name,
                "count": job.space.count(),
                "count_slots": job.space.count_slots(),
            },
            "device": open_device(settings.device).identity(),
            "workload": plain(settings.device.workload),
            "settings": plain(settings),
        },
    )


def _describe(job: _Job, report: dict[str, Any]) -> None:
    """The frontier on the terminal, and what to type next."""
    by_number = {trial["number"]: trial for trial in report["trials"]}
    failed = sum(trial["state"] == "fail" for trial in report["trials"])
    print(f"\nfrontier of {len(by_number)} trials ({failed} failed), fastest first; * = winner")
    objective = report["objective"]
    header = f"{objective} ms [90 %]"
    print(f"{'arch':12s} {'loss':>6s} {header:>24s} {'params':>9s}  pattern")
    for number in report["frontier"]:
        spec = ArchSpec.from_dict(by_number[number]["spec"])
        target = report["predicted"][str(number)][objective]
        interval = f"{target['mean_ms']:.1f} [{target['low_ms']:.1f}, {target['high_ms']:.1f}]"
        mark = "*" if number in report["winners"] else " "
        parameters = count_parameters(spec).total / 1e6
        print(
            f"{report['names'][str(number)]:11s}{mark} {by_number[number]['loss']:6.3f} "
            f"{interval:>24s} {parameters:8.2f}M  {spec}"
        )
    winners = ",".join(report["names"][str(number)] for number in sorted(report["winners"]))
    write_text(job.folder / "winners", winners + "\n")
    print(f"\nnext: python train.py -m +arch={winners}")
