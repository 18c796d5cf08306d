"""Faults of long runs: non-finite gradients, loss spikes, signals, and checkpoints cut short."""

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

_RECENT_STEPS = 64
"""Number of good steps whose losses are kept for the median and the quartiles."""
_MIN_STEPS = 16
"""Number of kept losses below which no loss counts as a spike."""


class StepStatus(Enum):
    """Result of checking one optimizer step before it is taken."""

    good = "good"
    non_finite = "non_finite"
    """The loss or the gradient norm is infinite or not a number."""
    spike = "spike"
    """The loss is far above those of the recent steps."""


class Diverged(InputError):
    """A training whose learning rate is too high for its model."""


class StepGuard:
    """Checks each optimizer step by its loss and gradient norm, and counts those left out.

    Loss and norm are the same on all ranks, so all ranks come to the same result.

    Args:
        spike_factor: Number of interquartile ranges above the median of the recent losses from
            which a loss is a spike; None turns the check off.
        max_skipped: Most steps in a row that may be left out.
        lr: Peak learning rate, named in errors.

    Attributes:
        skipped: Steps left out so far, including those before the run was resumed.
        skipped_in_a_row: Steps left out since the last good one.
    """

    def __init__(self, spike_factor: float | None, max_skipped: int, lr: float) -> None:
        self.spike_factor, self.max_skipped, self.lr = spike_factor, max_skipped, lr
        self.skipped = self.skipped_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=_RECENT_STEPS)

    def state_dict(self) -> dict[str, Any]:
        """The counts and recent losses, with which a resumed run goes on as this one would."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.skipped_in_a_row,
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore counts and recent losses from `state_dict`."""
        self.skipped, self.skipped_in_a_row = state["skipped"], state["in_a_row"]
        self._losses = deque(state["losses"], maxlen=_RECENT_STEPS)

    def check(self, loss: float, norm: float) -> StepStatus:
        """Status of a step; all but good steps must be left out.

        Args:
            loss: Mean training loss of the step [nats per token].
            norm: Gradient norm before clipping.

        Raises:
            Diverged: More than `max_skipped` steps in a row must be left out.
        """
        status = StepStatus.good
        if not torch.tensor([loss, norm]).isfinite().all():
            status = StepStatus.non_finite
        elif self._is_spike(loss):
            status = StepStatus.spike
        if status is StepStatus.good:
            self._losses.append(loss)
            self.skipped_in_a_row = 0
            return status
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.max_skipped:
            raise Diverged(
                f"recipe.lr={self.lr}: training diverged, {self.skipped_in_a_row} steps in a row "
                f"had to be left out (loss {loss:.3g}, gradient norm {norm:.3g}); lower it"
            )
        return status

    def check_end(self, steps: int) -> None:
        """Check that a run of `steps` steps did not end with a long row of steps left out.

        Raises:
            Diverged: Half of the steps or more were left out in a row at the end.
        """
        if 2 * self.skipped_in_a_row >= steps > 0:
            raise Diverged(
                f"recipe.lr={self.lr}: training diverged, its last {self.skipped_in_a_row} of "
                f"{steps} steps had to be left out; lower it"
            )

    def _is_spike(self, loss: float) -> bool:
        if self.spike_factor is None or len(self._losses) < _MIN_STEPS:
            return False
        first, median, third = statistics.quantiles(self._losses, n=4)
        return loss > median + self.spike_factor * (third - first)


class StopBySignal(L.Callback):
    """Ends a run on SIGTERM, SIGHUP or SIGUSR2, after the current step and with a checkpoint.

    Slurm sends SIGTERM and SIGUSR2 before it takes a machine away. If one rank has received a
    signal, all ranks stop after the same step. `fit` then calls the handler that the signal had
    before; in a Slurm job it queues the job again.

    Args:
        path: File of the checkpoint; None writes none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._received: int | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set signal handlers
        # Lightning has set handlers of its own by now. At the end it restores those that were there
        # before; a `teardown` of this callback would come later and bring Lightning's back.
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
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
            kept = "with a checkpoint" if self.path is not None else "without a checkpoint"
            log.warning("stopped by %s after step %d, %s", name, trainer.global_step, kept)
        raise Stopped(number)


class Stopped(SystemExit):
    """End of a run by a signal, after its checkpoint was written.

    Attributes:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, replaced atomically; a kill or a full disk harms none."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        try:
            with atomic_write(Path(path)) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # PyTorch closes its archive while it handles the error of the disk, and fails again.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            where = cause.filename or str(path)  # `flash.config` names it in its one line
            raise OSError(cause.errno, cause.strerror, where) from error


def drop_gradients(parameters: list[Tensor]) -> None:
    """Drop all gradients, so that the next step of the optimizer changes nothing."""
    for parameter in parameters:
        parameter.grad = None
