"""Contract tests of submitit and of its Hydra launcher for flash.compat.submitit."""

import dataclasses
import inspect
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus

from tests.compat.contract import contract

pytest.importorskip("submitit")


def test_a_job_is_recognized_by_its_environment(monkeypatch):
    with contract(
        "submitit's environment variable SUBMITIT_EXECUTOR",
        "flash.compat.submitit.in_job",
        "distinguish a job from a command",
    ):
        from submitit.local.local import LocalJobEnvironment

        from flash.compat.submitit import in_job

        monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
        assert not in_job()
        assert not LocalJobEnvironment().activated()
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
        assert in_job()
        assert LocalJobEnvironment().activated()


def test_sigusr2_queues_a_job_again():
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT)}
    with contract(
        "submitit's handler SignalHandler.checkpoint_and_try_requeue of SIGUSR2",
        "flash.compat.submitit.requeue_handler",
        "put a job that Slurm stops into the queue again",
    ):
        from submitit.local.local import LocalJobEnvironment

        from flash.compat.submitit import requeue_handler

        nothing: Any = None
        try:
            LocalJobEnvironment()._handle_signals(nothing, nothing)
            name = getattr(requeue_handler(), "__name__", None)
            assert name == "checkpoint_and_try_requeue"
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def test_errors_are_recognized():
    with contract(
        "submitit's package of errors",
        "flash.compat.submitit.error_lines",
        "explain the failure of a job in one line",
    ):
        from submitit.core.utils import FailedJobError, UncompletedJobError

        from flash.compat.submitit import error_lines

        text = "Job failed\n-------\n  sbatch: no partition \n"
        for kind in (FailedJobError, UncompletedJobError):
            assert error_lines(kind(text)) == ["Job failed", "sbatch: no partition"]
        assert error_lines(ValueError(text)) is None


def test_the_plugin_runs_jobs_that_we_submit():
    with contract(
        "SlurmLauncher, LocalLauncher or BaseQueueConf of Hydra's submitit launcher",
        "flash.compat.submitit.submit",
        "submit jobs and wait for all of them",
    ):
        from hydra_plugins.hydra_submitit_launcher import submitit_launcher
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        from flash.compat.hydra import plugin_option

        names = [field.name for field in dataclasses.fields(BaseQueueConf)]
        assert {"submitit_folder", "timeout_min", "name"} <= set(names)
        for kind in ("Slurm", "Local"):
            launcher = getattr(submitit_launcher, f"{kind}Launcher")
            parameters = list(inspect.signature(launcher.__call__).parameters)
            assert parameters == [
                *("self", "sweep_overrides", "job_dir_key", "job_num", "job_id"),
                "singleton_state",
            ]
            values = plugin_option("hydra/launcher", f"submitit_{kind.lower()}")
            assert values is not None
            assert "submitit_folder" in values


def test_the_error_of_a_job_is_its_result():
    with contract(
        "Hydra's JobReturn._return_value", "flash.compat.submitit.result", "read a job's error"
    ):
        from flash.compat.submitit import result

        error = ValueError("x")
        for status, value in ((JobStatus.FAILED, error), (JobStatus.COMPLETED, 1)):
            returned = JobReturn(status=status, _return_value=value)
            assert result(SimpleNamespace(results=lambda value=returned: [value])) is value
