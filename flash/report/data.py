"""Everything that a `runs` folder holds about one study, read for the report."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.arch import ArchSpec, count_parameters
from flash.errors import InputError
from flash.evaluation import ExportResult
from flash.runs import Runs
from flash.training.run import TrainResult


@dataclass(frozen=True)
class TrialPoint:
    """One candidate of the search.

    Attributes:
        number: In the study.
        name: The arch's name if it is on the frontier.
        spec: Architecture.
        loss: Held-out loss after the short training [nats a token].
        latency_ms: Predicted latency.
        winner: Whether it was chosen for final training.
    """

    number: int
    name: str | None
    spec: ArchSpec
    loss: float
    latency_ms: float
    winner: bool

    @property
    def parameters(self) -> int:
        return count_parameters(self.spec).total


@dataclass(frozen=True)
class Model:
    """A row of the result table: the backbone or a winner, as far as it has come.

    Attributes:
        name: The arch's name.
        spec: Architecture.
        predicted: Intervals of stage 1 by point, such as `prefill_512`.
        trained: Result of `train.py`; None for the backbone, or when it did not run yet.
        exported: Result of `export.py`, or None when it did not run yet.
        backbone_quality: Held-out quality of the backbone; None for winners.
    """

    name: str
    spec: ArchSpec
    predicted: dict[str, dict[str, float]]
    trained: TrainResult | None
    exported: ExportResult | None
    backbone_quality: dict[str, float] | None = None

    @property
    def parameters(self) -> int:
        return count_parameters(self.spec).total


@dataclass(frozen=True)
class ReportData:
    """One study with its winners.

    Attributes:
        study: Name.
        search: `frontier.json` as it is.
        trials: Completed candidates.
        failed: Number of failed ones.
        models: The backbone, then the winners, fastest first.
    """

    study: str
    search: dict[str, Any]
    trials: list[TrialPoint]
    failed: int
    models: list[Model]

    @property
    def backbone(self) -> Model:
        return self.models[0]


def read(runs: Runs, study: str | None = None) -> ReportData:
    """Read a study.

    Args:
        runs: Where.
        study: Which; None takes the one that was written last.

    Raises:
        InputError: There is no finished search of that name, or a file is damaged.
    """
    pattern = f"{study or '*'}/frontier.json"
    found = sorted((runs.root / "studies").glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError(f"{runs.root / 'studies' / pattern}: no finished search; run search.py")
    path: Path = found[-1]
    search = json.loads(path.read_text("utf-8"))
    names = {int(number): name for number, name in search["names"].items()}
    winners = set(search["winners"])
    trials = [
        TrialPoint(
            number=trial["number"],
            name=names.get(trial["number"]),
            spec=ArchSpec.from_dict(trial["spec"]),
            loss=trial["loss"],
            latency_ms=trial["latency_ms"],
            winner=trial["number"] in winners,
        )
        for trial in search["trials"]
        if trial["loss"] is not None
    ]
    failed = sum(trial["state"] == "fail" for trial in search["trials"])
    return ReportData(search["study"], search, trials, failed, _models(runs, search, trials))


def _models(runs: Runs, search: dict[str, Any], trials: list[TrialPoint]) -> list[Model]:
    about = search["backbone"]
    backbone = Model(
        name=about["name"],
        spec=ArchSpec.from_dict(about["spec"]),
        predicted=about["predicted"],
        trained=None,
        exported=ExportResult.read(runs.export(about["name"])),
        backbone_quality=about["quality"],
    )
    models = [backbone]
    for trial in sorted(trials, key=lambda trial: trial.latency_ms):
        if not trial.winner or trial.name is None:
            continue
        trained = TrainResult.read(runs.model(trial.name))
        exported = ExportResult.read(runs.export(trial.name))
        models.append(
            Model(
                name=trial.name,
                spec=trial.spec,
                predicted=search["predicted"][str(trial.number)],
                # A result of an earlier search under the same name is of another architecture.
                trained=trained if trained and trained.spec == trial.spec else None,
                exported=exported if exported and exported.spec == trial.spec else None,
            )
        )
    return models
