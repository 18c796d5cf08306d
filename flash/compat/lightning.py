"""Lightning: processes started by a trainer.

Names that Lightning 2.6 does not document, and the reasons to use them:

- `Strategy.launcher` and its `kill`: if the main process of a run fails, the others would
  otherwise wait for it until a timeout.
"""

import signal

import lightning as L


def kill_launched_processes(trainer: L.Trainer) -> None:
    """Kill the processes that this process has started for `trainer`, if there are any."""
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signal.SIGKILL)
