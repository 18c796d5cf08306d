"""Contract tests of Optuna for flash.compat.optuna."""

import time
import warnings

import optuna
import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from tests.compat.contract import contract


@pytest.fixture
def study(tmp_path):
    """Study with two waiting trials, 0 and 1, whose heartbeats are stale after a second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        url = f"sqlite:///{tmp_path / 'study.db'}"
        storage = RDBStorage(url, heartbeat_interval=1, grace_period=1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=storage, study_name="contract")
    for _ in range(2):
        study.add_trial(optuna.create_trial(state=TrialState.WAITING))
    return study


def states(study):
    return [trial.state for trial in study.get_trials(deepcopy=False)]


def test_a_trial_goes_back_to_the_queue_under_its_number(study):
    with contract(
        "Optuna's Study._storage or set_trial_state_values of it",
        "flash.compat.optuna.TrialStorage",
        "queue the trial of a dead worker again",
    ):
        from flash.compat.optuna import TrialStorage

        storage = TrialStorage(study)
        storage.set_user_attr(1, "owner", {"pid": 7})
        storage.set_state(1, TrialState.RUNNING)
        assert states(study) == [TrialState.WAITING, TrialState.RUNNING]
        assert storage.user_attrs(1) == {"owner": {"pid": 7}}
        storage.set_state(1, TrialState.WAITING)
        assert states(study) == [TrialState.WAITING, TrialState.WAITING]


def test_a_trial_of_several_objectives_has_intermediate_values(tmp_path):
    with contract(
        "set_trial_intermediate_value of Optuna's storage",
        "flash.compat.optuna.TrialStorage.report",
        "show the learning curve of a trial in optuna-dashboard",
    ):
        from flash.compat.optuna import TrialStorage

        study = optuna.create_study(
            storage=f"sqlite:///{tmp_path / 'two.db'}", directions=["minimize"] * 2
        )
        trial = study.ask()
        for value in (5.5, 4.5):
            TrialStorage(study).report(trial.number, 256, value)
        study.tell(trial, (4.0, 10.0))
        assert study.trials[0].intermediate_values == {256: 4.5}


def test_trials_without_heartbeats_are_stale(study):
    with contract(
        "Optuna's BaseHeartbeat.record_heartbeat or _get_stale_trial_ids",
        "flash.compat.optuna.TrialStorage.stale_numbers",
        "recognize dead workers on other machines",
    ):
        from flash.compat.optuna import TrialStorage

        storage = TrialStorage(study)
        for number in range(2):
            storage.record_heartbeat(number)
            storage.set_state(number, TrialState.RUNNING)
        assert storage.stale_numbers() == set()
        time.sleep(2.5)
        storage.record_heartbeat(0)
        assert storage.stale_numbers() == {1}


def test_added_trials_belong_to_a_generation():
    with contract(
        "Optuna's NSGAIISampler._get_generation_key",
        "flash.compat.optuna.generation_attrs",
        "give finished trials to NSGA-II",
    ):
        from flash.compat.optuna import generation_attrs

        sampler = optuna.samplers.NSGAIISampler(population_size=2, seed=0)
        study = optuna.create_study(sampler=sampler)
        for value in range(4):
            study.add_trial(
                optuna.create_trial(values=[value], system_attrs=generation_attrs(value // 2))
            )
        population = sampler.get_population(study, 1)
        assert [trial.values for trial in population] == [[2.0], [3.0]]
        assert sampler.get_trial_generation(study, study.trials[0]) == 0
