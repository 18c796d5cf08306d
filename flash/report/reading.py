"""Reading of a `runs` folder for the report.

The report only looks at results. So a file that is missing or damaged is a sentence on the page and
in the terminal, and all others are still shown.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from flash.arch import ArchSpec
from flash.commands import command
from flash.errors import InputError, nearest
from flash.evaluation.suites import SuiteResult
from flash.export.result import ExportResult
from flash.paths import Runs
from flash.records import find_json, plain
from flash.report.data import (
    Model,
    Promotion,
    ReportData,
    StudyData,
    TrialPoint,
    UnratedTrial,
    is_qat,
)
from flash.search.names import arch_name
from flash.search.stored import StoredStudy, StoredTrial
from flash.search.stored import read_study as read_stored
from flash.tracking.links import find_url
from flash.training.result import TrainResult

T = TypeVar("T")
_log = logging.getLogger(__name__)


def read(runs: Runs, studies: Sequence[str] = ()) -> ReportData:
    """Read studies and models.

    Args:
        runs: Folder with all results.
        studies: Names of studies to show; without any the latest that is finished.

    Raises:
        InputError: There is no study of a name, or nothing to report.
    """
    reader = _Reader(runs)
    return reader.report(reader.chosen(studies))


def read_study(runs: Runs, name: str) -> StudyData:
    """Read one finished study, and log what is missing or damaged.

    Raises:
        InputError: There is no study of this name, or its `frontier.json` is damaged.
    """
    reader = _Reader(runs)
    found = reader.study(name)
    for fault in reader.faults:
        _log.warning("%s", fault)
    if found is None:
        raise InputError(reader.faults[-1])
    return found


class _Reader:
    """Reader of one `runs` folder, which gathers sentences on what it cannot read.

    Args:
        runs: Folder with all results.
    """

    def __init__(self, runs: Runs) -> None:
        self.runs = runs
        self.faults: list[str] = []
        self._trained: dict[str, TrainResult] | None = None
        self._exported: dict[str, ExportResult] | None = None

    def look(self, read: Callable[[], T | None]) -> T | None:
        """Return what `read` returns; None if a file is damaged, which becomes a fault."""
        try:
            return read()
        except InputError as error:
            self.faults.append(str(error))
        except OSError as error:
            self.faults.append(f"{error.filename}: cannot be read ({error.strerror})")
        return None

    def chosen(self, names: Sequence[str]) -> Sequence[str]:
        """Return the names of the studies to show.

        Raises:
            InputError: There is no study of a name.
        """
        folder = self.runs.root / "studies"
        there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        for name in names:
            if name not in there:
                hint = nearest(name, there) if there else f"run {command('search')}"
                raise InputError(f"--study {name}: no such study in {folder}; {hint}")
        if names:
            return list(dict.fromkeys(names))
        finished = sorted(folder.glob("*/frontier.json"), key=lambda path: path.stat().st_mtime)
        return [path.parent.name for path in finished[-1:]]

    def report(self, names: Sequence[str]) -> ReportData:
        """Read all that the report shows.

        Raises:
            InputError: There is nothing to report.
        """
        studies = [found for name in names if (found := self.study(name)) is not None]
        shown = {name for study in studies for model in study.models for name in _names(model)}
        others = [
            self._artifacts(
                Model(
                    name,
                    spec,
                    (exported.predicted if exported is not None else None) or {},
                    trained=trained,
                    exported=exported,
                )
            )
            for name, spec, trained, exported in self._results()
            if name not in shown and not self._is_of_another_study(name, names)
        ]
        data = ReportData(self.runs.root, studies, others, [], self.faults)
        if not data.models and not self.faults:
            raise InputError(
                f"{self.runs.root}: no finished search and no trained or exported model; run "
                f"{command('search')}"
            )
        evaluations = self._evaluations(data.models)
        return replace(data, evaluations=evaluations, links=self._links(data))

    def _links(self, data: ReportData) -> dict[Path, str]:
        """Read the links to W&B runs, which are beside the results."""
        folders = [self.runs.study(study.name) for study in data.studies]
        for model in data.models:
            folders += [self.runs.model(model.trained.name)] if model.trained else []
            folders += [self.runs.export(result.name) for result in model.exports]
        found = {folder: self.look(lambda folder=folder: find_url(folder)) for folder in folders}
        return {folder: url for folder, url in found.items() if url is not None}

    def study(self, name: str) -> StudyData | None:
        """Read one study; None if it is not finished or damaged, which becomes a fault."""
        path = self.runs.study(name) / "frontier.json"
        if not path.is_file():
            self.faults.append(
                f"{path}: missing, since the search has not finished; run {command('search')} "
                f"search.study={name} with its settings"
            )
            return None
        study = self.look(lambda: _study(name, read_stored(path)))
        if study is None:
            return None
        study = study.with_models(self._models(study))
        again = f"run {command('search')} stage=promote again"
        longer = path.with_name("promoted.json")
        promoted = self.look(lambda: find_json(longer, _StoredPromotion, again))
        promotion = None if promoted is None else _promotion(promoted, study.trials)
        return replace(study, promotion=promotion)

    def _results(
        self,
    ) -> list[tuple[str, ArchSpec, TrainResult | None, ExportResult | None]]:
        """List name, architecture and results of every trained or exported model."""
        listed = []
        for name in dict.fromkeys([*self._trainings(), *self._exports()]):
            trained, exported = self._trainings().get(name), self._exports().get(name)
            spec = trained.spec if trained else exported.spec if exported else None
            assert spec is not None
            if exported is not None and exported.spec != spec:
                exported = None  # a result of an earlier model of this name
            listed.append((name, spec, trained, exported))
        return listed

    def _trainings(self) -> dict[str, TrainResult]:
        if self._trained is None:
            found = {
                path.parent.name: self.look(lambda path=path: TrainResult.read(path.parent))
                for path in sorted((self.runs.root / "models").glob("*/result.json"))
            }
            self._trained = _named(found)
        return self._trained

    def _exports(self) -> dict[str, ExportResult]:
        if self._exported is None:
            found = {
                path.parent.name: self.look(lambda path=path: ExportResult.read(path.parent))
                for path in sorted((self.runs.root / "exports").glob("*/export.json"))
            }
            self._exported = _named(found)
        return self._exported

    def _is_of_another_study(self, name: str, names: Sequence[str]) -> bool:
        """Check whether a result belongs to an architecture of a study that is not shown."""
        folder = self.runs.root / "studies"
        others = [path.name for path in folder.glob("*") if path.name not in names]
        return any(
            re.match(rf"{re.escape(other)}_\d+(_[0-9a-f]{{4}})?(-|$)", name) for other in others
        )

    def _models(self, study: StudyData) -> list[Model]:
        """Add the results of training and export to the models of a study."""
        backbone, *winners = study.models
        listed = {model.name for model in winners}
        predicted = study.search.predicted
        further = [
            Model(
                trial.name,
                trial.spec,
                plain(predicted.get(str(trial.number), {})),
                study=study.name,
                device=study.device_name,
            )
            for trial in [*study.trials, *study.stopped]
            if trial.name not in listed
            and any(_is_of(trial.name, name) for name in [*self._trainings(), *self._exports()])
        ]
        device = study.search.device.get("device")
        models = []
        for model in [backbone, *winners, *further]:
            exported = self._export_of(model, device)
            others = {
                name: found
                for name in study.search.devices
                if name != device and (found := self._export_of(model, name)) is not None
            }
            found = replace(
                model,
                # For the speed that the machine had while the export was measured.
                predicted=(exported and exported.predicted) or model.predicted,
                trained=self._training_of(model),
                exported=exported,
                qat_exported=self._qat_export(model.spec, device),
                elsewhere=others,
            )
            models.append(self._artifacts(found))
        return models

    def _training_of(self, model: Model) -> TrainResult | None:
        """Find the training of a model, whose name may have the options of an experiment."""
        found = [
            (name != model.name and is_qat(result), len(name), result)
            for name, result in self._trainings().items()
            # A stored result may belong to an earlier search under the same name.
            if _is_of(model.name, name) and result.spec == model.spec
        ]
        return min(found, key=lambda item: item[:2])[2] if found else None

    def _export_of(self, model: Model, device: object) -> ExportResult | None:
        """Find the export of a model for a device, which may be a part of the export's name."""
        spec = model.spec.as_program()
        found = [
            (name, result)
            for name, result in self._exports().items()
            if _is_of(model.name, name)
            and result.spec.as_program() == spec
            and result.device.get("device") == device
        ]
        return min(found, key=lambda item: len(item[0]))[1] if found else None

    def _qat_export(self, spec: ArchSpec, device: object) -> ExportResult | None:
        """Find the export of a model of `spec` that was trained with quantization awareness."""
        for name, exported in self._exports().items():
            trained = self._trainings().get(name)
            if trained is None or trained.spec != spec or exported.spec != spec:
                continue
            if is_qat(trained) and exported.device.get("device") == device:
                return exported
        return None

    def _artifacts(self, model: Model) -> Model:
        """Add the files of a model; a program that its result speaks of must be there."""
        found: list[Path] = []
        if model.trained is not None:
            folder = self.runs.model(model.trained.name)
            found += [path for path in sorted(folder.iterdir()) if path.is_dir()]
        for result in model.exports:
            folder = self.runs.export(result.name)
            program = folder / "model.pte"
            if program.is_file():
                found.append(program)
            else:
                self.faults.append(f"{program}: missing; run {command('export')} again")
        return replace(model, artifacts=tuple(found))

    def _evaluations(self, models: Sequence[Model]) -> list[SuiteResult]:
        """Read the evaluations of models: those of their names, or of names that begin so."""
        specs = {model.name: model.spec for model in models}
        found = []
        for path in sorted((self.runs.root / "evaluations").glob("*/*.json")):
            folder = path.parent.name
            names = [name for name in specs if _is_of(name, folder)]
            result = self.look(lambda path=path: SuiteResult.read(path)) if names else None
            if result is not None and result.spec == specs[max(names, key=len)]:
                found.append(result)
        return found


