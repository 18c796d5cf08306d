"""The training loss along a run, kept in its checkpoints, and the callbacks that record it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L

from flash.training.lightning_module import LanguageModeling

MAX_PARTS = 32
"""Most points of a loss curve: enough to show its shape, and few enough that each is a mean over
many steps, so that runs on the same batches can be compared."""


@dataclass(frozen=True)
class Curve:
    """Training loss of a run so far, as means over equal parts of the run.

    Attributes:
        losses: Mean loss of each finished part [nats per token].
        parts: Number of parts of the whole run.
    """

    losses: tuple[float, ...]
    parts: int

    @classmethod
    def of(cls, losses: Sequence[float], steps: int) -> "Curve":
        """The curve of a run of `steps` steps, from the losses of the steps so far."""
        parts = min(steps, MAX_PARTS)
        edges = [round(i * steps / parts) for i in range(parts + 1)]
        over = [(a, b) for a, b in zip(edges, edges[1:], strict=False) if b <= len(losses)]
        return cls(tuple(_mean(losses[a:b]) for a, b in over), parts)

    def points(self, tokens: int) -> list[list[float]]:
        """Tokens seen by the end of each part, with its loss, in a run of `tokens` tokens."""
        return [[tokens * (i + 1) / self.parts, loss] for i, loss in enumerate(self.losses)]


def _mean(losses: Sequence[float]) -> float:
    """Mean of the finite losses; the steps of all others were left out."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return fmean(finite) if finite else math.nan


Watch = Callable[[Curve], None]
"""Function that is called with the curve after each of its parts; it may raise to end the run."""


class CurveRecorder(L.Callback):
    """Records the loss of every step, including those before the run was resumed.

    Args:
        steps: Optimizer steps of the whole run.
        watch: Called with the curve after each of its parts; None calls nothing.
    """

    def __init__(self, steps: int, watch: Watch | None) -> None:
        self.steps, self.watch = steps, watch
        self._losses: list[float] = []

    @property
    def curve(self) -> Curve:
        """The curve of the steps so far."""
        return Curve.of(self._losses, self.steps)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, LanguageModeling)
        step = trainer.global_step
        if step == len(self._losses):
            return  # more micro-batches of this step follow
        self._losses.append(pl_module.step_loss)
        parts = min(self.steps, MAX_PARTS)
        ends = {round(i * self.steps / parts) for i in range(1, parts + 1)}
        if self.watch is not None and step in ends:
            self.watch(self.curve)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = list(state_dict["losses"])


class SaveAtStep(L.Callback):
    """Writes one checkpoint, with which another run can go on under another schedule.

    Args:
        step: Number of finished steps at which it is written.
        path: File of the checkpoint.
    """

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)  # includes the optimizer
