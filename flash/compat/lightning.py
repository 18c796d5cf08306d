"""Lightning: the processes that a trainer has started.

Names that Lightning 2.6 does not document, and the reasons to use them:

- `Strategy.launcher` and its `kill`: where the main process of a run fails, the others would wait
  for it until a timeout.
"""

import signal

import lightning as L


def kill_launched_processes(trainer: L.Trainer) -> None:
    """Kill the processes that this one has started for `trainer`; nothing where there are none."""
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signal.SIGKILL)
