"""Errors and signals in a Slurm job, without Slurm; tests/search/test_slurm.py uses a real one."""

import copy
import os
import re
import signal
import sys
from types import SimpleNamespace

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from flash import slurm
from flash.config import entry, one_line_errors
from flash.errors import InputError
from flash.outcome import noted
from flash.search.settings import SearchJobSettings


@pytest.fixture
def launch(monkeypatch, tmp_path, capsys):
    """A function that runs `search.py -m`; it returns exit code, stderr lines and started jobs.

    Jobs are started in name only, and end well.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLASH_VERB", "search")

    def call(*arguments):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["search.py", "-m", *arguments])
        begun = []
        monkeypatch.setattr("flash.sweep._run", lambda job: begun.append(job) or noted())
        with pytest.raises(SystemExit) as stop:
            entry("search", pytest.fail)
        return stop.value.code, capsys.readouterr().err.splitlines(), begun

    return call


def test_a_mistake_in_the_last_job_stops_the_first(launch):
    code, lines, begun = launch("search.trials=3,-1")
    assert (code, begun) == (2, [])
    assert lines == ["error: search.trials=-1: expected a positive integer"]
    code, lines, begun = launch("worker=range(0,2)", "hydra.verbose=[flash]")
    assert (code, begun) == (0, [[f"worker={i}", "hydra.verbose=[flash]"] for i in (0, 1)])


def test_what_slurm_needs_is_named(launch, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    code, lines, begun = launch("hydra/launcher=submitit_slurm")
    assert (code, begun) == (2, [])
    assert lines == [
        "error: hydra/launcher=submitit_slurm: expected Slurm's sbatch and srun; start it on a "
        "login node"
    ]
    launchers = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.delitem(launchers, "submitit_slurm.yaml")
    code, lines, begun = launch("hydra/launcher=submitit_slurm")
    assert (code, begun) == (2, [])
    assert lines == [
        "error: hydra/launcher=submitit_slurm: needs a plugin; pip install hydra-submitit-launcher"
    ]


@pytest.fixture
def in_job(monkeypatch, tmp_path):
    """Calls work as in a Slurm job; `seen` lists the signals that reach submitit's handler."""
    ends = []
    monkeypatch.setenv("FLASH_RUNS", str(tmp_path))
    monkeypatch.setattr("atexit.register", ends.append)  # else it ends the test process
    seen = []
    kept = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR2)}
    signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))

    def call(work):
        with slurm.job(one_line_errors(SearchJobSettings)):
            work()

    yield SimpleNamespace(call=call, seen=seen, ends=ends)
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (InputError("a=1: expected 2"), "a=1: expected 2", 2),
        (
            RuntimeError("a bug"),
            r"unexpected RuntimeError \(a bug\); a fault of flash: .*/crash/.*",
            1,
        ),
    ],
)
def test_an_error_becomes_the_result_of_the_job(in_job, error, line, code):
    def work():
        raise error

    with pytest.raises(slurm.JobFailed) as failed:
        in_job.call(work)
    result = copy.copy(failed.value)  # takes it apart and makes it anew, as pickling does
    assert re.fullmatch(line, result.line)
    assert result.code == code
    assert len(in_job.ends) == 1  # the exit code tells Slurm that the job has failed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_stops_the_work_as_ctrl_c_does(in_job, number):
    given_back = []

    def work():
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGTERM)  # a second signal disturbs nothing
            given_back.append(number)
            raise

    with pytest.raises(SystemExit) as stop:
        in_job.call(work)
    assert given_back == [number]
    assert stop.value.code == 128 + number
    assert in_job.seen == [number] * (number == signal.SIGUSR2)  # submitit queues the job again
    assert not in_job.ends
