"""The study: every trial of a search, kept in a database that survives kills.

A trial's number is its identity: a trial that a killed process left behind goes back to the queue
under its own number, so that the evaluation finds its checkpoints and a resumed search is the same
as an undisturbed one. (Optuna's own retry makes a new trial, which would be neither.)
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from flash.arch import ArchSpec, Choices, SearchSpace
from flash.errors import InputError

_log = logging.getLogger(__name__)

MAX_CRASHES = 3
"""Processes that may die on one trial before it counts as failed; a spec may exhaust the memory."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One candidate and what became of it."""

    number: int
    spec: ArchSpec
    latency_ms: float
    """Predicted by stage 1."""
    state: TrialState
    loss: float | None = None
    """Held-out loss [nats a token]; None unless the trial is complete."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the evaluation reported, `reason` of a failure, `seconds` of the evaluation."""
    batch: tuple[int, int]
    """Number of the first trial that was proposed together with this one, and how many were."""

    @property
    def complete(self) -> bool:
        return self.state is TrialState.COMPLETE

    @property
    def point(self) -> tuple[float, float]:
        """(loss, latency in ms) of a complete trial."""
        assert self.loss is not None
        return self.loss, self.latency_ms

    @property
    def finished(self) -> bool:
        """Whether nothing remains to be done: complete or failed."""
        return self.state.is_finished()


