"""Facts about signals that stop a command: before the work, during it, and twice."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from flash import signals

ROOT = Path(__file__).parents[1]
NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
SCRIPT = """
import sys, time
from flash import commands, signals
from flash.config import one_line_errors
signals.begin()
sys.argv = ["flash", "seed=3"]
with one_line_errors():
    try:
        print("at work", flush=True)
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
"""


def _plain_environment() -> dict[str, str]:
    """Environment of a shell, without what commands within other tests have noted in it."""
    return {key: value for key, value in os.environ.items() if not key.startswith("FLASH_")}


def defaults() -> None:
    """Give signals their default handlers; tests in the background begin with some ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextmanager
def started(prepare):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env={**_plain_environment(), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_a_command_in_order_and_with_the_way_to_go_on(number):
    with started(defaults) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "cleaned up\n")
    assert err == "\nstopped; finished work is kept, go on with: flash seed=3\n"


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    def prepare() -> None:
        defaults()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with started(prepare) as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_before_the_work_is_one_word(number):
    check = (
        f"import os\nfrom flash import signals\nsignals.begin()\nos.kill(os.getpid(), {number})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check],
        env={**_plain_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        preexec_fn=defaults,
    )
    assert (done.returncode, done.stderr) == (128 + number, "\nstopped\n")


def test_further_signals_of_one_stop_disturb_nothing_and_later_ones_stop_again(monkeypatch):
    before = [signal.getsignal(number) for number in NUMBERS]
    with signals.as_ctrl_c(signal.SIGUSR2), signals.as_ctrl_c():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received() == [signal.SIGUSR2, signal.SIGTERM]
        assert signals.exit_code() == 128 + signal.SIGUSR2
        monkeypatch.setattr(signals, "_ONE_STOP_S", 0.0)  # as if time had passed
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in NUMBERS] == before
    with signals.as_ctrl_c():
        assert signals.exit_code() == 128 + signal.SIGINT


def test_a_second_ctrl_c_is_never_ignored():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with signals.as_ctrl_c():
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
