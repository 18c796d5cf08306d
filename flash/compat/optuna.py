"""Optuna: state, attributes and heartbeats of a study's trials, and NSGA-II's generations.

Names that Optuna 5 does not document for users, and the reasons to use them:

- `Study._storage`, and of the storage behind it `get_study_id_from_name`,
  `get_trial_id_from_study_id_trial_number`, `get_trial_number_from_id`, `get_trial`,
  `set_trial_user_attr` and `set_trial_state_values` (documented, but "not supposed to be directly
  accessed"): return a trial of a dead worker to the queue under its own number, which no public
  function can do. `set_trial_intermediate_value`: `Trial.report` refuses several objectives.
- `optuna.storages._heartbeat.BaseHeartbeat`, its `record_heartbeat` and `_get_stale_trial_ids`:
  Optuna records heartbeats only within `Study.optimize`, and its `fail_stale_trials` fails trials
  that should be queued again.
- `NSGAIISampler._get_generation_key`: gives a generation to finished trials that are added to a
  study, since Optuna sets it only for trials that it proposes.
"""

from typing import Any

import optuna
from optuna.samplers import NSGAIISampler
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import TrialState


class TrialStorage:
    """Access to the storage of a study, with trials by number.

    Args:
        study: Study in a storage that supports heartbeats, such as `RDBStorage`.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._storage = study._storage
        self._study_id = self._storage.get_study_id_from_name(study.study_name)

    def user_attrs(self, number: int) -> dict[str, Any]:
        """Read the current user attributes of a trial from the database."""
        return self._storage.get_trial(self._id(number)).user_attrs

    def set_user_attr(self, number: int, key: str, value: Any) -> None:
        """Set a user attribute of a trial to a plain JSON value."""
        self._storage.set_trial_user_attr(self._id(number), key, value)

    def report(self, number: int, step: int, value: float) -> None:
        """Set the intermediate value of a running trial at a step, again if it exists."""
        self._storage.set_trial_intermediate_value(self._id(number), step, value)

    def set_state(self, number: int, state: TrialState) -> None:
        """Set the state of a trial, to start a waiting one or to queue a running one again."""
        self._storage.set_trial_state_values(self._id(number), state)

    def record_heartbeat(self, number: int) -> None:
        """Record that a worker is still evaluating the trial."""
        self._heartbeats.record_heartbeat(self._id(number))

    def stale_numbers(self) -> set[int]:
        """Return the running trials without a heartbeat within the grace period of the storage."""
        stale = self._heartbeats._get_stale_trial_ids(self._study_id)
        return {self._storage.get_trial_number_from_id(trial_id) for trial_id in stale}

    @property
    def _heartbeats(self) -> BaseHeartbeat:
        assert isinstance(self._storage, BaseHeartbeat)
        return self._storage

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def generation_attrs(generation: int) -> dict[str, int]:
    """Return system attributes by which NSGA-II assigns a trial to this generation."""
    return {NSGAIISampler._get_generation_key(): generation}
