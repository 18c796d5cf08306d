"""Facts about workers started by a real Slurm with one node on the loopback interface."""

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from optuna.storages import RDBStorage

from flash.paths import Runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian puts daemons
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
HOST = socket.gethostname().split(".")[0]

# One node that claims more CPUs than there are. Nothing is accounted, limited or bound. Jobs that
# are over stay visible for the stand-in of sacct.
CONFIG = """\
ClusterName=flash
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
KillWait=5
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
# sacct needs a database server; submitit asks it for nothing but the states.
SACCT = """\
#!/bin/sh
echo 'JobID|State|NodeList'
exec squeue --noheader --array --states=all --format='%i|%T|%N'
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]


def wait_for(condition, what, seconds=300.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Environment in which Slurm's commands, and a substitute of sacct, reach a cluster."""
    for name in NEEDED:
        if shutil.which(name, path=PATH) is None:
            pytest.skip(f"needs {name}: apt-get install slurm-wlm")
    pytest.importorskip("submitit", reason="needs hydra-submitit-launcher")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "bin", "key"):
        (folder / name).mkdir()
    (folder / "bin" / "sacct").write_text(SACCT)
    (folder / "bin" / "sacct").chmod(0o755)
    key = folder / "key" / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o400)
    ctld_port, slurmd_port = free_ports(2)
    (folder / "cgroup.conf").touch()
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(
            host=HOST,
            user=getpass.getuser(),
            folder=folder,
            ctld_port=ctld_port,
            slurmd_port=slurmd_port,
        )
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_"))}
    env = {**kept, "SLURM_CONF": str(config), "PATH": f"{folder / 'bin'}:{PATH}"}
    munged = (
        *("munged", "--foreground", "--force", f"--socket={folder}/munge.socket"),
        *(f"--key-file={key}", f"--log-file={folder}/munged.log"),
        *(f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed"),
    )
    started = []
    try:
        with (folder / "daemons.log").open("w") as log:

            def start(*command):
                started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))

            start(*munged)
            wait_for((folder / "munge.socket").exists, "munged's socket", 10)
            start("slurmctld", "-D")
            start("slurmd", "-D")
        wait_for(lambda: _is_idle(env), "a node that is idle", 30)
        yield env
        subprocess.run(["scancel", "--quiet", "--user", getpass.getuser()], env=env, check=False)
        wait_for(lambda: not running_jobs(env), "the end of all jobs", 30)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _is_idle(env):
    command = ["sinfo", "--noheader", "--format=%T"]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    return found.stdout.strip() == "idle"


def _queue(env, *options):
    command = ["squeue", "--noheader", "--array", *options]
    found = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return found.stdout.split()


def running_jobs(env):
    """List the ids of unfinished jobs."""
    return _queue(env, "--format=%i")