R = TypeVar("R", TrainResult, ExportResult)


def _named(found: Mapping[str, R | None]) -> dict[str, R]:
    """Return the results that could be read, with the names of their folders."""
    return {name: replace(each, name=name) for name, each in found.items() if each is not None}


def _is_of(model: str, name: str) -> bool:
    """Return True if a result of this name is of the model, with options or without."""
    return name == model or name.startswith(f"{model}-")


def _names(model: Model) -> set[str]:
    """Return the names of a model and of its results; one with `qat` has a row of its own."""
    results = (model.trained, model.exported, *model.elsewhere.values())
    return {model.name, *(result.name for result in results if result is not None)}


def _study(name: str, report: StoredStudy) -> StudyData:
    """Build a study from `frontier.json`, without results of training and export."""
    names = {int(number): arch for number, arch in report.names.items()}
    winners = set(report.winners)
    trials = [
        _trial(name, trial, names, trial.number in winners)
        for trial in report.trials
        if trial.state == "complete"
    ]
    stopped = [_trial(name, trial, {}, False) for trial in report.trials if trial.state == "pruned"]
    unrated = [_unrated(name, trial) for trial in report.trials if not trial.rated]
    about, device = report.backbone, report.device_name
    backbone = Model(
        name=about.name,
        spec=about.spec,
        predicted=plain(about.predicted),
        study=name,
        device=device,
        backbone_quality=about.quality,
    )
    found = [
        Model(
            trial.name,
            trial.spec,
            plain(report.predicted[str(trial.number)]),
            study=name,
            device=device,
        )
        for trial in sorted(trials, key=lambda trial: trial.latency_ms)
        if trial.winner
    ]
    return StudyData(name, report, trials, stopped, unrated, [backbone, *found], None)


