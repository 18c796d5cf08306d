"""Study: all trials of a search, stored in a database that survives killed processes.

A trial is identified by its number. A trial left by a killed process returns to the queue under its
own number, so the evaluation finds its checkpoints and a resumed search equals an uninterrupted
one. (Optuna's own retry would create a new trial with another number.) Only crashes use up the
retries of a trial: what stops it from outside is no fault of it.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.samplers import RandomSampler
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from flash.arch import ArchSpec, SearchSpace, count_parameters
from flash.compat.optuna import TrialStorage
from flash.errors import InputError, under
from flash.search.fingerprint import check_fingerprint
from flash.search.names import arch_name
from flash.search.objectives import Objective
from flash.search.parameters import distributions, parameters
from flash.search.quality import Quality
from flash.search.settings import SearchSettings
from flash.search.storage import connect, full_disk_named
from flash.search.trial import Trial, read_trial
from flash.search.workers import Lock, Owner

if TYPE_CHECKING:  # only drawn figures are shown
    import plotly.graph_objects as go

_log = logging.getLogger(__name__)


_OUTAGE_S = 600.0
"""Time for which the outcome of a trial, which took hours, waits for a server [s]."""
_RETRY_S = 5.0
"""Pause between attempts to reach a server [s]."""


class Study:
    """Trials of a search, stored in an Optuna study, so that optuna-dashboard shows them.

    Created by `open_study` or `reopen_study`.

    Args:
        study: Optuna study that holds the trials.
        lock: Lock shared by all workers of the study.
        objectives: Objectives, in the order of the values of Optuna's trials.
        heartbeat_s: Interval of the heartbeats of a worker [s].
        retries: Number of times that a trial restarts after its process crashed.
    """

    def __init__(
        self,
        study: optuna.Study,
        lock: Lock,
        objectives: Sequence[Objective],
        heartbeat_s: int,
        retries: int,
    ) -> None:
        self.objectives = tuple(objectives)
        self.heartbeat_s = heartbeat_s
        self._study, self._storage = study, TrialStorage(study)
        self._lock, self._depth, self._retries = lock, 0, retries
        self._owner = Owner.make()
        self._finished: dict[int, Trial] = {}

    @property
    def name(self) -> str:
        """Name of the study."""
        return self._study.study_name

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Fingerprint with which the study was created."""
        return self._study.user_attrs["fingerprint"]

    def trials(self) -> list[Trial]:
        """Return all trials in order of their numbers."""
        found: list[Trial] = []
        for frozen in self._study.get_trials(deepcopy=False):
            trial = self._finished.get(frozen.number) or read_trial(frozen, self.objectives)
            if trial.finished:  # finished trials never change, and may be thousands
                self._finished[trial.number] = trial
            found.append(trial)
        return found

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep all other workers from planning and taking trials; reentrant."""
        if self._depth == 0:
            with self._lock.hold(), full_disk_named(f"study {self.name}"):
                self._depth = 1
                try:
                    yield
                finally:
                    self._depth = 0
        else:
            yield

    @contextmanager
    def working(self) -> Iterator[None]:
        """Mark the trials started by this object as being worked on, for the duration."""
        with self._owner.working(), self._lock.sign(self._owner.token):
            yield

    def plan(
        self,
        specs: Sequence[ArchSpec],
        costs: Mapping[str, Sequence[float]],
        batch: tuple[int, int],
    ) -> None:
        """Store the next batch in one commit, so that a kill cannot leave half of it."""
        rows = [
            {"spec": spec.to_dict(), "costs": {key: float(v[i]) for key, v in costs.items()}}
            for i, spec in enumerate(specs)
        ]
        self._study.set_user_attr("planned", {"batch": list(batch), "rows": rows})

    def enqueue(self, space: SearchSpace) -> None:
        """Append planned candidates that are missing from the queue, one commit for each."""
        planned = self._study.user_attrs.get("planned")
        if planned is None:
            return
        first, _ = planned["batch"]
        there = len(self.trials())
        for number, row in enumerate(planned["rows"][there - first :], there):
            with under(f"study {self.name}: planned trial: spec"):
                spec = ArchSpec.from_dict(row["spec"])
            self._study.add_trial(
                optuna.create_trial(
                    state=TrialState.WAITING,
                    params=parameters(space, spec),
                    distributions=distributions(space, spec.num_layers),
                    user_attrs={
                        # For the dashboard, which plots attributes that are numbers.
                        "name": arch_name(self.name, number, spec),
                        "pattern": spec.pattern,
                        "parameters": count_parameters(spec).total,
                        **row["costs"],
                        "spec": row["spec"],
                        "costs": row["costs"],
                        "batch": planned["batch"],
                    },
                )
            )

    def start(self) -> Trial | None:
        """Start the first waiting trial and return it, or None if the queue is empty."""
        with self.lock():
            waiting = (trial for trial in self.trials() if trial.state is TrialState.WAITING)
            trial = next(waiting, None)
            if trial is None:
                return None
            # The owner is set first: a running trial without one could never be recovered.
            self._set(trial, "owner", self._owner.to_dict())
            self._beat(trial)
            self._storage.set_state(trial.number, TrialState.RUNNING)
            return self._get(trial.number)

    @contextmanager
    def heartbeat(self, trial: Trial) -> Iterator[None]:
        """Send heartbeats for a running trial from a background thread, for the duration."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self.heartbeat_s):
                try:
                    self._beat(trial)
                except (SQLAlchemyError, StorageInternalError) as error:
                    _log.warning(
                        "trial %d: no sign of life could be given: %s", trial.number, error
                    )

        thread = threading.Thread(target=beat, name=f"heartbeat {trial.number}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def complete(self, trial: Trial, quality: Quality) -> Trial:
        """Record the result of a trial."""
        result = replace(trial, loss=quality.loss, errors=quality.errors)

        def record() -> None:
            self._record(trial, quality.info)
            if quality.errors:
                self._set(trial, "loss", quality.loss)
                errors = {key: asdict(error) for key, error in quality.errors.items()}
                self._set(trial, "errors", errors)
            self._study.tell(trial.number, result.point(self.objectives))

        return self._end(trial, record)

    def fail(self, trial: Trial, reason: str) -> Trial:
        """Record that a trial failed, with the reason."""
        return self._end(trial, lambda: self._fail(trial, reason))

    def stop(self, trial: Trial, reason: str, info: Mapping[str, Any]) -> Trial:
        """Record that a trial was stopped early; `info` holds `estimate`, its predicted loss."""

        def record() -> None:
            self._record(trial, info)
            self._set(trial, "reason", reason)
            self._study.tell(trial.number, state=TrialState.PRUNED)

        return self._end(trial, record)

    def requeue(self, trial: Trial) -> None:
        """Return a trial of this worker to the queue under its own number."""
        with self.lock():
            if self._is_mine(trial):
                self._requeue(trial)

    def _end(self, trial: Trial, record: Callable[[], None]) -> Trial:
        """Record the outcome of a trial of this worker, when the server can be reached again."""
        deadline = time.monotonic() + _OUTAGE_S
        while True:
            try:
                with self.lock():
                    if self._is_mine(trial):
                        record()
                    return self._get(trial.number)
            except (SQLAlchemyError, StorageInternalError) as error:
                if not self._lock.remote or time.monotonic() > deadline:
                    raise
                _log.warning(
                    "trial %d: its outcome waits for the database: %s", trial.number, error
                )
                time.sleep(_RETRY_S)

    def recover(self) -> None:
        """Requeue the running trials of dead workers; fail those whose retries are used up.

        A worker is dead if its process on this machine has ended, or if it runs on another machine
        and has missed `MISSED_BEATS` heartbeats. Trials of living workers are left alone.
        """
        with self.lock():
            running = [t for t in self.trials() if t.state is TrialState.RUNNING]
            silent = self._storage.stale_numbers() if running else set()
            for trial in running:
                owner = Owner(**self._owner_of(trial))
                gone = owner.gone()
                if trial.number in silent if gone is None else gone:
                    self._take_back(trial, owner)
            self._lock.remove_signs()

    def _take_back(self, trial: Trial, owner: Owner) -> None:
        """Requeue the trial of a dead worker, or fail it if its retries are used up."""
        crashes = trial.extra.get("crashes", 0)
        if self._lock.crashed(owner.token):
            crashes += 1
            self._set(trial, "crashes", crashes)
        if crashes <= self._retries:
            _log.warning("trial %d was interrupted; it starts again", trial.number)
            self._requeue(trial)
        else:
            _log.warning("trial %d was interrupted %d times: failed", trial.number, crashes)
            self._fail(trial, f"its process died {crashes} times")

    def show(self, name: str, figure: "go.Figure") -> None:
        """Show a figure below the plots of optuna-dashboard, which must be installed."""
        from optuna_dashboard import save_plotly_graph_object

        with self.lock():
            save_plotly_graph_object(self._study, figure, graph_object_id=name)

    def remember(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return a plain JSON value that one worker computes once and the study stores."""
        with self.lock():
            if key not in self._study.user_attrs:
                self._study.set_user_attr(key, compute())
            return self._study.user_attrs[key]

    def recall(self, key: str) -> Any:
        """Return the value that `remember` stored under this key, or None."""
        return self._study.user_attrs.get(key)

    def _is_mine(self, trial: Trial) -> bool:
        """Check that this worker still owns the trial: others may have presumed it dead."""
        now = self._get(trial.number)
        owner = self._owner_of(trial)
        if now.state is TrialState.RUNNING and owner["token"] == self._owner.token:
            return True
        _log.warning("trial %d went to another worker; this result is dropped", trial.number)
        return False

    def _owner_of(self, trial: Trial) -> dict[str, Any]:
        return self._storage.user_attrs(trial.number)["owner"]

    def _record(self, trial: Trial, info: Mapping[str, Any]) -> None:
        """Store the facts of an evaluation, and its curve of losses for the dashboard."""
        self._set(trial, "info", dict(info))
        for tokens, loss in info.get("curve", []):
            self._storage.report(trial.number, round(tokens), loss)

    def _fail(self, trial: Trial, reason: str) -> None:
        self._set(trial, "reason", reason)
        self._study.tell(trial.number, state=TrialState.FAIL)

    def _requeue(self, trial: Trial) -> None:
        self._storage.set_state(trial.number, TrialState.WAITING)

    def _beat(self, trial: Trial) -> None:
        self._storage.record_heartbeat(trial.number)

    def _get(self, number: int) -> Trial:
        return self.trials()[number]

    def _set(self, trial: Trial, key: str, value: Any) -> None:
        self._storage.set_user_attr(trial.number, key, value)


def open_study(
    storage: Path | str,
    name: str,
    fingerprint: Mapping[str, Any],
    *,
    objectives: Sequence[Objective],
    heartbeat_s: int = SearchSettings.heartbeat_s,
    retries: int = SearchSettings.retries,
) -> Study:
    """Create a study, or open it if it exists.

    Args:
        storage: SQLite file on a local disk, or URL of a PostgreSQL database.
        name: Name of the study.
        fingerprint: Settings that must agree for results to be comparable (space, backbone, device,
            recipe), as plain JSON values. An existing study must have been created with the same.
        objectives: Objectives to minimize; part of the fingerprint.
        heartbeat_s: Interval of the heartbeats of a worker [s].
        retries: Number of times that a trial restarts after its process crashed.

    Raises:
        InputError: The storage cannot be used, or the study has another fingerprint.
    """
    wanted = {**fingerprint, "objectives": [objective.name for objective in objectives]}

    def create(database: RDBStorage) -> optuna.Study:
        study = optuna.create_study(
            storage=database,
            study_name=name,
            directions=[StudyDirection.MINIMIZE] * len(objectives),
            sampler=RandomSampler(),  # never used: every trial is enqueued with its values
            load_if_exists=True,
        )
        if "fingerprint" not in study.user_attrs:
            study.set_metric_names([o.key for o in objectives])  # for the dashboard only
            study.set_user_attr("fingerprint", wanted)
        return study

    study, lock = connect(storage, name, heartbeat_s, create)
    remedy = "choose another search.study"
    if isinstance(storage, Path):
        remedy += f", or delete {storage}"
    check_fingerprint("search.study", name, study.user_attrs["fingerprint"], wanted, remedy)
    return Study(study, lock, objectives, heartbeat_s, retries)


def reopen_study(storage: Path | str, name: str) -> Study:
    """Open an existing study, whatever its fingerprint.

    Raises:
        InputError: The storage cannot be used, or holds no such study.
    """

    def load(database: RDBStorage) -> optuna.Study:
        return optuna.load_study(storage=database, study_name=name, sampler=RandomSampler())

    try:
        if isinstance(storage, Path) and not storage.is_file():
            raise KeyError
        study, lock = connect(storage, name, 1, load)
        names = study.user_attrs["fingerprint"]["objectives"]
    except KeyError as error:  # an unknown name, or a search that was killed as it began
        raise InputError(
            f"search.from_study={name}: expected a study that exists; run its search first"
        ) from error
    objectives = [Objective.parse(name) for name in names]
    return Study(study, lock, objectives, heartbeat_s=1, retries=0)