class Study:
    """A search's trials in an Optuna study (so optuna-dashboard shows it); see `open_study`."""

    def __init__(self, study: optuna.Study, storage: optuna.storages.BaseStorage) -> None:
        self._study = study
        self._storage = storage
        self._id = storage.get_study_id_from_name(study.study_name)

    @property
    def name(self) -> str:
        return self._study.study_name

    def trials(self) -> list[Trial]:
        """All trials in order of their numbers."""
        return [_typed(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    def enqueue(
        self,
        space: SearchSpace,
        specs: Sequence[ArchSpec],
        latencies_ms: Iterable[float],
        batch: tuple[int, int],
    ) -> None:
        """Append candidates to the queue, one database commit each."""
        for spec, latency_ms in zip(specs, latencies_ms, strict=True):
            distributions = _distributions(space, spec)
            self._study.add_trial(
                optuna.create_trial(
                    state=TrialState.WAITING,
                    params=_params(spec, distributions),
                    distributions=distributions,
                    user_attrs={
                        "spec": spec.to_dict(),
                        "pattern": spec.pattern,
                        "latency_ms": float(latency_ms),
                        "batch": list(batch),
                    },
                )
            )

    def start(self) -> Trial | None:
        """Mark the first waiting trial as running and return it; None when the queue is empty."""
        if not any(trial.state is TrialState.WAITING for trial in self.trials()):
            return None  # `ask` would invent a trial
        return self._get(self._study.ask().number)

    def complete(self, trial: Trial, loss: float, info: Mapping[str, Any]) -> Trial:
        """Record a trial's result; `info` must be plain JSON values."""
        self._set(trial, "info", dict(info))
        self._study.tell(trial.number, (loss, trial.latency_ms))
        return self._get(trial.number)

    def fail(self, trial: Trial, reason: str) -> Trial:
        """Record that a trial has no result, and why."""
        self._set(trial, "reason", reason)
        self._study.tell(trial.number, state=TrialState.FAIL)
        return self._get(trial.number)

    def requeue(self, trial: Trial) -> None:
        """Send a running trial back to the queue, under its number."""
        self._storage.set_trial_state_values(self._trial_id(trial), TrialState.WAITING)

    def recover(self) -> None:
        """Requeue what a dead process left running; a trial that keeps killing its process fails.

        Only one process may work on the study.
        """
        for trial in self.trials():
            if trial.state is not TrialState.RUNNING:
                continue
            crashes = trial.extra.get("crashes", 0) + 1
            self._set(trial, "crashes", crashes)
            if crashes < MAX_CRASHES:
                _log.warning("trial %d was interrupted; it starts again", trial.number)
                self.requeue(trial)
            else:
                _log.warning("trial %d was interrupted %d times: failed", trial.number, crashes)
                self.fail(trial, f"its process died {crashes} times")

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """A plain JSON value that is computed once and kept with the study."""
        if key not in self._study.user_attrs:
            self._study.set_user_attr(key, compute())
        return self._study.user_attrs[key]

    def _get(self, number: int) -> Trial:
        return self.trials()[number]

    def _trial_id(self, trial: Trial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)

    def _set(self, trial: Trial, key: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._trial_id(trial), key, value)


def open_study(storage: Path | str, name: str, fingerprint: Mapping[str, Any]) -> Study:
    """Create the study or open it again.

    Args:
        storage: A SQLite file, or the URL of another database that Optuna knows.
        name: Name of the study.
        fingerprint: All that makes results comparable, as plain JSON values: space, backbone,
            device, recipe. Compared key by key with the one that the study was made with.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if isinstance(storage, Path):
        storage.parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{storage.resolve()}"
    else:
        url = storage
    database = optuna.storages.get_storage(url)
    study = optuna.create_study(
        storage=database,
        study_name=name,
        directions=[StudyDirection.MINIMIZE, StudyDirection.MINIMIZE],
        sampler=RandomSampler(),  # never asked: every trial is enqueued with its values
        load_if_exists=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names(["loss", "latency_ms"])  # for the dashboard only
    stored = study.user_attrs.get("fingerprint")
    if stored is None:
        study.set_user_attr("fingerprint", dict(fingerprint))
    else:
        _check_fingerprint(name, storage, stored, fingerprint)
    return Study(study, database)


def space_fingerprint(space: SearchSpace) -> dict[str, Any]:
    """The part of a fingerprint that describes the space and the backbone it cuts."""
    settings = asdict(space.settings)
    settings["kinds"] = [kind.value for kind in space.kinds]
    del settings["name"]  # a new name for the same space changes no result
    return {"space": settings, "backbone_arch": space.base.to_dict()}


def _check_fingerprint(
    name: str, storage: Path | str, stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Compare key by key.

    Raises:
        InputError: The study was made with another fingerprint.
    """
    old, new = _flat(stored), _flat(json.loads(json.dumps(wanted)))  # tuples come back as lists
    differing = [
        f"{key} (was {old.get(key)!r}, is now {new.get(key)!r})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differing:
        raise InputError(
            f"search.study={name}: expected the settings that the study was made with, but these "
            f"differ: {'; '.join(differing)}; choose another search.study or delete {storage}"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _typed(frozen: FrozenTrial) -> Trial:
    attrs = frozen.user_attrs
    extra = dict(attrs.get("info", {}))
    extra.update({key: attrs[key] for key in ("reason", "crashes") if key in attrs})
    if frozen.duration is not None:
        extra["seconds"] = frozen.duration.total_seconds()
    return Trial(
        number=frozen.number,
        spec=ArchSpec.from_dict(attrs["spec"]),
        latency_ms=attrs["latency_ms"],
        state=frozen.state,
        loss=frozen.values[0] if frozen.state is TrialState.COMPLETE else None,
        extra=extra,
        batch=(attrs["batch"][0], attrs["batch"][1]),
    )


def _distributions(space: SearchSpace, spec: ArchSpec) -> dict[str, BaseDistribution]:
    """Parameters as the dashboard plots them. Slots past the depth are absent, not padded."""

    def sizes(choices: Choices) -> IntDistribution:
        return IntDistribution(choices.min, choices.max, step=choices.step)

    kinds = CategoricalDistribution([kind.value for kind in space.kinds])
    return {
        "num_layers": sizes(space.settings.num_layers),
        "model_dim": sizes(space.settings.model_dim),
        "ffn_dim": sizes(space.settings.ffn_dim),
        **{f"layer_{i:02d}": kinds for i in range(spec.num_layers)},
    }


def _params(spec: ArchSpec, distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    kinds = {f"layer_{i:02d}": kind.value for i, kind in enumerate(spec.layer_types)}
    sizes = {key: getattr(spec, key) for key in distributions if key not in kinds}
    return {**sizes, **kinds}
