"""Facts about several processes on one study, some of which die."""

import errno
import multiprocessing
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace

import psutil
import pytest
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError

from flash.errors import InputError, ServiceError
from flash.search import storage, workers
from flash.search.loop import frontier
from flash.search.quality import Quality
from flash.search.storage import named_errors
from flash.search.workers import Owner
from tests.search import toy_search as toy
from tests.search.postgres import programs, server

# A server that has imported everything, so that starting a worker takes milliseconds.
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["tests.search.toy_search"])


def start_worker(storage, log, **settings):
    process = SPAWN.Process(target=toy.work, args=(storage, log, settings))
    process.start()
    return process


def outcome(trials):
    return [(t.number, t.spec, t.loss, t.costs, t.state, t.batch) for t in trials]


def read_log(log):
    """Count the starts of each trial."""
    if not log.is_file():
        return Counter()
    return Counter(int(number) for number in log.read_text().split())


def test_twenty_kills_lose_no_result_and_repeat_none(tmp_path):
    settings = {"trials": 24, "retries": 100}
    undisturbed = toy.run(tmp_path / "undisturbed.db", **settings)
    path, log = tmp_path / "study.db", tmp_path / "log"
    rng = random.Random(0)
    kept = []
    for turn in range(20):
        before = read_log(log).total()
        process = start_worker(path, log, **settings)
        while turn % 2 and process.is_alive() and read_log(log).total() == before:
            time.sleep(0.01)  # every other one dies at work, the rest at any point from the start
        process.join(rng.uniform(0.0, 0.4))
        process.kill()
        process.join()
        if path.is_file():
            trials = toy.open_toy(path, toy.make_space()).trials()
            finished = [t for t in outcome(trials) if t[4] is TrialState.COMPLETE]
            assert finished[: len(kept)] == kept
            kept = finished
    trials = toy.run(path, **settings)
    assert outcome(trials) == outcome(undisturbed)
    assert [t.number for t in frontier(trials, toy.PROBLEM)] == [
        t.number for t in frontier(undisturbed, toy.PROBLEM)
    ]
    begun = read_log(log)
    crashes = {t.number: t.extra.get("crashes", 0) for t in trials}
    assert all(count <= 1 + crashes[number] for number, count in begun.items())


def work_together(storage, log, settings, make_space=toy.make_space):
    """Run three workers, kill and replace one of them, and return all trials."""
    crew = [start_worker(storage, log, **settings) for _ in range(3)]
    until = time.monotonic() + 60
    while read_log(log).total() < 6:
        assert time.monotonic() < until
        time.sleep(0.02)
    crew[0].kill()
    crew.append(start_worker(storage, log, **settings))
    for process in crew:
        process.join(60)
    assert [process.exitcode for process in crew] == [-9, 0, 0, 0]
    return toy.open_toy(storage, make_space(), toy.make_settings(**settings)).trials()


def assert_shared_well(trials, log, wanted):
    assert all(t.complete for t in trials)
    assert len(trials) == len({t.spec for t in trials}) == wanted
    begun = read_log(log)
    crashed = {t.number for t in trials if t.extra.get("crashes")}
    assert len(crashed) <= 1
    assert begun == {t.number: 1 + (t.number in crashed) for t in trials}


def test_workers_share_a_study_and_take_over_from_the_dead(tmp_path):
    settings = {"trials": 24}
    trials = work_together(tmp_path / "study.db", tmp_path / "log", settings)
    assert_shared_well(trials, tmp_path / "log", 24)


def test_a_trial_of_a_living_worker_is_left_alone(tmp_path):
    path, space = tmp_path / "study.db", toy.make_space()
    toy.run(path, trials=4)
    mine, other = (toy.open_toy(path, space) for _ in range(2))
    spec = next(space.neighbors(mine.trials()[1].spec))
    mine.plan([spec], {k: v.tolist() for k, v in toy.costs([spec]).items()}, (4, 1))
    mine.enqueue(space)
    with mine.working():
        trial = mine.start()
        assert trial is not None
        other.recover()
        assert other.trials()[4].state is TrialState.RUNNING
        assert other.start() is None
    other.recover()
    assert other.trials()[4].state is TrialState.WAITING
    assert other.start().number == 4
    # What the worker that was thought dead finds after all would be a second result.
    assert mine.complete(trial, Quality(1.0)).state is TrialState.RUNNING


