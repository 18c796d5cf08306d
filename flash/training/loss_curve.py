"""The training loss along a run, kept in its checkpoints and watched by those who may stop it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L

from flash.training.lightning_module import LanguageModelling

MOST_PARTS = 32
"""Parts of a curve: enough to see its shape, and each a mean over so many steps that runs on the
same batches can be compared."""


@dataclass(frozen=True)
class Curve:
    """Training loss of a run so far, as means over equal parts of it.

    Attributes:
        losses: Of each part that is over [nats a token].
        parts: How many the whole run has.
    """

    losses: tuple[float, ...]
    parts: int

    @classmethod
    def of(cls, losses: Sequence[float], steps: int) -> "Curve":
        """The curve of a run of `steps` steps, of which these are the losses so far."""
        parts = min(steps, MOST_PARTS)
        edges = [round(i * steps / parts) for i in range(parts + 1)]
        over = [(a, b) for a, b in zip(edges, edges[1:], strict=False) if b <= len(losses)]
        return cls(tuple(_mean(losses[a:b]) for a, b in over), parts)

    def points(self, tokens: int) -> list[list[float]]:
        """Tokens seen at the end of each part and its loss, for a run of `tokens` in all."""
        return [[tokens * (i + 1) / self.parts, loss] for i, loss in enumerate(self.losses)]


def _mean(losses: Sequence[float]) -> float:
    """Without those that are not finite: such steps were left out."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return fmean(finite) if finite else math.nan


Watch = Callable[[Curve], None]
"""Called whenever a part of the curve is over; ends the run by raising."""


class CurveRecorder(L.Callback):
    """Notes the loss of every step, those before a resumption included.

    Args:
        steps: Of the whole run.
        watch: Told of every part that is over.
    """

    def __init__(self, steps: int, watch: Watch | None) -> None:
        self.steps, self.watch = steps, watch
        self._losses: list[float] = []

    @property
    def curve(self) -> Curve:
        """So far."""
        return Curve.of(self._losses, self.steps)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert isinstance(pl_module, LanguageModelling)
        step = trainer.global_step
        if step == len(self._losses):
            return  # a micro-batch of a step that is not over
        self._losses.append(pl_module.step_loss)
        parts = min(self.steps, MOST_PARTS)
        ends = {round(i * self.steps / parts) for i in range(1, parts + 1)}
        if self.watch is not None and step in ends:
            self.watch(self.curve)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses = list(state_dict["losses"])


class SaveOnce(L.Callback):
    """A checkpoint after a certain step, to continue from with another schedule.

    Args:
        step: Steps done by then.
        path: The file.
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
            trainer.save_checkpoint(self.path, weights_only=False)  # with the optimiser
