"""Tables of trials: all of them, and studies side by side."""

from collections.abc import Sequence

from flash.arch import ArchSpec
from flash.device.workload import Point
from flash.report.data import ReportData, StudyData, TrialPoint, UnratedTrial
from flash.report.style import value_name
from flash.report.table import NONE
from flash.search.objectives import Objective, Quantity

_COSTS = tuple(each.key for each in map(Objective, Quantity) if not each.learned)


def trial_table(data: ReportData) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of all trials of all studies, in order of their numbers.

    Columns in which all cells are unknown are left out; so is that of the study if there is one.
    """
    keys = _cost_keys(data)
    trials = [trial for study in data.studies for trial in study.trials]
    tasks = list(dict.fromkeys(key for trial in trials for key in trial.errors))
    columns = [
        "study",
        "trial",
        "state",
        "loss [nats]",
        *(value_name(key) for key in tasks),
        *(value_name(key, any("@" in each for each in keys)) for key in keys),
        "params",
        "architecture",
        "TTFT measured [ms]",
        "final loss [nats]",
        ".pte perplexity",
        "time [s]",
        "reason",
    ]
    lines = []
    for study in data.studies:
        every: list[TrialPoint | UnratedTrial] = [*study.trials, *study.stopped, *study.unrated]
        for trial in sorted(every, key=lambda trial: trial.number):
            lines.append([study.name, *_row(trial, tasks, keys)])
    kept = [
        i
        for i, column in enumerate(columns)
        if any(line[i] != NONE for line in lines) and (column != "study" or len(data.studies) > 1)
    ]
    return [columns[i] for i in kept], [[line[i] for i in kept] for line in lines]


def _cost_keys(data: ReportData) -> list[str]:
    """Return the costs that trials of any study know, in their usual order."""
    known = {
        key
        for study in data.studies
        for trial in [*study.trials, *study.stopped, *study.unrated]
        for key in trial.costs
    }
    shown = {key for study in data.studies for key in study.search.objectives if "@" in key}
    phases = {Point.parse(study.search.objective).phase.value for study in data.studies}
    shown |= {key for key in known for phase in phases if key.startswith(f"{phase}_ms@")}
    by_device = sorted(shown & known)
    return [*(key for key in _COSTS if key in known), *by_device]


def _row(trial: TrialPoint | UnratedTrial, tasks: Sequence[str], keys: Sequence[str]) -> list[str]:
    loss, errors, results = NONE, [NONE] * len(tasks), [NONE] * 3
    if isinstance(trial, TrialPoint):
        # A stopped trial has a predicted loss only.
        loss = f"{trial.loss:.3f}" if trial.reason is None else f"{trial.loss:.3f} predicted"
        results = _results(trial)
        known = trial.errors
        errors = [f"{known[key].pct:.1f}" if key in known else NONE for key in tasks]
    costs = [f"{trial.costs[key]:.4g}" if key in trial.costs else NONE for key in keys]
    seconds = NONE if trial.seconds is None else f"{trial.seconds:.1f}"
    parameters = f"{trial.parameters / 1e6:.2f}M"
    return [
        trial.name,
        trial.state,
        loss,
        *errors,
        *costs,
        parameters,
        str(trial.spec),
        *results,
        seconds,
        trial.reason or NONE,
    ]


def _results(trial: TrialPoint) -> list[str]:
    """Return measured TTFT, final loss and change of perplexity of the model of a trial."""
    trained = trial.model.trained if trial.model else None
    exported = trial.model.exported if trial.model else None
    return [
        NONE if exported is None else f"{exported.measurement.prefill.ms:.1f}",
        NONE if trained is None else f"{trained.after.loss:.3f}",
        NONE if exported is None else f"{exported.program_quality.change.perplexity_pct:+.1f} %",
    ]


STUDY_COLUMNS = (
    "study",
    "device",
    "space",
    "backbone",
    "trials",
    "failed",
    "frontier",
    "best loss [nats]",
    "fastest TTFT [ms]",
    "hypervolume",
)


def study_rows(studies: Sequence[StudyData]) -> list[list[str]]:
    """Return a row of text for each study, in the order of `STUDY_COLUMNS`."""
    lines = []
    for study in studies:
        front = study.frontier
        best = min(front, key=lambda trial: trial.loss, default=None)
        times = [trial.costs["prefill_ms"] for trial in front if "prefill_ms" in trial.costs]
        volumes = study.search.hypervolume
        lines.append([
            study.name,
            study.device,
            study.search.space.name,
            study.backbone.name,
            str(len(study.trials) + len(study.stopped) + len(study.unrated)),
            str(study.failed),
            str(len(front)),
            NONE if best is None else f"{best.loss:.3f} ({best.name})",
            f"{min(times):.1f}{_joint(study)}" if times else NONE,
            f"{volumes[-1]:.3g}" if volumes else NONE,
        ])
    return lines


def _joint(study: StudyData) -> str:
    """Return words that mark a latency of a search for several devices."""
    return " (all devices)" if study.search.devices else ""


def shared_rows(studies: Sequence[StudyData]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the architectures that are complete trials of all studies.

    Only those are there that are on the frontier of one of them.
    """
    by_spec = [{trial.spec: trial for trial in study.trials} for study in studies]
    shared: list[ArchSpec] = [
        spec
        for spec in by_spec[0]
        if all(spec in others for others in by_spec)
        and any(others[spec].frontier for others in by_spec)
    ]
    columns = ["architecture"]
    for study in studies:
        columns += [f"{study.name}: trial", f"{study.name}: loss"]
        columns.append(f"{study.name}: TTFT{_joint(study)} [ms]")
    lines = []
    for spec in sorted(shared, key=lambda spec: by_spec[0][spec].latency_ms):
        line = [str(spec)]
        for trials in by_spec:
            trial = trials[spec]
            time = trial.costs.get("prefill_ms")
            line += [trial.name, f"{trial.loss:.3f}", NONE if time is None else f"{time:.1f}"]
        lines.append(line)
    return columns, lines