def test_silence_tells_of_the_dead_on_other_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MISSED_BEATS", 1)
    path, space = tmp_path / "study.db", toy.make_space()
    settings = toy.make_settings(heartbeat_s=1)
    here, there = (toy.open_toy(path, space, settings) for _ in range(2))
    there._owner = replace(there._owner, machine="elsewhere")
    specs = space.stratified(toy.np.random.default_rng(0), 2)
    here.plan(specs, {k: v.tolist() for k, v in toy.costs(specs).items()}, (0, 2))
    here.enqueue(space)
    dead, living = there.start(), there.start()
    assert dead is not None
    assert living is not None
    with there.heartbeat(living):
        here.recover()
        assert all(t.state is TrialState.RUNNING for t in here.trials())
        time.sleep(2.5)
        here.recover()
    assert [t.state for t in here.trials()] == [TrialState.WAITING, TrialState.RUNNING]


def test_a_process_that_nobody_waits_for_is_dead():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it stays, as without an init process
    started = psutil.Process(child).create_time()
    assert Owner(Owner.make().machine, child, started, "t").gone()
    os.waitpid(child, 0)


def test_a_full_disk_is_no_unreachable_database(tmp_path, monkeypatch):
    def fail(path):
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorname = "SQLITE_FULL"
        raise error

    monkeypatch.setattr(storage, "_enable_write_ahead_log", fail)
    with pytest.raises(OSError, match="No space left") as raised:
        toy.open_toy(tmp_path / "study.db", toy.make_space())
    assert raised.value.errno == errno.ENOSPC


def test_the_end_of_a_trial_waits_for_a_server_that_is_away(tmp_path, monkeypatch):
    monkeypatch.setattr("flash.search.study._RETRY_S", 0.01)
    opened = toy.open_toy(tmp_path / "study.db", toy.make_space())
    monkeypatch.setattr(workers.FileLock, "remote", True)
    away = iter([True, True])

    def record(*_):
        if next(away, False):
            raise OperationalError("tell", None, ConnectionError("server closed"))

    monkeypatch.setattr(opened, "_record", record)
    space = toy.make_space()
    with opened.working():
        specs = space.stratified(toy.np.random.default_rng(0), 1)
        opened.plan(specs, {k: v.tolist() for k, v in toy.costs(specs).items()}, (0, 1))
        opened.enqueue(space)
        assert opened.complete(opened.start(), Quality(2.0)).complete


def test_a_process_that_is_gone_or_whose_id_was_given_away_is_dead():
    process = SPAWN.Process(target=time.sleep, args=(60,))
    process.start()
    started = workers.psutil.Process(process.pid).create_time()
    owner = replace(Owner.make(), pid=process.pid, started=started)
    assert owner.gone() is False
    assert replace(owner, started=started - 100).gone() is True
    process.kill()
    process.join()
    assert owner.gone() is True
    assert replace(owner, machine="elsewhere").gone() is None


