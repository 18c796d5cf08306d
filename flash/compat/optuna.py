"""Optuna: state, attributes and heartbeats of a study's trials, and NSGA-II's generations.

Names that Optuna 5 keeps to itself, and the reasons to use them:

- `Study._storage`, and of the storage behind it `get_study_id_from_name`,
  `get_trial_id_from_study_id_trial_number`, `get_trial_number_from_id`, `get_trial`,
  `set_trial_user_attr` and `set_trial_state_values` (documented, but "not supposed to be directly
  accessed"): a trial of a dead worker goes back to the queue under its own number, which no public
  function does.
- `optuna.storages._heartbeat.BaseHeartbeat`, its `record_heartbeat` and `_get_stale_trial_ids`:
  Optuna beats only within `Study.optimize`, and its `fail_stale_trials` fails what should be
  queued again.
- `NSGAIISampler._get_generation_key`: finished trials are told with the generation that they would
  have had, since Optuna counts it only while it asks.
"""

from typing import Any

import optuna
from optuna.samplers import NSGAIISampler
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.trial import TrialState


class TrialStorage:
    """The storage behind a study, with trials by their number.

    Args:
        study: Kept in a storage that knows heartbeats, such as `RDBStorage`.
    """

    def __init__(self, study: optuna.Study) -> None:
        self._storage = study._storage
        self._study_id = self._storage.get_study_id_from_name(study.study_name)

    def user_attrs(self, number: int) -> dict[str, Any]:
        """The attributes that `set_user_attr` has set, as they are in the database now."""
        return self._storage.get_trial(self._id(number)).user_attrs

    def set_user_attr(self, number: int, key: str, value: Any) -> None:
        """Set an attribute to a plain JSON value."""
        self._storage.set_trial_user_attr(self._id(number), key, value)

    def set_state(self, number: int, state: TrialState) -> None:
        """Start a waiting trial, or put a running one back into the queue."""
        self._storage.set_trial_state_values(self._id(number), state)

    def record_heartbeat(self, number: int) -> None:
        """Note that the trial is being worked on."""
        self._heartbeats.record_heartbeat(self._id(number))

    def stale_numbers(self) -> set[int]:
        """Running trials whose last heartbeat is longer ago than the storage's grace period."""
        stale = self._heartbeats._get_stale_trial_ids(self._study_id)
        return {self._storage.get_trial_number_from_id(trial_id) for trial_id in stale}

    @property
    def _heartbeats(self) -> BaseHeartbeat:
        assert isinstance(self._storage, BaseHeartbeat)
        return self._storage

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def generation_attrs(generation: int) -> dict[str, int]:
    """System attributes of a trial that NSGA-II shall count to this generation."""
    return {NSGAIISampler._get_generation_key(): generation}