def _trial(study: str, trial: StoredTrial, names: dict[int, str], winner: bool) -> TrialPoint:
    number, extra = trial.number, trial.extra
    loss = extra.estimate if trial.state == "pruned" else trial.loss
    assert loss is not None
    return TrialPoint(
        number=number,
        name=names.get(number) or arch_name(study, number, trial.spec),
        spec=trial.spec,
        loss=loss,
        costs=trial.costs,
        errors=trial.errors,
        latency_ms=trial.latency_ms,
        frontier=number in names,
        winner=winner,
        curve=extra.curve,
        reason=extra.reason if trial.state == "pruned" else None,
        seconds=extra.seconds,
    )


def _unrated(study: str, trial: StoredTrial) -> UnratedTrial:
    return UnratedTrial(
        number=trial.number,
        name=arch_name(study, trial.number, trial.spec),
        spec=trial.spec,
        costs=trial.costs,
        state="failed" if trial.state == "fail" else trial.state,
        reason=trial.extra.reason,
        seconds=trial.extra.seconds,
    )


@dataclass(frozen=True)
class _StoredPromoted:
    number: int
    spec: ArchSpec
    long_loss: float | None


@dataclass(frozen=True)
class _StoredPromotion:
    """Content of `promoted.json`."""

    tokens: int
    trials: list[_StoredPromoted]
    kendall_tau: float | None
    swapped: int
    pairs: int


def _promotion(report: _StoredPromotion, trials: list[TrialPoint]) -> Promotion | None:
    by_number = {trial.number: trial for trial in trials}
    losses = [
        (by_number[row.number], row.long_loss)
        for row in report.trials
        # A stored result may belong to an earlier study of the same name.
        if row.number in by_number
        and by_number[row.number].spec == row.spec
        and row.long_loss is not None
    ]
    if not losses:
        return None
    return Promotion(report.tokens, losses, report.kendall_tau, report.swapped, report.pairs)
