"""Runs that end early, by signals and full disks, on one process and on two."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flash.training.fit import fit
from flash.training.settings import Precision, RecipeSettings, TrainerSettings
from flash.training.stability import StepGuard, StepStatus
from tests.training.decoders import make_model

RECIPE = RecipeSettings(name="test", tokens=4 * 128, batch_size=4, lr=3e-3)
TRAINER = TrainerSettings(precision=Precision.fp32, checkpoint_every_steps=2)


def test_signal_handlers_are_restored_after_the_run(data):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)]
    fit(make_model(), data, RECIPE, TRAINER)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)] == before


def test_a_signal_ends_the_run_with_a_checkpoint_of_its_step(data, tmp_path, monkeypatch):
    handled: list[int] = []
    check = StepGuard.check

    def check_and_send(guard: StepGuard, loss: float, norm: float) -> StepStatus:
        if not handled:
            os.kill(os.getpid(), signal.SIGUSR2)
        return check(guard, loss, norm)

    monkeypatch.setattr(StepGuard, "check", check_and_send)
    before = signal.signal(signal.SIGUSR2, lambda number, frame: handled.append(number))
    try:
        with pytest.raises(SystemExit) as ended:
            fit(make_model(), data, RECIPE, TRAINER, folder=tmp_path)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert handled == [signal.SIGUSR2]
    assert ended.value.code == 128 + signal.SIGUSR2
    assert fit(make_model(), data, RECIPE, TRAINER, folder=tmp_path).steps == 4


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(data, tmp_path):
    fit(make_model(), data, RECIPE, TRAINER, folder=tmp_path)
    last = tmp_path / "last.ckpt"
    before = last.read_bytes()
    longer = RecipeSettings(name="test", tokens=8 * 128, batch_size=4, lr=3e-3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            fit(make_model(), data, longer, TRAINER, folder=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(last)
    assert last.read_bytes() == before


@pytest.fixture
def command(backbone_folder, corpus, tmp_path):
    """A function that makes a command which trains on two processes."""

    def command(*changes: str) -> list[str]:
        return [
            sys.executable,
            "train.py",
            f"backbone.weights={backbone_folder}",
            "data=folder",
            f"data.path={corpus}",
            "data.pattern=*.py",
            "data.seq_len=32",
            "data.validation_sequences=4",
            "recipe.batch_size=4",
            "recipe.calibration_tokens=256",
            "trainer=cpu",
            "trainer.devices=2",
            "logger=none",
            "+arch.ffn_dim=64",
            "name=two",
            f"runs={tmp_path}",
            *changes,
        ]

    return command


@pytest.mark.slow
def test_stages_follow_one_another_on_two_processes(command, tmp_path):
    stages = "+then={more: {recipe: ${recipe}, data: ${data}}}"
    done = subprocess.run(command("recipe.tokens=512", stages), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("two", "two_more"):
        assert (tmp_path / "models" / name / "result.json").is_file()
    assert done.stderr.count("before training") + done.stdout.count("before training") == 2


@pytest.mark.slow
def test_a_signal_to_the_main_process_ends_both_with_one_line(command, tmp_path):
    long = command("recipe.tokens=1280000", "trainer.checkpoint_every_steps=5")
    with subprocess.Popen(
        long, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        deadline = time.monotonic() + 100
        while not list(Path(tmp_path).rglob("last.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        printed, _ = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert printed.count("stopped by SIGTERM") == 1
