"""Contract test of Lightning for flash.compat.lightning."""

import signal
import subprocess
import sys

import lightning as L

from tests.compat.contract import contract


def test_launched_processes_can_be_killed():
    with contract(
        "Lightning's Strategy.launcher or its kill",
        "flash.compat.lightning.kill_launched_processes",
        "end the other processes of a run that has failed",
    ):
        from flash.compat.lightning import kill_launched_processes

        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        alone = L.Trainer(accelerator="cpu", devices=1, **quiet)
        kill_launched_processes(alone)
        trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", **quiet)
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        with subprocess.Popen(command) as process:
            launcher = trainer.strategy.launcher
            assert launcher is not None
            launcher.procs.append(process)
            kill_launched_processes(trainer)
            assert process.wait(10) == -signal.SIGKILL
