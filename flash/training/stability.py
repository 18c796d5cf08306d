"""What goes wrong in long runs: steps without a finite gradient, spikes of the loss, signals."""

import logging
import os
import signal
import statistics
import threading
from collections import deque
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from flash.errors import InputError
from flash.records import atomic_write

log = logging.getLogger(__name__)

_RECENT = 64
_ENOUGH = 16
"""Steps after which a median says something."""


class Verdict(Enum):
    """About a step that is about to be taken."""

    good = "good"
    broken = "broken"
    """Its gradient is not finite."""
    spike = "spike"


class Guard:
    """Judges steps by their loss and gradient norm, which are the same on all ranks.

    Args:
        spike_factor: Quartile distances above the median from which a loss is a spike; None: never.
        max_skipped: Steps left out in a row that are too many.
        lr: For the error's words.

    Attributes:
        skipped: Steps left out so far, those before a resumption included.
        in_a_row: Of them, without a good one since.
    """

    def __init__(self, spike_factor: float | None, max_skipped: int, lr: float) -> None:
        self.spike_factor, self.max_skipped, self.lr = spike_factor, max_skipped, lr
        self.skipped = self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=_RECENT)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, to judge as this one would."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._losses = deque(state["losses"], maxlen=_RECENT)

    def judge(self, loss: float, norm: float) -> Verdict:
        """Whether to take the step.

        Raises:
            InputError: Too many in a row were not to be taken.
        """
        verdict = Verdict.good
        if not torch.tensor([loss, norm]).isfinite().all():
            verdict = Verdict.broken
        elif self._stands_out(loss):
            verdict = Verdict.spike
        if verdict is Verdict.good:
            self._losses.append(loss)
            self.in_a_row = 0
            return verdict
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row > self.max_skipped:
            raise InputError(
                f"recipe.lr={self.lr}: training diverged, {self.in_a_row} steps in a row had to be "
                f"left out (loss {loss:.3g}, gradient norm {norm:.3g}); lower it"
            )
        return verdict

    def check_end(self, steps: int) -> None:
        """See that a run of so many steps did not end amid bad ones.

        Raises:
            InputError: The last half or more of its steps were left out.
        """
        if 2 * self.in_a_row >= steps > 0:
            raise InputError(
                f"recipe.lr={self.lr}: training diverged, its last {self.in_a_row} of {steps} "
                "steps had to be left out; lower it"
            )

    def _stands_out(self, loss: float) -> bool:
        if self.spike_factor is None or len(self._losses) < _ENOUGH:
            return False
        first, median, third = statistics.quantiles(self._losses, n=4)
        return loss > median + self.spike_factor * (third - first)


class StopBySignal(L.Callback):
    """SIGTERM and SIGUSR2 end a run after its step, with a checkpoint, on all ranks alike.

    Slurm sends them before it takes a machine away. What was set up for the signal before (in a
    job of ours: to be queued again) happens then.

    Args:
        path: The checkpoint; None writes none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._received: int | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # signals are the main thread's
        # Lightning has put its own in place by now. In the end it restores what was there before
        # its own; a `teardown` here would come later, and put Lightning's back.
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._note)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        received = self._received is not None
        if not trainer.strategy.reduce_boolean_decision(received, all=False):
            return
        if self.path is not None:
            trainer.save_checkpoint(self.path, weights_only=False)
        number = self._received or signal.SIGTERM
        name = signal.Signals(number).name
        if trainer.is_global_zero:
            log.warning(
                "stopped by %s after step %d; go on with the same command",
                name,
                trainer.global_step,
            )
        raise Stopped(number)


class Stopped(SystemExit):
    """A signal ended the run; its checkpoint is written.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, but a kill or a full disk keeps the one before."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        try:
            with atomic_write(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # PyTorch closes its archive while the disk's error is on its way, and fails once more.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            where = cause.filename or str(path)  # so that the one line can name it
            raise OSError(cause.errno, cause.strerror, where) from error


def drop_gradients(parameters: list[Tensor]) -> None:
    """Make the optimiser's next step leave everything as it is."""
    for parameter in parameters:
        parameter.grad = None
