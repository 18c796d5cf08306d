"""Entry point of `search.py`: both stages of the method, from backbone and device to frontier."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec
from flash.device.base import Device
from flash.errors import InputError, require
from flash.latency.fit import LatencyModel
from flash.latency.programs import lowering_values
from flash.latency.store import MeasurementStore
from flash.paths import Runs
from flash.provenance import provenance
from flash.records import digest, find_json, plain, write_json
from flash.search.estimate import in_words, trial_hours
from flash.search.evaluate import ShortTraining, remove_checkpoints
from flash.search.fingerprint import check_fingerprint
from flash.search.frontier import write_frontier, write_report
from flash.search.job import (
    SearchJob,
    evaluation_of,
    open_job,
    open_space,
    open_workspace,
    problem_of,
)
from flash.search.latencies import latencies_of, of_further_device, open_devices, placed
from flash.search.logs import SearchLog, log_study, show_curves
from flash.search.loop import frontier, rescore, search
from flash.search.objectives import Problem, limit_name
from flash.search.printing import print_frontier
from flash.search.promote import promote
from flash.search.sampler import check_limits
from flash.search.settings import SearchJobSettings, SearchStage
from flash.search.storage import named_errors
from flash.search.study import Study, open_study, reopen_study
from flash.search.trial import Trial
from flash.terminal import table
from flash.tracking.artifacts import Artifact, ArtifactKind
from flash.tracking.backend import JobType, RunInfo
from flash.tracking.tracker import Tracker, open_tracker

log = logging.getLogger(__name__)

Figures = Callable[[Runs, str], Mapping[str, Any]]
"""Function (runs, study) -> figures by name. It is passed in, since the report imports the search
and not the other way round."""


def _no_figures(runs: Runs, study: str) -> Mapping[str, Any]:
    return {}


def run_search(settings: SearchJobSettings, figures: Figures = _no_figures) -> dict[str, Any]:
    """Run, resume or join a search.

    Args:
        settings: Settings of `search.py`.
        figures: Draws the figures for the W&B run of the search and for optuna-dashboard.

    Returns:
        The content of `frontier.json`; of another stage, its report.

    Raises:
        InputError: Settings, backbone, data or study cannot be used.
    """
    if settings.stage is SearchStage.latency:
        return _stage_one(settings)
    job = open_job(settings)
    log.info(
        "space %s: %s architectures (%s with every slot free)",
        settings.space.name,
        f"{job.space.count():,}",
        f"{job.space.count_slots():,}",
    )
    source = settings.search.from_study
    used = source or settings.search.study
    with named_errors(job.storage(used), used):
        report = _use_study(job, figures) if source is None else _rescore(job, source)
    if settings.stage is not SearchStage.promote:
        print_frontier(job, report)
    return report


def _use_study(job: SearchJob, figures: Figures) -> dict[str, Any]:
    """Run stage 2, or train its best trials longer (`stage=promote`)."""
    settings, storage = job.settings, job.storage(job.settings.search.study)
    new = isinstance(storage, Path) and not storage.is_file()
    if job.tasks is not None and settings.stage is SearchStage.search and new:
        _ = job.tasks.loaded  # raises before there is a study of tasks that cannot be used
    study = open_study(
        storage,
        settings.search.study,
        job.identity,
        objectives=job.objectives,
        heartbeat_s=settings.search.heartbeat_s,
        retries=settings.search.retries,
    )
    if settings.stage is SearchStage.search:
        left = settings.search.trials - sum(trial.finished for trial in study.trials())
        if left > 0:
            _prepare(job, left)
    with study.lock():  # one worker measures; the others find the results in the store
        latencies = latencies_of(settings, job.space, job.workspace, job.devices)
        problem = problem_of(job, study, latencies)
    if settings.stage is SearchStage.promote:
        return _promote(job, study, problem)
    return _stage_two(job, study, latencies, problem, figures)


def _prepare(job: SearchJob, left: int) -> None:
    """Load the tasks, and log how long the training of the trials that are left will take.

    Raises:
        InputError: The data of a task cannot be used, or it has no such metric.
    """
    settings, backbone = job.settings, job.workspace.backbone.spec
    if job.tasks is not None:
        _ = job.tasks.loaded
    seq_len = settings.data.seq_len
    hours = trial_hours(job.space, settings.recipe, settings.trainer, seq_len, backbone)
    log.info(
        "%d trials of %s tokens: about %s of training on this machine, after stage 1",
        left,
        f"{settings.recipe.tokens:,}",
        in_words(left * hours),
    )


@dataclass(frozen=True)
class _Measured:
    """Part of a former `latency.json` that is read."""

    device: dict[str, Any]


def _stage_one(settings: SearchJobSettings) -> dict[str, Any]:
    """Run stage 1: measure a device, fit the predictor, print and store its accuracy."""
    workspace = open_workspace(settings)
    backbone, runs = workspace.backbone, workspace.runs
    space = open_space(settings.space, backbone.spec)
    devices = open_devices(settings, workspace)
    for place, device in placed(settings, devices):
        path = runs.latency(device.settings.name) / "latency.json"
        former = find_json(path, _Measured, "measure again")
        with of_further_device(place):
            if former is not None:
                device.check_unit(former.device, path)
    latencies = latencies_of(settings, space, workspace, devices)
    reports = [
        _write_latency(settings, device, latencies[device.settings.name], backbone.name)
        for device in devices
    ]
    return reports[0]


def _write_latency(
    settings: SearchJobSettings, device: Device, latency: LatencyModel, backbone: str
) -> dict[str, Any]:
    """Write `latency.json` and the measurements of a device, and print how good its predictor is.

    Returns:
        The content of `latency.json`.
    """
    runs, name = Runs(Path(settings.runs)), device.settings.name
    path = runs.latency(name) / "latency.json"
    report = {
        "device": device.identity(),
        "space": settings.space.name,
        "backbone": backbone,
        "predictor": latency.predictor.value,
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
    write_json(path, report)
    MeasurementStore(runs.measurements).write_csv(path.with_name("measurements.csv"))
    print(f"\n{name}: leave-one-out over {len(latency.models)} whole models\n")
    print(latency.describe())
    return report


def _stage_two(
    job: SearchJob,
    study: Study,
    latencies: Mapping[str, LatencyModel],
    problem: Problem,
    figures: Figures,
) -> dict[str, Any]:
    settings, runs, name = job.settings, job.workspace.runs, job.settings.search.study
    trials = study.trials()
    if sum(trial.finished for trial in trials) >= settings.search.trials:
        log.info("study %s is finished: %d trials", name, len(trials))
        return _write(job, study, latencies, problem, trials)
    with study.lock():
        evaluate = evaluation_of(job, job.checkpoints)
    pairs = zip(problem.objectives, problem.reference, strict=True)
    log.info("reference point: %s", ", ".join(f"{o.key} {worst:.4g}" for o, worst in pairs))
    backbone = job.workspace.backbone.spec
    backbone_ms = float(problem.costs([backbone])[problem.headline][0])
    with open_tracker(settings.logger, runs.logs, _run_info(job)) as tracker:
        trial_log = SearchLog(tracker, problem, backbone_ms)

        def on_trial(trial: Trial) -> None:
            evaluate.release(trial.spec, trial.number)
            trials = study.trials()
            trial_log.log_trial(trial, trials)
            best = {each.number for each in frontier(trials, problem)}
            remove_checkpoints(evaluate, {each.number for each in trials if each.finished} - best)

        _log_sources(job, tracker)
        tracker.log(metrics_of(latencies), 0)
        trials = search(
            study,
            job.space,
            evaluate,
            problem,
            settings.search,
            seed=settings.seed,
            on_trial=on_trial,
        )
        report = _write(job, study, latencies, problem, trials)
        if settings.worker == 0:  # the others would log the same
            draw = cache(partial(figures, runs, name))
            log_study(tracker, report, draw)
            show_curves(study, len(trials), draw)
            _publish(job, report, tracker)
    return report


def _run_info(job: SearchJob) -> RunInfo:
    settings, worker = job.settings, job.settings.worker
    study = settings.search.study
    return RunInfo(
        job=JobType.search,
        name=study if worker == 0 else f"{study}_worker{worker}",
        key=digest(job.identity),
        group=study,
        tags={
            "backbone": settings.backbone.name,
            "device": "+".join(device.name for device in settings.all_devices),
            "recipe": settings.recipe.name,
        },
        config=plain(settings),
        folder=job.folder if worker == 0 else None,
    )


def _log_sources(job: SearchJob, tracker: Tracker) -> None:
    """Log the backbone as read, and its importance scores as written."""
    backbone = job.workspace.backbone
    assert backbone.folder is not None
    tracker.use(Artifact(ArtifactKind.backbone, backbone.name, backbone.folder))
    scores = job.workspace.importance_path(job.settings.recipe.calibration_tokens)
    tracker.publish(Artifact(ArtifactKind.importance, backbone.name, scores))


def _publish(job: SearchJob, report: Mapping[str, Any], tracker: Tracker) -> None:
    """Publish the files of the architectures on the frontier."""
    for number, arch in report["names"].items():
        facts = {"study": report["study"], "trial": int(number), "arch": arch}
        path = job.workspace.runs.found_arch / f"{arch}.yaml"
        tracker.publish(Artifact(ArtifactKind.arch, arch, path, facts))


def _promote(job: SearchJob, study: Study, problem: Problem) -> dict[str, Any]:
    """Train the best trials longer; print and store the comparison of the rankings."""
    settings = job.settings
    require(
        settings.search.promote_tokens > settings.recipe.tokens,
        "search.promote_tokens",
        settings.search.promote_tokens,
        f"more than the trials' recipe.tokens={settings.recipe.tokens}",
    )
    shorter = evaluation_of(job, job.checkpoints)
    recipe = settings.recipe.longer(settings.search.promote_tokens, settings.data.seq_len)
    longer = ShortTraining(
        job.workspace,
        shorter.importance,
        recipe,
        settings.trainer,
        settings.seed,
        job.folder / "promoted",
        shorter,
        job.space.vocab_sizes,
    )
    report = promote(study, problem, settings.search.promote, longer, recipe.tokens)
    for row in report["trials"]:
        longer.release(ArchSpec.from_dict(row["spec"]), row["number"])
    write_json(job.folder / "promoted.json", report)
    rows = [["trial", "loss", f"loss after {recipe.tokens:,} tokens"]]
    for row in report["trials"]:
        longer = "failed" if row["long_loss"] is None else f"{row['long_loss']:.3f}"
        rows.append([str(row["number"]), f"{row['loss']:.3f}", longer])
    print(f"\n{table(rows)}")
    tau = report["kendall_tau"]
    held = "too few to rank" if tau is None else f"Kendall tau {tau:.2f}"
    print(f"{held}; {report['swapped']} of {report['pairs']} pairs swapped")
    return report


def metrics_of(latencies: Mapping[str, LatencyModel]) -> dict[str, float]:
    """Return the scores of all predictors for a logger; those of further devices have its name."""
    first, *others = latencies
    found = latencies[first].metrics()
    for name in others:
        scores = latencies[name].metrics().items()
        found |= {f"latency_on_{name}/{key.partition('/')[2]}": value for key, value in scores}
    return found


_OF_THE_DEVICE = {
    *("device", "workload", "lowering", "devices", "across", "weights"),
    *("space", "objectives"),
}
"""Keys of a fingerprint that do not affect losses."""


def _rescore(job: SearchJob, source: str) -> dict[str, Any]:
    """Compute the frontier of finished trials for other limits, objectives or another device.

    Raises:
        InputError: The study does not exist, its losses are not comparable, or no trial is within
            the limits.
    """
    settings = job.settings
    study = reopen_study(job.storage(source), source)
    old = {k: v for k, v in study.fingerprint.items() if k not in _OF_THE_DEVICE}
    new = {k: v for k, v in job.identity.items() if k not in _OF_THE_DEVICE}
    if "tasks" in old:  # its trials may know more tasks than are objectives now
        old["tasks"] = {k: v for k, v in old["tasks"].items() if k in new.get("tasks", {})}
    check_fingerprint("search.from_study", source, old, new, "choose another study")
    latencies = latencies_of(settings, job.space, job.workspace, job.devices)
    problem = problem_of(job, study, latencies)
    trials = rescore(study.trials(), problem)
    log.info("%d finished trials of %s rated again", sum(t.complete for t in trials), source)
    if not frontier(trials, problem):
        check_limits(job.space, problem, settings.seed)
        limits = "; ".join(f"{limit_name(k)}={limit:g}" for k, limit in problem.limits.items())
        raise InputError(
            f"{limits}: expected limits that a trial of {source} obeys; start a new search with "
            "them, since the space has members that do"
        )
    return _write(job, study, latencies, problem, trials)


def _write(
    job: SearchJob,
    study: Study,
    latencies: Mapping[str, LatencyModel],
    problem: Problem,
    trials: Sequence[Trial],
) -> dict[str, Any]:
    """Write `frontier.json` and the architecture YAML of every frontier member.

    Keys that hold for one device are those of the first; `devices` has those of all if there are
    several.
    """
    settings, runs = job.settings, job.workspace.runs
    name = settings.search.study
    front = frontier(trials, problem)
    with study.lock():  # all workers write the same
        paths = write_frontier(runs.found_arch, name, trials, problem)
    backbone, costs = job.workspace.backbone, problem.costs([job.workspace.backbone.spec])
    by_device = [
        _of_device(device, latencies[device.settings.name], front, backbone.spec)
        for device in job.devices
    ]
    first = dict(by_device[0])
    names = dict(zip((t.number for t in front), (p.stem for p in paths), strict=True))
    return write_report(
        job.folder / "frontier.json",
        name,
        trials,
        problem,
        settings.search.winners,
        about={
            "backbone": {
                "name": backbone.name,
                "spec": backbone.spec.to_dict(),
                "quality": study.remember("backbone_quality", dict),
                "errors": {
                    each.key: study.recall(f"backbone_{each.key}")
                    for each in job.objectives
                    if each.task is not None
                },
                "costs": {key: float(values[0]) for key, values in costs.items()},
                "predicted": first.pop("backbone_predicted"),
            },
            "names": {str(number): stem for number, stem in names.items()},
            **first,
            "objective": next(iter(latencies.values())).objective.name,
            "space": {
                "name": settings.space.name,
                "count": job.space.count(),
                "count_slots": job.space.count_slots(),
            },
            "workload": plain(settings.device.workload),
            "devices": {
                device.settings.name: about
                for device, about in zip(job.devices, by_device, strict=True)
                if len(by_device) > 1
            },
            "settings": plain(settings),
            "provenance": provenance(),
        },
    )


def _of_device(
    device: Device, latency: LatencyModel, front: Sequence[Trial], backbone: ArchSpec
) -> dict[str, Any]:
    """Return what `frontier.json` says of a device: its identity, predictions and their scores."""
    *predicted, whole = latency.predict([*(trial.spec for trial in front), backbone.as_program()])
    return {
        "device": device.identity(),
        "lowering": lowering_values(device.settings.lowering),
        "predicted": {
            str(trial.number): values for trial, values in zip(front, predicted, strict=True)
        },
        "backbone_predicted": whole,
        "latency_scores": latency.metrics(),
        "latency_points": {
            point.name: [float(value) for value in values]
            for point, values in latency.values_ms.items()
        },
        "latency_fitted": {
            point.name: [float(value) for value in values]
            for point, values in latency.left_out_ms.items()
        },
    }