STOPS = {
    "Ctrl-C": KeyboardInterrupt(),
    "the end of a training by a signal": SystemExit(143),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "a full disk, in Rust": RuntimeError("No space left on device (os error 28)"),
}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
@pytest.mark.parametrize("writable", [True, False])
def test_a_stop_is_no_crash_of_the_trial(tmp_path, stop, writable):
    """Also if the full disk takes no entry in the database."""
    path = tmp_path / "study.db"

    def stopped(spec, number, watch):
        if number != 3:
            return Quality(toy.loss(spec))
        if not writable:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        raise stop

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for _ in range(3):
        try:
            with pytest.raises(type(stop) if writable else OSError):
                toy.run(path, evaluate=stopped, trials=8, retries=0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    trials = toy.run(path, trials=8, retries=0)
    assert all(t.complete and "crashes" not in t.extra for t in trials)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("crash", [ValueError("a bug"), OSError(errno.EIO, "Input/output error")])
def test_an_exception_of_the_evaluation_is_a_crash_of_the_trial(tmp_path, crash):
    path = tmp_path / "study.db"

    def crashing(spec, number, watch):
        if number == 3:
            raise crash
        return Quality(toy.loss(spec))

    for _ in range(2):
        with pytest.raises(type(crash)):
            toy.run(path, evaluate=crashing, trials=8, retries=1)
    trials = toy.run(path, trials=8, retries=1)
    assert [t.number for t in trials if not t.complete] == [3]
    assert trials[3].extra["reason"] == "its process died 2 times"


@pytest.mark.parametrize(("number", "crashes"), [(signal.SIGTERM, 0), (signal.SIGKILL, 1)])
def test_only_a_kill_counts_against_the_retries(tmp_path, number, crashes):
    """SIGKILL is also what the kernel sends to a trial that takes too much memory."""
    path = tmp_path / "study.db"
    for turn in (1, 2):
        process = subprocess.Popen(
            [sys.executable, toy.__file__, str(path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        with process:
            assert process.stdout is not None
            assert any(line.strip() == b"9" for line in process.stdout)  # trial 9 never ends
            process.send_signal(number)
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        study = toy.open_toy(path, toy.make_space())
        study.recover()
        trial = study.trials()[9]
        assert trial.extra.get("crashes", 0) == turn * crashes
        expected = TrialState.FAIL if turn * crashes > 1 else TrialState.WAITING
        assert trial.state is expected
        if expected is TrialState.FAIL:
            assert trial.extra["reason"] == "its process died 2 times"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mysql://me:secret@host/db", "expected postgresql://"),
        ("postgresql://me:secret@host/db", "expected no password, since settings are logged"),
        ("postgresql://me:sec@secret/x@host/db", "expected"),
        ("postgresql://me:sec?secret@host/db", "expected"),
        ("postgresql://me@host/db?password=secret&sslpassword=secret", "expected no password"),
        ("postgresql://me@host/db?a=1&sslpassword='the secret'", "expected no password"),
        ("postgresql://me@host/db?pass%77ord=secret", "expected no password"),
        ("nonsense", "expected postgresql://"),
    ],
)
def test_a_storage_of_another_kind_is_refused_without_showing_its_password(url, expected):
    for use in (
        lambda: toy.open_toy(url, toy.make_space()),
        lambda: toy.make_settings(storage=url),
    ):
        with pytest.raises(InputError, match=expected) as error:
            use()
        assert "secret" not in str(error.value)


def test_a_file_that_is_no_database_is_one_line(tmp_path):
    path = tmp_path / "study.db"
    path.write_text("something else\n" * 1000)
    with pytest.raises(InputError, match="expected a study's database .*move a damaged") as error:
        toy.open_toy(path, toy.make_space())
    assert "\n" not in str(error.value)


DAMAGES = {
    """UPDATE study_user_attributes SET value_json = '{"a":' WHERE key = 'some'""": "Expecting",
    """UPDATE trial_values SET value_type = 'FINI'""": "is not among the defined enum",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_value_in_a_database_is_one_line(tmp_path, damage):
    path = tmp_path / "study.db"
    toy.run(path, trials=1, startup_trials=1)
    study = toy.open_toy(path, toy.make_space())
    study.remember("some", lambda: {"a": 1})
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(damage)
    with (
        pytest.raises(ServiceError, match=rf"study\.db: the database .*{DAMAGES[damage]}") as error,
        named_errors(path, "toy"),
    ):
        _ = study.recall("some"), study.trials()
    assert "\n" not in str(error.value)


def test_a_fault_of_ours_is_none_of_the_database(tmp_path):
    with pytest.raises(KeyError), named_errors(tmp_path / "study.db", "toy"):
        raise KeyError


def test_a_database_that_fails_during_the_work_is_one_line(tmp_path):
    path = tmp_path / "study.db"
    study = toy.open_toy(path, toy.make_space())
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE trials")
    with (
        pytest.raises(ServiceError, match=r"study\.db: the database failed \(.*no such") as error,
        named_errors(path, "toy"),
    ):
        study.trials()
    assert "\n" not in str(error.value)


@pytest.fixture
def postgres(tmp_path_factory):
    """URL of a PostgreSQL server on its own socket."""
    pytest.importorskip("psycopg")
    if programs() is None:
        pytest.skip("needs PostgreSQL's initdb and pg_ctl: apt-get install postgresql")
    folder = tmp_path_factory.mktemp("pg")
    for path in (*reversed(folder.parents), folder):
        if path.is_relative_to(tmp_path_factory.getbasetemp().parent):
            path.chmod(0o755)
    with server(folder) as url:
        yield url


@pytest.mark.slow
def test_workers_share_a_postgresql_study(postgres, tmp_path):
    settings = {"trials": 24, "heartbeat_s": 1}
    trials = work_together(postgres, tmp_path / "log", settings)
    assert_shared_well(trials, tmp_path / "log", 24)
    assert outcome(toy.run(postgres, **settings)) == outcome(trials)


@pytest.mark.slow
def test_an_unreachable_postgresql_is_one_line(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(InputError, match="can be reached"):
        toy.open_toy(f"postgresql://flash@/none?host={tmp_path}", toy.make_space())