def job_states(env):
    """Return the states of all jobs so far, by id."""
    return dict(line.split("|") for line in _queue(env, "--states=all", "--format=%i|%T"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder shared by all tests, so only the first search measures."""
    return Runs(tmp_path_factory.mktemp("work") / "runs")


@pytest.fixture
def launch(slurm, corpus, backbone_folder, runs):
    """Start `search.py` as in the documentation, at a small size."""
    small = [
        f"runs={runs.root}",
        f"backbone.weights={backbone_folder}",
        "backbone.name=small",
        *("data=folder", f"data.path={corpus}", "data.pattern='*.py'"),
        *("data.validation_percent=20", "data.seq_len=32", "data.validation_sequences=8"),
        *("space.num_layers.min=1", "space.num_layers.max=3"),
        *("space.model_dim.min=32", "space.model_dim.max=64", "space.model_dim.step=32"),
        *("space.ffn_dim.min=64", "space.ffn_dim.max=128", "space.ffn_dim.step=64"),
        "space.kinds=[full_attention,skip_attention]",
        "device.lowering.max_context=64",
        *("device.workload.prompts=[32]", "device.workload.contexts=[32]"),
        *(
            "device.workload.decode_tokens=4",
            "device.processes=1",
            "device.warmups=1",
            "device.runs=2",
        ),
        "device.lowering.quantization=fp32",
        *("latency=params", "latency.whole_models=4", "latency.precision_pct=1000"),
        *("recipe.batch_size=4", "recipe.calibration_tokens=256", "trainer.precision=fp32"),
        *("logger=none", "search.batch=2", "search.startup_trials=4"),
        *("search.max_loss_increase=6", "search.max_cost_ratio=3"),
    ]
    started = []

    def start(study, *overrides, workers=2):
        numbers = f"worker=range(0,{workers})" if workers > 1 else "worker=0"
        command = [sys.executable, "search.py", "-m", "hydra/launcher=submitit_slurm", numbers]
        command = subprocess.Popen(
            [*command, f"search.study={study}", *small, *overrides],
            cwd=ROOT,
            env=slurm,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(command)
        return command

    yield start
    for command in started:
        command.kill()
        command.communicate()


def lines_of(command, timeout):
    """Wait for the command; return its exit code and output."""
    _, err = command.communicate(timeout=timeout)
    assert "Traceback" not in err, err
    return command.returncode, [line for line in err.splitlines() if line.strip()]


class StudyFile:
    """SQLite file of a study, with a trigger that records every start of a trial."""

    def __init__(self, path):
        path.parent.mkdir(parents=True)
        RDBStorage(f"sqlite:///{path}").engine.dispose()
        self.path = path
        self._script(
            "CREATE TABLE begun (number, owner);"
            "CREATE TRIGGER begins AFTER UPDATE OF state ON trials WHEN NEW.state = 'RUNNING' "
            "BEGIN INSERT INTO begun SELECT NEW.number, value_json FROM trial_user_attributes "
            "WHERE trial_id = NEW.trial_id AND key = 'owner'; END"
        )

    def _script(self, script):
        with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as connection:
            connection.executescript(script)

    def _rows(self, query):
        with contextlib.closing(sqlite3.connect(self.path, timeout=60)) as connection:
            return connection.execute(query).fetchall()

    def states(self):
        return dict(self._rows("SELECT number, state FROM trials ORDER BY number"))

    def begun(self):
        """Count the starts of each trial."""
        return Counter(number for (number,) in self._rows("SELECT number FROM begun"))

    def attribute(self, key):
        rows = self._rows(
            "SELECT number, value_json FROM trials JOIN trial_user_attributes USING (trial_id) "
            f"WHERE key = '{key}'"
        )
        return {number: json.loads(value) for number, value in rows}

    def running(self):
        """Return the running trials by process id of their workers."""
        owners = self.attribute("owner")
        return {owners[n]["pid"]: n for n, s in self.states().items() if s == "RUNNING"}

    def is_over(self, trials):
        states = list(self.states().values())
        return len(states) == trials and not {"RUNNING", "WAITING"} & set(states)


def assert_each_once(study, trials, again=()):
    """Assert that trials are complete, distinct and, except those in `again`, started once."""
    assert len(study.states()) == trials
    assert "FAIL" not in study.states().values()
    specs = [json.dumps(spec, sort_keys=True) for spec in study.attribute("spec").values()]
    assert len(set(specs)) == trials
    assert study.begun() == Counter(range(trials)) + Counter(again)


def test_slurm_workers_share_a_study_and_evaluate_nothing_twice(launch, slurm, runs):
    study, before = StudyFile(runs.study("shared") / "study.db"), job_states(slurm)
    code, said = lines_of(launch("shared", "search.trials=6", "recipe.tokens=4096"), 300)
    assert code == 0, said
    assert_each_once(study, 6)
    assert not study.attribute("crashes")
    jobs = job_states(slurm).keys() - before
    assert len(jobs) == 2
    for job in jobs:
        (log,) = (runs.root / "slurm" / job).glob("*_log.out")
        text = log.read_text()
        assert "frontier of 6 trials (0 failed)" in text
        assert "Warning" not in text

    # An error that only the job can find.
    command = launch("shared", "search.trials=6", "recipe.lr=0.1", workers=1)
    out, err = command.communicate(timeout=120)
    assert command.returncode == 2, err
    assert "failed  search.study=shared: expected" in out
    assert err.splitlines()[-1].startswith("error: 1 of 1 jobs failed;")
    states = job_states(slurm)
    ended = sorted(states[job] for job in states.keys() - before)
    assert ended == ["COMPLETED", "COMPLETED", "FAILED"]


def freeze(study, count):
    """Stop `count` workers amid trials; return {array index of job: (process id, trial)}."""

    def stopped():
        held = study.running()
        if len(held) < count:
            return None
        for pid in held:
            os.kill(pid, signal.SIGSTOP)
        if study.running() == held:
            return held
        for pid in held:
            os.kill(pid, signal.SIGCONT)
        return None

    def index(pid):
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        return dict(v.split("=", 1) for v in variables if "=" in v)["SLURM_ARRAY_TASK_ID"]

    held = wait_for(stopped, f"{count} trials at once", 240)
    return {int(index(pid)): (pid, number) for pid, number in held.items()}


def test_interrupted_trials_of_workers_run_again(launch, slurm, runs):
    study = StudyFile(runs.study("again") / "study.db")
    command = launch("again", "search.trials=4", "recipe.tokens=32768", workers=3)
    workers = freeze(study, 3)
    cancelled, killed, preempted = (workers[i] for i in range(3))
    jobs = sorted(running_jobs(slurm))
    subprocess.run(["scancel", jobs[0]], env=slurm, check=True)
    os.kill(killed[0], signal.SIGKILL)
    # As before a time limit; the job goes into Slurm's queue, and joins the study again.
    subprocess.run(["scancel", "--signal=USR2", jobs[2]], env=slurm, check=True)
    for pid, _ in (cancelled, preempted):
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: job_states(slurm)[jobs[2]] == "PENDING", "the job in the queue")
    at_once = ["scontrol", "update", f"JobId={jobs[2]}", "StartTime=now"]  # else two minutes later
    subprocess.run(at_once, env=slurm, check=True)

    out, err = command.communicate(timeout=300)  # waits for the other jobs
    assert command.returncode == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: 2 of 3 jobs failed;")
    said = " ".join(out.split())
    assert f"failed Job {jobs[0]} " in said
    assert "(state: CANCELLED)" in said
    assert "worker=2 done 4 trials" in said
    assert study.is_over(4)
    assert study.attribute("crashes") == {killed[1]: 1}  # nobody is to blame for the others
    assert_each_once(study, 4, again=[number for _, number in workers.values()])
    wait_for(lambda: not running_jobs(slurm), "the end of the last worker")
    assert [job_states(slurm)[job] for job in jobs] == ["CANCELLED", "FAILED", "COMPLETED"]


def test_a_mistake_is_one_line_before_anything_is_queued(launch, slurm):
    before = job_states(slurm)
    code, said = lines_of(launch("mistake", "search.trials=-1"), 120)
    assert code == 2
    assert said[-1] == "error: search.trials=-1: expected a positive integer"
    assert job_states(slurm) == before
